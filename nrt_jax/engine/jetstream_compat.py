"""The one place that knows how google-jetstream 0.2.2 has to be imported.

Its token utilities import two names from seqio, which pulls TensorFlow (2.7 GB) and which an engine
that tokenises by itself never calls. They are stood in for here, so the rest of the package imports
the JetStream names from this module. Its orchestrator, which no one here needs, would also set the
root logger to DEBUG; the engine's interface leaves it alone.
"""

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator


@contextlib.contextmanager
def _stand_in_for_seqio() -> Iterator[None]:
    """Offer the two class names that jetstream.engine.token_utils imports, where there are none."""
    if importlib.util.find_spec("seqio") is not None:
        yield
        return
    vocabularies = types.ModuleType("seqio.vocabularies")
    for name in ("Vocabulary", "SentencePieceVocabulary"):
        setattr(vocabularies, name, type(name, (), {}))
    stand_ins = {"seqio": types.ModuleType("seqio"), "seqio.vocabularies": vocabularies}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        # Others who ask whether seqio is installed get the true answer.
        for name in stand_ins:
            del sys.modules[name]


with _stand_in_for_seqio():
    _engine_api = importlib.import_module("jetstream.engine.engine_api")
    _tokenizer_pb2 = importlib.import_module("jetstream.engine.tokenizer_pb2")

Engine = _engine_api.Engine
ResultTokens = _engine_api.ResultTokens
TokenizerParameters = _tokenizer_pb2.TokenizerParameters
