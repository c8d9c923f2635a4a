"""Verbs other than `train` in two processes print and write what they do in one of two devices."""

from itertools import count
from pathlib import Path

import pytest

from tests.training.runs import Outcome, Process, write_config, write_model

pytestmark = pytest.mark.slow
QUESTIONS = ("--prompt", "123+456", "--score", "=3", "--prompt", "7+7", "--score", "=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model whose heads two devices can share, and a config beside it."""
    folder = tmp_path_factory.mktemp("verbs")
    write_model(folder / "model", num_attention_heads=4, num_key_value_heads=2)
    write_config(folder)
    return folder


@pytest.fixture
def run(tmp_path):
    """Run a verb in one process or in two, two devices in all."""
    numbers = count()

    def run(processes: int, *words: object) -> Outcome:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        told = [str(word) for word in words]
        if processes > 1:
            return Process(["local", "--processes", str(processes), "--", *told], folder).end()
        return Process(told, folder, {"JAX_NUM_CPU_DEVICES": "2"}).end()

    return run


def assert_alike(alone: Outcome, together: Outcome) -> None:
    """Process 0 alone prints, and logs; nothing else is told."""
    assert (alone.status, together.status) == (0, 0), together
    assert together.out == alone.out
    assert without_gloo(together) == alone.told


def without_gloo(outcome: Outcome) -> list[str]:
    """Lines on standard error, without those that Gloo writes when processes connect."""
    return [line for line in outcome.told if not line.startswith("[Gloo]")]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_import_and_export(run, folder, tmp_path):
    for processes in (1, 2):
        imported, exported = tmp_path / f"imported{processes}", tmp_path / f"exported{processes}"
        outcome = run(processes, "import", folder / "model", imported, "--mesh", "fsdp=2")
        assert outcome.status == 0, outcome
        assert outcome.out.count(f"wrote {imported}: ") == 1
        outcome = run(processes, "export", imported, exported)
        assert (outcome.status, outcome.out) == (0, f"wrote {exported}\n"), outcome
    alone, together = (contents(tmp_path / f"exported{processes}") for processes in (1, 2))
    assert together.keys() == alone.keys()
    # The card names the directory that was exported.
    assert {name for name in alone if alone[name] != together[name]} <= {"README.md"}


def test_generate(run, folder):
    words = ("generate", folder / "model", "data.template=plain", *QUESTIONS, "--temperature", "1")
    alone, together = run(1, *words), run(2, *words)
    assert_alike(alone, together)
    assert together.out.count("score   R ") == 2


@pytest.mark.parametrize("what", ["config", "model"])
def test_diagnose(what, run, folder, tmp_path):
    files = [tmp_path / f"{processes}.json" for processes in (1, 2)]
    said = {"config": [folder / "tiny.yaml", "train.micro_batch_prompts=2"]}
    said["model"] = [
        *(folder / "model", "data.source=chain_addition", "data.chain.rows=40"),
        *("data.eval_rows=4", "method=nrt", "rollout.max_trace_tokens=4"),
    ]
    alone, together = (
        run(processes, "diagnose", *said[what], "--out", file)
        for processes, file in enumerate(files, 1)
    )
    assert (alone.status, together.status) == (0, 0), together
    assert together.out == alone.out
    assert files[0].read_text() == files[1].read_text()


def test_serve_says_what_to_do(run, folder):
    outcome = run(2, "serve", folder / "model")
    assert (outcome.status, outcome.out) == (2, "")
    assert sorted(outcome.told) == [
        f"nrt-jax: error: serve: this is process {process} of 2, and a server is one process; "
        "start it on one host alone, without NRT_JAX_PROCESSES or a cluster's task"
        for process in (0, 1)
    ]
