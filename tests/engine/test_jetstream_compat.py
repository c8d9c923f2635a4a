"""Importing JetStream needs neither seqio nor TensorFlow, and leaves the root logger alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

PROBE = """
import importlib.util, json, logging, sys
root = logging.getLogger()
before = root.level, list(root.handlers)
from nrt_jax.engine import jetstream_compat
from jetstream.engine import token_utils
print(json.dumps({
    "root_logger_untouched": (root.level, root.handlers) == before,
    "loaded": sorted({"seqio", "tensorflow"} & set(sys.modules)),
    "seqio_found": importlib.util.find_spec("seqio") is not None,
    "vocabulary": token_utils.Vocabulary.__module__,
    "engine": jetstream_compat.Engine.__module__,
}))
"""


def probe(**environment: str) -> dict:
    result = subprocess.run(
        [sys.executable, "-c", PROBE],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


def test_leaves_the_process_as_it_was():
    seen = probe()
    assert seen["root_logger_untouched"]
    assert seen["engine"] == "jetstream.engine.engine_api"
    assert "tensorflow" not in seen["loaded"]
    if not seen["seqio_found"]:
        assert seen["loaded"] == []


def test_the_real_seqio_is_used_where_there_is_one(tmp_path: Path):
    package = tmp_path / "seqio"
    package.mkdir()
    (package / "__init__.py").touch()
    names = "class Vocabulary: pass\nclass SentencePieceVocabulary: pass\n"
    (package / "vocabularies.py").write_text(names)
    seen = probe(PYTHONPATH=f"{tmp_path}{os.pathsep}{REPOSITORY}")
    assert seen["loaded"] == ["seqio"]
    assert seen["vocabulary"] == "seqio.vocabularies"
