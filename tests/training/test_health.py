"""Ranges and remedies: what a figure outside its range says, and which of them stop a run."""

import json
import math
import re

import pytest

from nrt_jax.config.run import RunConfig
from nrt_jax.training.diagnosis import Estimate
from nrt_jax.training.health import CHECKS, Diagnosis, examine, table

CONFIG = RunConfig.model_validate(
    {"model": {"path": "somewhere"}, "data": {"source": "chain_addition"}}
)

HEALTHY = {
    "trace/empty_share": Estimate(0.02),
    "trace/empty_other_share": Estimate(0.01),
    "trace/end_think_end_share": Estimate(0.6),
    "trace/end_other_share": Estimate(0.1),
    "trace/end_length_share": Estimate(0.3),
    "trace/tokens": Estimate(40.0),
    "trace/median_tokens": Estimate(38.0),
    "trace/entropy": Estimate(1.4),
    "reward/zero_std_share": Estimate(0.1),
    "reward/above_baseline_share": Estimate(0.4),
    "logprob/direct": Estimate(-1.5, -1.6, -1.4),
    "logprob/empty": Estimate(-1.55, -1.65, -1.45),
    "logprob/own": Estimate(-1.5, -1.6, -1.4),
    "logprob/shuffled": Estimate(-1.7, -1.8, -1.6),
    "logprob/empty_minus_direct": Estimate(-0.05, -0.08, -0.02),
    "logprob/own_minus_empty": Estimate(0.05, 0.02, 0.08),
    "logprob/shuffled_minus_empty": Estimate(-0.15, -0.2, -0.1),
    "logprob/own_minus_shuffled": Estimate(0.2, 0.1, 0.3),
    "weight/format_share": Estimate(0.03),
    "gradient/trace_share": Estimate(0.3),
    "gradient/token_share": Estimate(0.4),
    "gradient/format_share": Estimate(0.3),
}

OUTSIDE = [
    ("trace/empty_share", Estimate(0.3), "warn", ("model.new_rows_from", "warmup.train")),
    ("trace/empty_share", Estimate(0.6), "stop", ("model.new_rows_from", "warmup.train")),
    ("trace/end_other_share", Estimate(0.8), "warn", ("rollout.stop_tokens",)),
    ("trace/end_length_share", Estimate(1.0), "warn", ("rollout.max_trace_tokens",)),
    ("trace/tokens", Estimate(1.5), "warn", ("model.new_rows_from", "warmup.train")),
    ("trace/tokens", Estimate(0.6), "warn", ("model.new_rows_from", "warmup.train")),
    ("trace/median_tokens", Estimate(0.5), "stop", ("model.new_rows_from", "warmup.train")),
    ("trace/entropy", Estimate(0.001), "warn", ("rollout.temperature",)),
    ("reward/zero_std_share", Estimate(0.4), "warn", ("rollout.traces_per_prompt",)),
    ("reward/zero_std_share", Estimate(0.7), "stop", ("objective.estimator",)),
    ("reward/above_baseline_share", Estimate(0.0), "warn", ("objective.estimator",)),
    ("logprob/empty_minus_direct", Estimate(-2.0, -3.0, -1.0), "warn", ("model.new_rows_from",)),
    ("logprob/own_minus_empty", Estimate(-1.0, -1.5, -0.5), "warn", ("warmup.train",)),
    ("logprob/own_minus_shuffled", Estimate(0.1, -0.1, 0.3), "warn", ("nrt-jax diagnose",)),
    ("weight/format_share", Estimate(0.4), "warn", ("objective.scheme",)),
    ("gradient/trace_share", Estimate(0.001), "warn", ("objective.format_coefficient",)),
    ("gradient/token_share", Estimate(0.001), "warn", ("objective.ws_normalisation",)),
    ("gradient/format_share", Estimate(0.95), "warn", ("objective.format_where",)),
]


def test_a_healthy_model_has_no_findings():
    assert HEALTHY.keys() <= {check.figure for check in CHECKS}
    assert examine(HEALTHY, CONFIG) == []


@pytest.mark.parametrize(("figure", "estimate", "level", "named"), OUTSIDE)
def test_a_figure_outside_its_range_is_one_line_with_its_remedy(figure, estimate, level, named):
    (finding,) = examine(HEALTHY | {figure: estimate}, CONFIG)
    assert (finding.figure, finding.level) == (figure, level)
    assert "\n" not in finding.line
    assert "healthy: " in finding.line
    for name in named:
        assert name in finding.line


def test_every_range_has_a_case_above():
    with_range = {c.figure for c in CHECKS if c.low is not None or c.high is not None}
    assert with_range == {figure for figure, *_ in OUTSIDE}


def test_a_mean_is_outside_only_with_its_whole_interval():
    within = {"logprob/empty_minus_direct": Estimate(-0.5, -1.2, 0.2)}
    assert examine(HEALTHY | within, CONFIG) == []


def test_a_claim_needs_its_whole_interval():
    for low, proved in ((0.01, True), (-0.01, False)):
        findings = examine(
            HEALTHY | {"logprob/own_minus_shuffled": Estimate(0.2, low, 0.4)}, CONFIG
        )
        assert (findings == []) is proved


def test_only_weighted_schemes_have_weights_for_the_format():
    figures = HEALTHY | {"weight/format_share": Estimate(0.9)}
    plain = CONFIG.model_copy(
        update={"objective": CONFIG.objective.model_copy(update={"scheme": "am"})}
    )
    assert [finding.figure for finding in examine(figures, CONFIG)] == ["weight/format_share"]
    assert examine(figures, plain) == []


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_no_number_stops_the_run_and_is_all_that_is_found(value):
    figures = HEALTHY | {
        "logprob/direct": Estimate(value, value, value),
        "trace/empty_share": Estimate(0.9),
    }
    (finding,) = examine(figures, CONFIG)
    assert finding.level == "stop"
    assert f"log P(y*|x) is {value}" in finding.line
    assert "somewhere" in finding.line
    record = json.loads(Diagnosis("m", 2, 3, figures, [finding]).to_json())
    assert record["figures"]["logprob/direct"]["value"] is None


def test_remedies_name_keys_of_the_config():
    keys = {
        key
        for check in CHECKS
        for key in re.findall(r"\b([a-z]+\.[a-z_]+)(?=[=,) ]|$)", check.remedy)
    }
    assert "objective.format_where" in keys
    for key in keys:
        section, name = key.split(".")
        assert section in {*RunConfig.model_fields, "warmup"}, key
        if section in RunConfig.model_fields:
            assert name in RunConfig.model_fields[section].annotation.model_fields, key


def test_the_table_shows_values_intervals_ranges_and_marks():
    figures = HEALTHY | {
        "trace/empty_share": Estimate(0.81),
        "trace/tokens": Estimate(1.6),
    }
    diagnosis = Diagnosis("runs/x", 8, 4, figures, examine(figures, CONFIG))
    lines = table(diagnosis)
    assert lines[0].startswith("runs/x: 8 questions, 4 traces each")
    assert len(lines) == 1 + len(figures)

    def line(title: str) -> str:
        return next(line for line in lines if line.strip().startswith(title))

    assert re.fullmatch(r" *empty traces +81 % +at most 5 % +STOPS", line("empty traces"))
    assert re.search(r"trace +1.6 +at least 2.0 +outside$", line("tokens per trace"))
    assert "-1.550 [-1.650, -1.450]" in line("log P(y*|x, empty trace)")
    assert line("z - z of another").endswith("interval above 0")


def test_the_file_has_figures_ranges_and_findings():
    figures = HEALTHY | {"trace/empty_share": Estimate(0.81)}
    record = json.loads(Diagnosis("m", 8, 4, figures, examine(figures, CONFIG)).to_json())
    assert (record["questions"], record["traces_per_prompt"]) == (8, 4)
    assert record["figures"]["trace/empty_share"] == {
        "value": 0.81,
        "low": None,
        "high": None,
        "unit": "share",
        "healthy": [None, 0.05],
    }
    assert record["figures"]["logprob/direct"]["low"] == -1.6
    assert [(f["figure"], f["level"]) for f in record["findings"]] == [
        ("trace/empty_share", "stop")
    ]
