"""Benchmarks during a training: their metrics, the files that they leave, and wrong names."""

import json

import pytest

from nrt_jax.evaluation.results import read_results
from tests.data.made_tokenizers import write_made_tokenizer
from tests.training.runs import TinyRun, write_config, write_model


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A tiny model with few positions, so that answers are short, and a set of two questions."""
    folder = tmp_path_factory.mktemp("suite")
    write_model(folder / "model", vocab_size=700, max_position_embeddings=256)
    write_made_tokenizer("llama3", folder / "tokenizer")
    (folder / "data" / "gsm8k").mkdir(parents=True)
    rows = [json.dumps({"question": f"{n} + 1?", "answer": f"#### {n + 1}"}) for n in (1, 2, 3)]
    (folder / "data" / "gsm8k" / "test.jsonl").write_text("\n".join(rows))
    return write_config(folder)


def run(config, tmp_path, *overrides) -> TinyRun:
    fixed = (
        f"data.tokenizer={config.parent / 'tokenizer'}",
        f"evaluation.suite_data={config.parent / 'data'}",
        "data.max_prompt_tokens=32",
        "data.max_answer_tokens=8",
        "rollout.max_response_tokens=20",
        "evaluation.examples=0",
    )
    return TinyRun(config, tmp_path / "run", (*fixed, *overrides))


@pytest.mark.slow
def test_a_training_measures_its_benchmarks(config, tmp_path):
    of = run(config, tmp_path, "train.steps=2", "evaluation.every_steps=2")
    of.trained("evaluation.suite=[gsm8k]", "evaluation.suite_limit=2")
    rows = [row for row in of.metrics() if "eval/gsm8k" in row]
    assert [row["step"] for row in rows] == [0, 2]
    for row in rows:
        assert row["eval/gsm8k_unclosed_share"] == 1.0, "random weights close no trace"
        assert 1 <= row["eval/gsm8k_trace_tokens"] <= 4
        (result,) = read_results(of.directory / "benchmarks" / str(row["step"])).tasks
        assert (result.n, result.value) == (2, row["eval/gsm8k"])


@pytest.mark.parametrize(
    ("suite", "told"),
    [
        ("[gsm9k]", "evaluation.suite: 'gsm9k' is no benchmark; did you mean gsm8k?"),
        ("[mmlu]", "evaluation.suite: evaluation.suite_data {folder}: no mmlu"),
    ],
)
def test_a_wrong_suite_is_told_before_the_run_directory_is_made(config, tmp_path, suite, told):
    of = run(config, tmp_path, f"evaluation.suite={suite}")
    outcome = of.train()
    assert outcome.status == 2
    assert outcome.error.startswith(told.format(folder=config.parent / "data"))
    assert not of.directory.exists()
