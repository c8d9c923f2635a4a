"""The one place that knows how google-jetstream 0.2.2 has to be imported.

Its token utilities import two names from seqio, which pulls TensorFlow (2.7 GB) and which an engine
that tokenises by itself never calls; and importing it sets the root logger to DEBUG. Both are put
right here, so that the rest of the package imports the JetStream names from this module.
"""

import importlib
import importlib.util
import logging
import sys
import types


def _stand_in_for_seqio() -> None:
    """Offer the two class names that jetstream.engine.token_utils imports."""
    vocabularies = types.ModuleType("seqio.vocabularies")
    for name in ("Vocabulary", "SentencePieceVocabulary"):
        setattr(vocabularies, name, type(name, (), {}))
    seqio = types.ModuleType("seqio")
    setattr(seqio, "vocabularies", vocabularies)
    sys.modules["seqio"] = seqio
    sys.modules["seqio.vocabularies"] = vocabularies


def _import_quietly(name: str) -> types.ModuleType:
    """Import a module and leave the root logger as it was."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        return importlib.import_module(name)
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


if importlib.util.find_spec("seqio") is None:
    _stand_in_for_seqio()

_engine_api = _import_quietly("jetstream.engine.engine_api")
_tokenizer_pb2 = _import_quietly("jetstream.engine.tokenizer_pb2")

Engine = _engine_api.Engine
ResultTokens = _engine_api.ResultTokens
TokenizerParameters = _tokenizer_pb2.TokenizerParameters
