"""Defaults and ranges of the objective's settings, and their agreement with the functions."""

import pkgutil
import subprocess
import sys

import pytest
from pydantic import ValidationError

from nrt_jax import config
from nrt_jax.config.objective import ObjectiveConfig


def test_defaults_are_the_papers():
    config = ObjectiveConfig()
    assert (config.scheme, config.estimator, config.policy_loss) == (
        "ws_neg_log_p",
        "grpo",
        "ppo_clip",
    )
    assert (config.clip_low, config.clip_high) == (0.2, 0.28)
    assert (config.format_coefficient, config.format_where) == (0.3, "all")
    assert (config.kl_coefficient, config.entropy_coefficient) == (0, 0)
    assert (config.ws_normalisation, config.weight_cap) == ("sum", 1e4)
    assert (config.token_signal, config.trace_covers, config.reward_policy) == (
        "derived",
        "z",
        "current",
    )
    assert (config.token_ratio, config.token_ratio_cap) == ("none", 2.0)
    assert (config.importance_cap, config.old_logprobs) == (None, "sampler")
    assert config.length_constant == 4096


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scheme", "mean"),
        ("ws_normalisation", "max"),
        ("weight_cap", 0),
        ("weight_cap", float("inf")),
        ("estimator", "ppo"),
        ("policy_loss", "ppo"),
        ("clip_low", -0.1),
        ("clip_low", 1.1),
        ("clip_high", -0.1),
        ("token_signal", "none"),
        ("trace_covers", "all"),
        ("format_where", "never"),
        ("format_coefficient", -1),
        ("length_constant", 0),
        ("length_constant", float("nan")),
        ("kl_coefficient", -1),
        ("entropy_coefficient", -1),
        ("token_ratio", "token"),
        ("token_ratio_cap", 0.5),
        ("reward_policy", "old"),
        ("old_logprobs", "trainer"),
        ("shceme", "p"),
    ],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(ValidationError, match=field):
        ObjectiveConfig(**{field: value})


def test_importance_weight_needs_recomputed_logprobs():
    with pytest.raises(ValidationError, match="importance_cap=2 needs old_logprobs=recompute"):
        ObjectiveConfig(importance_cap=2.0)
    with pytest.raises(ValidationError, match="importance_cap"):
        ObjectiveConfig(importance_cap=0, old_logprobs="recompute")
    assert ObjectiveConfig(importance_cap=2.0, old_logprobs="recompute").importance_cap == 2


def test_every_field_is_described():
    for name, field in ObjectiveConfig.model_fields.items():
        assert field.description, name


def test_no_part_of_config_imports_jax():
    names = [f"nrt_jax.config.{module.name}" for module in pkgutil.iter_modules(config.__path__)]
    assert len(names) > 10
    program = (
        f"import sys, {', '.join(names)}; sys.exit(bool({{'jax', 'numpy'}} & {{*sys.modules}}))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
