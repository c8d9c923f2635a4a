"""A whole run compiles few programs: the test says which, by name, and how many of each."""

import re
from collections import Counter

import pytest

from nrt_jax.compilation import MODEL_PROGRAMS
from tests.training.runs import TinyRun, write_config, write_model

RUN = (
    "warmup={train: all, rows: {updates: 2}, all: {updates: 2}, batch_prompts: 4, max_tokens: 4, "
    "min_tokens: 1, temperature: 3}",
    "objective.kl_coefficient=0",
    "train={steps: 4, mini_batch_prompts: 4, batch_shapes: 1, diagnosis_prompts: 4}",
    "train.allow_cold_start=true",
)
"""A warm-up of two stages, a diagnosis, four steps, and four evaluations."""

OF_MODEL = {
    "run_prompts": 2,  # x t_start (and x, for the texts); x t_start z t_end
    "insert_samples": 3,  # groups of K traces; single texts and traces; answers
    "decode_steps": 3,  # the same
    "answer_logprobs": 1,  # the diagnosis
    "add_micro_batch": 3,  # both stages of the warm-up; NRT, whose gradient shares are measured too
    "apply_update": 1,  # warm-up and NRT
}
MOST_SMALL = 24
"""Random keys, empty caches, sums of 0, checksums."""


def compiled(run: TinyRun) -> Counter[str]:
    outcome = run.train(JAX_LOG_COMPILES="1")
    assert outcome.status == 0, outcome
    names = Counter(re.findall(r"Finished XLA compilation of jit\((\S+)\) in", outcome.err))
    counts = re.search(r"compiled (\d+) programs of the model and (\d+) small ones", outcome.err)
    assert counts is not None, outcome.err
    of_model = sum(names[name] for name in MODEL_PROGRAMS)
    assert (int(counts[1]), int(counts[2])) == (of_model, names.total() - of_model)
    return names


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> Counter[str]:
    folder = tmp_path_factory.mktemp("counted")
    write_model(folder / "model")
    return compiled(TinyRun(write_config(folder), folder / "run", RUN))


def test_programs_of_the_model(names):
    assert {name: names[name] for name in MODEL_PROGRAMS if names[name]} == OF_MODEL


def test_small_programs(names):
    small = {name: count for name, count in names.items() if name not in MODEL_PROGRAMS}
    assert sum(small.values()) <= MOST_SMALL, small
