"""The warm-up as a phase of a run: what trains, what is saved, and what it refuses."""

import signal

import jax
import numpy as np
import pytest

from nrt_jax.checkpoints.open import open_model
from nrt_jax.training.warmup_texts import TEXTS_FILE
from tests.training.runs import TinyRun, assert_same, write_config, write_model

WARMUP = (
    "warmup={train: all, rows: {updates: 3}, all: {updates: 3}, batch_prompts: 5, max_tokens: 4, "
    "min_tokens: 1, temperature: 3}",
    "objective.kl_coefficient=0",
    "train.steps=3",
)
THINK = (4, 5)
"""Ids of the quickstart's think tokens."""


def warmed(run: TinyRun) -> list[dict]:
    return [row for row in run.metrics() if "warmup/update" in row]


def test_a_run_with_a_warmup(reference):
    run = reference(*WARMUP)
    rows = run.metrics()
    # The base model, six updates, the model that NRT starts from, and the steps of NRT.
    order = [(row["step"], row.get("warmup/update")) for row in rows]
    updates = [(number - 6, number) for number in range(1, 7)]
    assert order == [(-6, None), *updates, (0, None), (1, None), (2, None), (3, None), (3, None)]
    assert all("eval/exact_match" in rows[i] for i in (0, 7, -1))
    samples = [sample["step"] for sample in run.lines("samples.jsonl")]
    assert sorted(set(samples)) == [-6, 0, 3]
    assert not (run.directory / "warmup_checkpoints").exists()
    for row in warmed(run):
        assert all(np.isfinite(value) for value in row.values())
        # Texts without a token are left out, evenly; every fifth row has no text.
        assert 2 <= row["warmup/rows"] <= 5
        # Three tokens each: a digit, and those around it.
        assert row["warmup/answer_tokens"] == 3 * row["warmup/rows"]


def test_the_texts_are_those_of_the_rows_without_think_tokens(reference):
    texts = reference(*WARMUP).lines(TEXTS_FILE)
    # Every fifth of the 30 rows has the empty trace, and no text.
    assert len(texts) == 24
    for text in texts:
        assert len(text["tokens"]) <= 4
        assert not set(THINK) & set(text["tokens"])
        assert (text["end"] == "length") == (len(text["tokens"]) == 4)


@pytest.mark.slow
def test_stopped_in_the_warmup(new_run, reference):
    run = new_run(*WARMUP)
    process = run.start()
    assert process.wait_until(lambda: len(warmed(run)) >= 2)
    process.signal(signal.SIGTERM)
    outcome = process.end()
    assert outcome.status == 0, outcome
    assert "of 6 of the warm-up; the same command continues the run" in outcome.err
    assert run.steps == []
    assert "error" not in run.trained().err.lower()
    assert_same(run, reference(*WARMUP))


@pytest.mark.slow
def test_killed_in_the_warmup(new_run, reference):
    run = new_run(*WARMUP)
    assert run.kill_at(lambda: (run.directory / TEXTS_FILE).exists())
    for saved in ("2", "4"):
        assert run.kill_at(
            lambda saved=saved: (run.directory / "warmup_checkpoints" / saved).exists()
        )
    assert run.kill_at(lambda: run.saved(0))
    run.trained()
    assert_same(run, reference(*WARMUP))


@pytest.mark.slow
def test_new_rows_train_alone(new_run):
    """After three updates: two rows of the embedding, two columns of the head, and nothing more."""
    run = new_run(*WARMUP, "warmup.train=new_rows", "checkpoint.keep_last=9")
    run.trained()
    before = open_model(run.config.parent / "model").params
    after = open_model(run.checkpoints / "0").params
    changed = jax.tree.map(lambda a, b: np.asarray(a) != np.asarray(b), before, after)
    embedding, head = changed.pop("embedding"), changed.pop("head")
    assert not any(leaf.any() for leaf in jax.tree.leaves(changed))
    for token in THINK:
        assert embedding[token].all()
        assert head[:, token].all()
    assert embedding.sum() == head.sum() == 2 * head.shape[0]
    rows = run.metrics()
    assert [row["step"] for row in rows if "warmup/update" in row] == [-2, -1, 0]


def test_a_text_that_is_missing(new_run):
    run = new_run(*WARMUP)
    assert run.kill_at(lambda: (run.directory / "warmup_checkpoints" / "2").exists())
    path = run.directory / TEXTS_FILE
    kept = path.read_text()
    path.unlink()
    said = run.train()
    assert said.status == 2
    assert said.told[-1] == (
        f"nrt-jax: error: {path}: is missing, and the weights that wrote it have changed; restore "
        "it from a copy, or choose another run_dir"
    )
    path.write_text(kept.split("\n", 1)[1])
    said = run.train()
    assert said.status == 2
    assert said.told[-1] == (
        f"nrt-jax: error: {path}: does not hold a text for each row of the warm-up; restore it "
        "from a copy, or choose another run_dir"
    )


def test_a_model_that_gives_nan(tmp_path):
    path = write_model(tmp_path / "model") / "model.safetensors"
    # A NaN in float32, in the last weight of the file.
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
    run = TinyRun(write_config(tmp_path), tmp_path / "run", WARMUP)
    said = run.train("evaluation.examples=0")
    assert said.status == 2
    assert said.told[-1].startswith(
        f"nrt-jax: error: {path.parent}: its logprobs are not finite (text of row "
    )
    assert said.told[-1].endswith("use weights without NaN or infinity, or model.dtype=float32")


def test_an_instruction_without_a_system_turn(new_run):
    run = new_run(*WARMUP, "warmup.instruction=Think.")
    said = run.train()
    assert said.status == 2
    assert said.error == (
        "warmup.instruction='Think.': data.template=plain has no system turn; set "
        "warmup.instruction='' to let the model continue x freely, or a data.template that has a "
        "system turn"
    )
    assert not run.directory.exists()
