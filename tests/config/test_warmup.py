"""Which updates a warm-up makes, and the settings that it refuses."""

import pytest
from pydantic import ValidationError

from nrt_jax.config.run import RunConfig
from nrt_jax.config.warmup import WarmupConfig

STAGES = {"rows": {"updates": 3}, "all": {"updates": 5}}


@pytest.mark.parametrize(("train", "updates"), [(None, []), ("new_rows", [3]), ("all", [3, 5])])
def test_what_trains_says_which_stages_there_are(train, updates):
    config = WarmupConfig.model_validate({"train": train, **STAGES})
    assert [stage.updates for stage in config.stages] == updates
    assert config.updates == sum(updates)


def test_a_stage_without_updates_is_left_out():
    config = WarmupConfig.model_validate({"train": "all", "rows": {"updates": 0}})
    assert config.stages == (config.all,)


def run(**sections) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "model"},
            "data": {"source": "chain_addition", "max_answer_tokens": 8},
            "train": {"steps": 8},
            "warmup": {"train": "all", **STAGES},
            **sections,
        }
    )


def test_a_warmup_as_long_as_the_run_is_accepted():
    sizes = {"batch_prompts": 4, "mini_batch_prompts": 4, "micro_batch_prompts": 4}
    assert run(train={"steps": 8, **sizes}).warmup.updates == 8


SIZES = {"batch_prompts": 4, "mini_batch_prompts": 4, "micro_batch_prompts": 4}
REFUSED = {
    "longer than the run": (
        {"train": {"steps": 7, **SIZES}},
        "warmup: its 8 updates are more than the 7 of the run (train.steps); lower "
        "warmup.rows.updates and warmup.all.updates, or raise train.steps",
    ),
    "no updates": (
        {"warmup": {"train": "new_rows", "rows": {"updates": 0}}},
        "warmup.train new_rows with no updates; set warmup.rows.updates or warmup.all.updates "
        "above 0, or warmup.train to null",
    ),
    "sft": (
        {"method": "sft"},
        "warmup.train all with method sft, which writes no traces; set warmup.train=null",
    ),
    "kl": (
        {"objective": {"kl_coefficient": 0.1}},
        "objective.kl_coefficient 0.1 with warmup.train all: the reference would be the model "
        "before the warm-up, which writes no traces; set objective.kl_coefficient=0",
    ),
    "texts longer than traces": (
        {"rollout": {"max_trace_tokens": 63}},
        "warmup.max_tokens 64 exceeds rollout.max_trace_tokens 63, the longest trace; lower the "
        "first",
    ),
    "no text is long enough": (
        {"warmup": {"train": "all", "min_tokens": 9, "max_tokens": 8}},
        "warmup.min_tokens 9 exceeds warmup.max_tokens 8, so no text is left; lower the first",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    sections, said = REFUSED[name]
    with pytest.raises(ValidationError) as error:
        run(**sections)
    assert said in str(error.value)


@pytest.mark.parametrize("path", ["max_tokens", "empty_share", "temperature", "all.learning_rate"])
def test_nan_is_no_setting(path):
    value: object = float("nan")
    for key in reversed(path.split(".")):
        value = {key: value}
    with pytest.raises(ValidationError, match="finite number"):
        WarmupConfig.model_validate(value)
