"""Several sources in one run: how many rows of each, their names, and what is left out."""

import json

import pytest

from nrt_jax.config.rows import MixturePart
from nrt_jax.data.bad_rows import reasons_table, rejected_lines
from nrt_jax.data.instruction import instructed_prompts
from nrt_jax.data.mixture import mixture_counts
from nrt_jax.data.pipeline import load_dataset
from nrt_jax.data.show import show_rows
from nrt_jax.errors import InputError


def parts(*values: dict) -> list[MixturePart]:
    named = [{"name": f"s{i}", "path": "x.jsonl"} | value for i, value in enumerate(values)]
    return [MixturePart.model_validate(value) for value in named]


@pytest.mark.parametrize(
    ("weights", "available", "counts"),
    [
        ((1, 3), (100, 900), [100, 300]),
        ((1, 3), (900, 300), [100, 300]),
        ((0.7, 0.3), (700, 300), [700, 300]),
        ((0.1, 0.2, 0.7), (30, 30, 30), [4, 8, 30]),
        ((1000, 1), (10, 10), [10, 1]),
        # In floats 0.7 * (3 / 0.7) is less than 3.
        ((0.7, 0.7), (3, 3), [3, 3]),
    ],
)
def test_weights_give_the_largest_mixture_without_repeats(weights, available, counts):
    assert mixture_counts(parts(*({"weight": w} for w in weights)), available) == counts


def test_numbers_of_rows():
    assert mixture_counts(parts({"rows": 5}, {}), [9, 7]) == [5, 7]
    with pytest.raises(InputError) as caught:
        mixture_counts(parts({"rows": 10}, {}), [9, 7])
    assert str(caught.value) == (
        "data.mixture: the source s0 has 9 usable rows, fewer than rows=10; lower it"
    )


@pytest.fixture
def mixed(make_config, write_rows, tmp_path):
    """A config of two sources with fields of their own; each has one bad row."""
    first = write_rows([*({"question": f"{i}+0", "answer": f"={i}"} for i in range(8)), b"{"])
    second = tmp_path / "second.csv"
    second.write_text("ask,reply\n" + "".join(f"{i}+1,={i}\n" for i in range(4)) + "1,\n")
    named = {"name": "csv", "path": second, "question_field": "ask", "answer_field": "reply"}

    def make(**values):
        sources = [{"name": "lines", "path": first, "rows": 3}, named]
        given = {"mixture": sources, "eval_rows": 0, "max_bad_share": 0.3} | values
        return make_config(None, **given)

    return make


def test_each_row_keeps_its_source(mixed, tokenizer):
    dataset = load_dataset(mixed(), tokenizer)
    rows = [example.example for example in dataset.train]
    assert [row.source for row in rows] == ["lines"] * 3 + ["csv"] * 4
    assert [row.question for row in rows[3:]] == [f"{i}+1" for i in range(4)]
    # Numbers go through all rows of the mixture, whatever is drawn.
    assert [row.index for row in rows[3:]] == [10, 11, 12, 13]
    assert all(f"{row.index}+0" == row.question for row in rows[:3])
    again, other = (load_dataset(mixed(seed=seed), tokenizer).train for seed in (0, 7))
    assert [example.example for example in again] == rows
    assert [example.example for example in other] != rows


def test_rows_that_are_left_out_are_named(mixed, tokenizer, tmp_path):
    dataset = load_dataset(mixed(), tokenizer)
    assert dataset.bad_rows == {"bad JSON": 1, "empty 'reply'": 1}
    rejected = [json.loads(line) for line in rejected_lines(dataset.rejected).splitlines()]
    assert [(row["file"], row["row"], row["reason"]) for row in rejected] == [
        (f"{tmp_path}/rows.jsonl", "line 9", "bad JSON"),
        (f"{tmp_path}/second.csv", "line 6", "empty 'reply'"),
    ]
    assert rejected[1]["detail"] == "'reply' is ''; fill it in or drop the row"
    assert rejected[1]["excerpt"] == '{"ask": "1", "reply": ""}'
    assert reasons_table({"few": 1, "b": 1200, "a": 1200}) == ["1,200  a", "1,200  b", "    1  few"]


def test_too_many_bad_rows_of_one_source(mixed, tokenizer, tmp_path):
    with pytest.raises(InputError, match=rf"^{tmp_path}/second.csv: 1 of 5 rows are unusable"):
        load_dataset(mixed(max_bad_share=0.15), tokenizer)


def test_the_rows_of_each_source_are_shown(mixed, tokenizer):
    shown = list(show_rows(mixed(), tokenizer, reasons=False, rows=1, color=False))
    assert shown[0].startswith("lines + csv\n")
    assert [text.split("\n")[0] for text in shown[2:]] == ["lines line 1", "csv line 2"]


def test_files_of_one_source(make_config, write_rows, tokenizer, tmp_path):
    row = {"question": "1+2", "answer": "=3"}
    write_rows([row], "a.jsonl")
    write_rows([row, b"x"], "b.jsonl")
    config = make_config(None, path=tmp_path / "*.jsonl", eval_rows=0)
    with pytest.raises(InputError) as caught:
        load_dataset(config, tokenizer)
    assert str(caught.value).startswith(
        f"{tmp_path}/*.jsonl: 1 of 3 rows are unusable (1 bad JSON), more than data.max_bad_share="
        f"0.01; first {tmp_path}/b.jsonl line 2: 'x' is not JSON"
    )


def test_an_instruction_reaches_rows_of_every_source(mixed, tokenizer, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    config = mixed(template="tokenizer", template_file=template)
    prompts = instructed_prompts(config, tokenizer, "9", [1, 11])
    texts = {number: tokenizer.decode(ids) for number, ids in prompts.items()}
    assert texts == {1: "<|bos|>9\n1+0\n", 11: "<|bos|>9\n1+1\n"}
