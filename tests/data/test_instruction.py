"""Prompts with an instruction in the system turn, and templates that have no place for one."""

import json
from pathlib import Path

import pytest

from nrt_jax.config.data import DataConfig
from nrt_jax.data.instruction import INSTRUCTION, find_instruction, instructed_prompts
from nrt_jax.data.pipeline import load_dataset
from nrt_jax.data.task_tokenizers import write_quickstart_tokenizer
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError

# The quickstart's tokenizer spells digits alone.
NUMBERS = """{% for m in messages %}{{ {'system': '1', 'user': '2', 'assistant': '3'}[m.role] }}\
{{ m.content }}
{% endfor %}9"""
REFUSES = """{% for m in messages %}{% if m.role == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}{{ m.content }}{% endfor %}"""
DROPS = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    write_quickstart_tokenizer(tmp_path)
    return Tokenizer.load(tmp_path)


def config(folder: Path, template: str | None, **changes) -> DataConfig:
    file = folder / "template.jinja"
    if template is not None:
        file.write_text(template)
    chat = {"template": "tokenizer", "template_file": file}
    base = {
        "source": "chain_addition",
        "max_prompt_tokens": 12,
        **({} if template is None else chat),
    }
    return DataConfig.model_validate(base | changes)


def test_the_default_is_used_where_there_is_a_system_turn(tmp_path, tokenizer):
    assert find_instruction(None, config(tmp_path, NUMBERS), tokenizer) == INSTRUCTION
    assert find_instruction("0", config(tmp_path, NUMBERS), tokenizer) == "0"
    for template in (None, REFUSES, DROPS):
        assert find_instruction(None, config(tmp_path, template), tokenizer) == ""


@pytest.mark.parametrize("template", [None, NUMBERS, REFUSES, DROPS])
def test_an_empty_instruction_continues_the_prompt(template, tmp_path, tokenizer):
    assert find_instruction("", config(tmp_path, template), tokenizer) == ""


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "data.template=plain has no system turn"),
        (
            REFUSES,
            "there is no system turn (the chat template refuses the row: System role not "
            "supported)",
        ),
        (DROPS, "the chat template leaves a system turn out"),
    ],
)
def test_a_template_without_a_system_turn(template, why, tmp_path, tokenizer):
    with pytest.raises(InputError) as error:
        find_instruction("Think.", config(tmp_path, template), tokenizer)
    assert str(error.value) == (
        f"warmup.instruction='Think.': {why}; set warmup.instruction='' to let the model continue "
        "x freely, or a data.template that has a system turn"
    )


def rows(folder: Path, *fields: dict) -> dict:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in fields))
    return {"source": "jsonl", "path": path, "eval_rows": 0}


def test_the_instruction_stands_in_the_system_turn_of_the_rows_that_were_asked_for(
    tmp_path, tokenizer
):
    conversation = [
        {"role": "system", "content": "5"},
        {"role": "user", "content": "6"},
        {"role": "assistant", "content": "7"},
    ]
    data = config(
        tmp_path,
        NUMBERS,
        **rows(
            tmp_path,
            {"question": "4", "answer": "8"},
            {"question": "40", "answer": "80"},
            {"messages": conversation},
        ),
    )
    prompts = instructed_prompts(data, tokenizer, "0", [2, 0])
    bos = "<|bos|>"
    assert {n: tokenizer.decode(ids) for n, ids in prompts.items()} == {
        0: f"{bos}10\n24\n9",
        # A turn's own text stays, and white space joins the two: the tokenizer spells line breaks.
        2: f"{bos}15\n\n0\n26\n9",
    }
    # The prompts of training are those without it.
    plain = [tokenizer.decode(e.prompt_tokens) for e in load_dataset(data, tokenizer).train]
    assert plain == [f"{bos}24\n9", f"{bos}240\n9", f"{bos}15\n26\n9"]


def test_generated_rows(tmp_path, tokenizer):
    data = config(tmp_path, NUMBERS, chain={"digits": 3, "rows": 9}, eval_rows=0)
    train = load_dataset(data, tokenizer).train
    prompts = instructed_prompts(data, tokenizer, "0", [4])
    question = tokenizer.decode(train[4].prompt_tokens).removeprefix("<|bos|>")
    assert tokenizer.decode(prompts[4]) == f"<|bos|>10\n{question}"


def test_a_long_prompt_may_be_longer_by_the_instruction(tmp_path, tokenizer):
    row = {"question": "123456", "answer": "1"}
    data = config(tmp_path, NUMBERS, **rows(tmp_path, row), max_prompt_tokens=10)
    (prompt,) = instructed_prompts(data, tokenizer, "0" * 30, [0]).values()
    assert len(prompt) == 10 + 32
