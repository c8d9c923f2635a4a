"""Training with rollouts by JetStream's orchestrator is training with those of our loop."""

import json

import numpy as np
import pytest

from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.errors import InputError
from nrt_jax.training.logger import TIMING_PREFIXES

SIZES = (
    "train.steps=2",
    "train.batch_prompts=8",
    "train.mini_batch_prompts=8",
    "train.micro_batch_prompts=8",
    "evaluation.examples=0",
)
"""For the eight devices of this process."""
STALE = (
    "rollout.staleness=1",
    "objective.old_logprobs=recompute",
    "objective.importance_cap=2",
)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), STALE])
def test_either_driver_trains_the_same(tiny_config, tmp_path, words, settings):
    rows = {}
    for driver in ("loop", "jetstream"):
        run = tmp_path / driver
        overrides = (f"run_dir={run}", f"rollout.driver={driver}", *SIZES, *settings)
        status, _, told = words("train", tiny_config, *overrides)
        assert status == 0, told
        lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
        rows[driver] = [
            {k: v for k, v in json.loads(line).items() if not k.startswith(TIMING_PREFIXES)}
            for line in lines
        ]
    assert len(rows["loop"]) == 2
    for ours, theirs in zip(rows["loop"], rows["jetstream"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            np.testing.assert_allclose(theirs[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rollout.drop_zero_std_groups=true"], r"rollout\.drop_zero_std_groups with rollout\.dri"),
        (
            [*STALE, "objective.reward_policy=sampling"],
            r"jetstream with rollout\.staleness 1",
        ),
    ],
)
def test_what_jetstreams_interface_cannot_do_is_refused(tiny_config, settings, message):
    overrides = ["rollout.driver=jetstream", *settings]
    with pytest.raises(InputError, match=message):
        load_config(RunConfig, [tiny_config], overrides)
