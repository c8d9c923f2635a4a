"""Real sets of every form, shown by their settings alone; docs/data.md lists the same settings."""

import json
import math
import re
from pathlib import Path

import pytest

from nrt_jax.cli import main
from nrt_jax.config.data import DataConfig
from nrt_jax.data.bad_rows import BadRow
from nrt_jax.data.training_rows import read_source, sources_of
from tests.training.runs import write_config_for_any_text

SETS: dict[str, tuple[dict[str, str], int, str, str]] = {
    "flan_cot": (
        {"source": "tsv", "columns": "[question, answer, rationale]", "unescape": "true"},
        13_529,
        "How much A is more than C if their ratio is 1/7:1/7:1/14?",
        "(C)",
    ),
    "t0_p3_sample": (
        {"preset": "prompt_completion", "strip_suffixes": "['<|endoftext|>']"},
        5_891,
        "Note that the answer is present within the text.",
        "subjective idealism",
    ),
    "oasst_sample": (
        {"preset": "oasst", "template": "tulu"},
        100,
        "How can I find the best 401k plan for my needs?",
        "The first step is to research your options",
    ),
    "self_instruct_human": (
        {
            "question_jinja": "{{ instruction }}{% if instances[0].input %}\n\n"
            "{{ instances[0].input }}{% endif %}",
            "answer_field": "instances[0].output",
        },
        175,
        "Is there anything I can eat for a breakfast that doesn't include eggs",
        "Yes, you can have 1 oatmeal banana protein shake",
    ),
    "nq_open": ({"preset": "nq_open"}, 1_000, "when was the last time anyone was", "14 December"),
    "hotpotqa_closed": ({}, 1_500, "Were Scott Derrickson and Ed Wood of the same", "yes"),
    "svamp": (
        {
            "question_jinja": "{{ Body }} {{ Question }}",
            "answer_jinja": "Answer.removesuffix('.0')",
        },
        300,
        "How much do you have to pay to buy each pack?",
        "51",
    ),
    "commonsenseqa": ({"preset": "commonsenseqa"}, 2_000, "(C) authoritarian", "A"),
    "aqua": (
        {
            "question_jinja": "{{ question }}{% for option in options %}\n{{ option }}{% endfor %}",
            "answer_field": "correct",
        },
        254,
        "B)6000",
        "A",
    ),
    "drop": (
        {"question_field": "context", "answer_jinja": "ref_text.split('|')"},
        1_504,
        "Question: How many countries supported Ethiopia?",
        "1",
    ),
    "webquestions/*.json": (
        {"question_field": "qText", "answer_field": "answers"},
        3_589,
        "what character did natalie portman play in star wars?",
        "Padmé Amidala",
    ),
    "truthfulqa/TruthfulQA.csv": (
        {
            "question_field": "Question",
            "answer_jinja": "[row['Best Answer']] + row['Correct Answers'].split('; ')",
        },
        200,
        "Where did fortune cookies originate?",
        "The precise origin of fortune cookies is unclear",
    ),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config_for_any_text(tmp_path_factory.mktemp("sets"))


@pytest.mark.parametrize("name", SETS)
def test_shown(name, config, shared_data, capsys):
    settings, _, question, answer = SETS[name]
    given = [f"data.{key}={value}" for key, value in settings.items()]
    tokenizer = config.parent / "tokenizer"
    limits = [f"data.max_{side}_tokens=9999" for side in ("prompt", "answer")]
    limits.append("rollout.max_response_tokens=10100")
    own = (f"data.path={shared_data / name}", f"data.tokenizer={tokenizer}", *limits)
    assert main(["data", "show", str(config), "data.source=null", *own, *given, "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert "left out" not in shown
    assert question in shown
    assert re.search(rf"^  y\* .*\[{re.escape(answer)}", shown, re.MULTILINE)


@pytest.mark.parametrize("name", SETS)
def test_every_row_is_read(name, shared_data):
    settings, count, _, _ = SETS[name]
    lists = {"columns": ("question", "answer", "rationale"), "strip_suffixes": ("<|endoftext|>",)}
    given = {key: lists.get(key, value) for key, value in settings.items()}
    (source,) = sources_of(DataConfig.model_validate({"path": shared_data / name, **given}))
    assert source.path is not None
    rows = [row.fields for row in read_source(source, source.path)]
    assert len(rows) == count
    assert not any(isinstance(row, BadRow) for row in rows)


@pytest.mark.slow  # compiles two updates per set
@pytest.mark.parametrize("name", SETS)
def test_two_steps_train(name, config, shared_data, tmp_path):
    """On what is short enough for a test; a file that trains must evaluate too."""
    settings, _, _, _ = SETS[name]
    given = [f"data.{key}={value}" for key, value in settings.items()]
    limits = ["max_prompt_tokens=600", "max_answer_tokens=300", "max_bad_share=0.99"]
    run = [f"run_dir={tmp_path / 'run'}", "train.steps=2", "rollout.max_response_tokens=310"]
    data = ["source=null", f"path={shared_data / name}", f"tokenizer={config.parent / 'tokenizer'}"]
    prompts = [f"train.{kind}_prompts=8" for kind in ("batch", "mini_batch", "micro_batch")]
    words = [*(f"data.{word}" for word in [*data, *limits]), *given, *prompts, *run]
    assert main(["train", str(config), *words, "evaluation.every_steps=2"]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in steps if "loss/total" in line] == [1, 2]
    assert all(math.isfinite(line["loss/total"]) for line in steps if "loss/total" in line)
