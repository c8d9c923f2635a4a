"""The tokens of reference answers at an evaluation: what is scored, logged, and read back."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nrt_jax.config.load import load_config
from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.config.run import RunConfig
from nrt_jax.data.task_tokenizers import write_quickstart_tokenizer
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError
from nrt_jax.evaluation.held_out import Evaluated
from nrt_jax.evaluation.reference_log import (
    REFERENCES,
    ReferenceRow,
    drop_references_after,
    read_references,
    write_references,
)
from nrt_jax.training.answer_logprobs import ContextLogprobs
from nrt_jax.training.loop import train
from nrt_jax.training.reference_scores import answer_contexts, gains, reference_rows, token_texts
from nrt_jax.types import Example, TokenizedExample, Trace

RECORD = {"reference": "=3", "trace": "1", "trace_end": "length", "answer": "=4", "correct": False}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_quickstart_tokenizer(directory)
    return Tokenizer.load(directory, "<|think_start|>", "<|think_end|>")


@pytest.fixture
def examples(tokenizer) -> list[TokenizedExample]:
    """Two questions whose answers have three tokens."""
    answer = np.asarray([*tokenizer.encode("=3"), tokenizer.eos_id], np.int32)
    prompts = [np.asarray(tokenizer.encode(text), np.int32) for text in ("1+2", "0+3")]
    return [
        TokenizedExample(Example(row, f"q{row}", "=3"), prompt, answer)
        for row, prompt in enumerate(prompts)
    ]


def scored(*means: float) -> list[ContextLogprobs]:
    """Of each context logprobs of three tokens with this mean."""
    tokens = np.asarray([-0.5, 0.0, 0.5])
    return [ContextLogprobs(tokens + mean, tokens + 1, np.zeros(0)) for mean in means]


@pytest.fixture
def rows(tokenizer, examples) -> list[ReferenceRow]:
    trace = Trace(np.zeros(1, np.int32), np.zeros(1, np.float32), None, 0.0)
    # Directly, after the empty trace, the own one, and another question's.
    contexts = [scored(-4, -3, -1, -2.5), scored(-4, -3, -2, -3)]
    evaluated = Evaluated({}, [RECORD, RECORD], [trace, trace])
    objective = ObjectiveConfig(scheme="ws_neg_log_p", weight_cap=3.25)
    return reference_rows(examples, evaluated, contexts, tokenizer, objective)


def test_gains_are_over_the_empty_trace(rows):
    assert gains(rows) == {
        "eval/trace_gain": pytest.approx((2 + 1) / 2),
        "eval/shuffled_gain": pytest.approx((0.5 + 0) / 2),
    }
    assert rows[0].entropies.tolist() == [0.5, 1.0, 1.5]
    assert rows[0].weights.tolist() == [3.25, 3.0, 2.5]


def test_no_gain_without_traces(tokenizer, examples):
    evaluated = Evaluated({}, [RECORD, RECORD], [None, None])
    asked = []

    def score(params, examples, contexts):
        asked.extend([list(map(len, of_row)) for of_row in contexts])
        return [scored(-4) for _ in contexts]

    contexts = answer_contexts(score, "weights", examples, evaluated, tokenizer, 0)
    assert asked == [[3], [3]]
    found = reference_rows(examples, evaluated, contexts, tokenizer, ObjectiveConfig())
    assert gains(found) == {}
    assert (found[0].empty_logprobs, found[0].weights) == (None, None)
    assert found[0].logprobs.tolist() == found[0].direct_logprobs.tolist()


def test_rows_are_read_back_and_later_steps_are_dropped(rows, tmp_path):
    folder = tmp_path / REFERENCES
    for step in (-4, 0, 20):
        write_references(folder, step, rows)
    (found, _) = read_references(tmp_path, 20)
    assert found.key == rows[0].key
    assert found.texts == rows[0].texts
    assert found.shuffled_logprobs == pytest.approx(rows[0].shuffled_logprobs)
    drop_references_after(folder, 0)
    assert sorted(path.name for path in folder.iterdir()) == ["-4.parquet", "0.parquet"]
    assert read_references(tmp_path, 20) == []


def test_a_damaged_file_is_named(rows, tmp_path):
    write_references(tmp_path / REFERENCES, 3, rows)
    path = tmp_path / REFERENCES / "3.parquet"
    table = pq.read_table(path, partitioning=None)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"3\.parquet: cannot be read .*copy it again") as error:
        read_references(tmp_path, 3)
    assert "\n" not in str(error.value)
    index = table.column_names.index("texts")
    texts = pa.array([["=", "3"]] * 2)
    pq.write_table(table.set_column(index, table.schema.field(index), texts), path)
    with pytest.raises(InputError, match="row 0: has 2 texts of 3 tokens"):
        read_references(tmp_path, 3)


def test_each_token_has_its_text(tokenizer, examples):
    prompt = examples[0].prompt_tokens
    answer = np.asarray([*tokenizer.encode("=12"), tokenizer.eos_id])
    assert token_texts(tokenizer, prompt, answer) == ["=", "1", "2", "<|eos|>"]
    assert token_texts(tokenizer, prompt, answer[-1:]) == ["<|eos|>"]


@pytest.mark.slow
def test_a_run_logs_what_the_engine_scores_too(tiny_config, tmp_path):
    """Two programs score the same references: that of the training, and the engine's own."""
    words = ("train.steps=1", "evaluation.reference_rows=4", "evaluation.score_references=true")
    sizes = (
        "mesh.data=4",
        "rollout.devices=4",
        "train.micro_batch_prompts=4",
        "train.mini_batch_prompts=4",
        "objective.kl_coefficient=0",
    )
    words = (*words, *sizes, "train.mini_batch_prompts=4", f"run_dir={tmp_path / 'run'}")
    train(load_config(RunConfig, [tiny_config], words))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    evaluations = {row["step"]: row for row in map(json.loads, lines) if "eval/trace_gain" in row}
    assert list(evaluations) == [0, 1]
    for step, metrics in evaluations.items():
        rows = read_references(tmp_path / "run", step)
        assert len(rows) == 4
        log_c = np.mean([row.logprobs.mean() for row in rows])
        assert log_c == pytest.approx(metrics["eval/reference_logprob"], abs=1e-4)
        empty = np.mean([row.empty_logprobs.mean() for row in rows])
        assert log_c - empty == pytest.approx(metrics["eval/trace_gain"], abs=1e-4)
        assert all((row.entropies >= 0).all() for row in rows)
