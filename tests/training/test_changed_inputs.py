"""A run is continued over the rows that it was trained on, or on purpose over others."""

import json

import pytest

from tests.training.runs import TinyRun

SMALL = (
    "method=sft",
    "data.source=jsonl",
    "data.eval_rows=2",
    "train={batch_prompts: 8, mini_batch_prompts: 8, micro_batch_prompts: 8}",
    "optimizer.schedule=constant",
    "optimizer.warmup_ratio=0",
    "evaluation.examples=0",
)


@pytest.fixture
def trained(tmp_path, tiny_config, words):
    """A run of one step, and what trains it further with some more words."""
    data = tmp_path / "train.jsonl"
    write_rows(data, 12, answer=0)
    run = TinyRun(tiny_config, tmp_path / "run")
    command = ("train", tiny_config, f"run_dir={run.directory}", f"data.path={data}", *SMALL)
    status, _, said = words(*command, "train.steps=1")
    assert status == 0, said
    return data, run, lambda *more: words(*command, *more)


def write_rows(path, count: int, answer: int) -> None:
    rows = [{"question": f"{i // 5}+{i % 5}", "answer": f"={answer}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_other_data(trained, caplog):
    data, run, train = trained
    described = (run.directory / "config.yaml").read_bytes()
    # As many usable rows: nothing but their contents tells that they are others.
    write_rows(data, 12, answer=1)
    status, _, said = train("train.steps=2")
    assert status == 2
    assert f"data={data} has changed; eval_data={data} has changed (held-out rows)" in said
    assert "--allow-changed data, or choose another run_dir" in said
    assert run.steps == [1]
    assert (run.directory / "config.yaml").read_bytes() == described
    assert train("train.steps=2", "--allow-changed", "data")[0] == 0
    assert run.steps == [1, 2]
    assert f"allowed from step 1 on: data={data} has changed" in caplog.messages
    recorded = json.loads((run.directory / "inputs.json").read_text())
    assert [c["input"] for c in recorded["allowed_changes"]] == ["data", "eval_data"]
    # The new file is the run's own from here on, and may be moved.
    moved = data.rename(data.with_name("moved.jsonl"))
    assert train("train.steps=3", f"data.path={moved}")[0] == 0
    assert json.loads((run.directory / "inputs.json").read_text())["inputs"]["data"]["path"] == (
        str(moved)
    )


def test_what_no_input_is_called(trained):
    *_, train = trained
    with pytest.raises(SystemExit) as stopped:
        train("--allow-changed", "data,dates")
    assert stopped.value.code == 2
