"""Rows on a terminal: decoded from the ids of training, and read no further than asked."""

import re

import pytest

from nrt_jax.data import pipeline, show
from nrt_jax.data.merge import merge
from nrt_jax.data.prepare import prepare
from nrt_jax.data.show import show_rows
from nrt_jax.data.tokenizer import Tokenizer

GOOD = {"question": "1+2", "answer": "=3"}
LEGEND = """
  x        the prompt            no loss
  t_start  opens the trace       format term
  z        the trace             trace term
  t_end    closes the trace      format term
  y*       the reference answer  token term
  eos      ends the sequence     token term
"""
SFT_LEGEND = """
  x        the prompt            no loss
  y*       the reference answer  cross-entropy
  eos      ends the sequence     cross-entropy
"""


def lines(config, tokenizer, rows=3, *, reasons=True, color=False) -> list[str]:
    return list(show_rows(config, tokenizer, reasons=reasons, rows=rows, color=color))


def test_a_plain_row(make_config, write_rows, tokenizer):
    path = write_rows([GOOD, {"question": "1\n+2\n", "answer": "=3"}, GOOD])
    head, legend, first, second = lines(make_config(path=path), tokenizer, rows=2)
    assert head == f"{path}\ntemplate plain"
    assert legend == LEGEND
    assert first == (
        "line 1\n"
        "  x            4  [<|bos|>⟨1⟩1+2]\n"
        "  t_start      1  [<|think_start|>⟨4⟩]\n"
        "  z            ?  ⟨trace, sampled⟩\n"
        "  t_end        1  [<|think_end|>⟨5⟩]\n"
        "  y*           2  [=3]\n"
        "  eos          1  [<|eos|>⟨2⟩]\n"
    )
    assert second.split("\n")[:3] == [
        "line 2",
        "  x            6  [<|bos|>⟨1⟩1↵",
        "                  +2↵]",
    ]


def test_a_row_that_answers_at_once(make_config, write_rows, tokenizer):
    config = make_config(path=write_rows([GOOD]))
    _, legend, row = lines(config, tokenizer, reasons=False)
    assert legend == SFT_LEGEND
    assert row == (
        "line 1\n"
        "  x            4  [<|bos|>⟨1⟩1+2]\n"
        "  y*           2  [=3]\n"
        "  eos          1  [<|eos|>⟨2⟩]\n"
    )


def test_colors(make_config, write_rows, tokenizer):
    config = make_config(path=write_rows([GOOD, {"question": "1"}]))
    colored = lines(config, tokenizer, color=True)
    styles = {part.color for part in (show.X, show.Z, show.Y, show.EOS, show.T_START)}
    assert len(styles) == 5
    assert all(style in colored[2] for style in styles)
    assert f"{show.Y.color}=3{show.RESET}" in colored[2]
    for text, bare in zip(colored, lines(config, tokenizer), strict=True):
        without = re.sub("\x1b\\[[0-9]+m", "", text)
        assert "\x1b" not in without
        assert without == re.sub(r"  \[(.*)\]\n", r"  \1\n", bare)


def test_bad_rows_stand_among_the_others(make_config, write_rows, tokenizer):
    config = make_config(path=write_rows([{"question": ""}, b"{", GOOD]))
    _, _, *rows = lines(config, tokenizer)
    assert rows[0] == (
        "line 1\n  left out  empty 'question': 'question' is ''; fill it in or drop the row\n"
    )
    assert rows[1].startswith("line 2\n  left out  bad JSON: ")
    assert rows[2].startswith("line 3\n  x ")


def test_what_a_terminal_would_obey_is_escaped(made, write_rows, make_config):
    question = "\x1b[31mred\x1b[0m\ttab\r\u202e"
    config = make_config(path=write_rows([{"question": question, "answer": "3"}]))
    *_, row = lines(config, made("llama3"))
    assert r"⟩\x1b[31mred\x1b[0m\ttab\r\u202e]" in row
    assert not re.search(r"[\x1b\t\r\u202e]", row)


# Not "always": there the ids of "3" and " 3" are the same.
@pytest.mark.parametrize("kind", ["llama3", "prepend", "first"])
def test_texts_are_shown_as_they_were(kind, made, config, write_rows):
    """After a control token some tokenizers keep a space that others take away."""
    path = write_rows([{"question": "  a b", "answer": " 3"}])
    run = config("mistral").model_copy(update={"source": "jsonl", "path": path})
    *_, row = lines(run, made(kind))
    assert "   a b" in row.split("\n")[1]
    assert re.search(r"^  y\* .*\[ 3\]$", row, re.MULTILINE)


def test_counts_are_those_of_training(made, make_config, write_rows):
    tokenizer = made("prepend")
    config = make_config(path=write_rows([{"question": "a", "answer": "b"}]), eval_rows=0)
    (example,) = pipeline.load_dataset(config, tokenizer).train
    shown = lines(config, tokenizer)[-1]
    counts = re.findall(r"^  \S+ +(\d+)  ", shown, re.MULTILINE)
    prompt, answer = len(example.prompt_tokens), len(example.answer_tokens)
    assert counts == [str(n) for n in (prompt, 1, 1, answer - 1, 1)]


def test_prepared_data_show_their_sources(tokenizer, write_rows, make_config, tmp_path):
    rows = [{"question": f"{i}+1", "answer": "=3", "of": f"{i % 3 == 0}"} for i in range(6)]
    config = make_config(path=write_rows(rows), source_field="of", eval_rows=0, licence="MIT")
    merge(prepare(config, tokenizer, tmp_path / "out", workers=1, share=(0, 1)), 1)
    run = config.model_copy(update={"path": tmp_path / "out", "source": None})
    table = [line.split() for line in lines(run, tokenizer)[2].splitlines()]
    assert table[2:4] == [["False", "4", "66.67%", "MIT"], ["True", "2", "33.33%", "MIT"]]


@pytest.mark.parametrize("source", ["jsonl", "chain_documents"])
def test_no_more_is_read_than_is_shown(source, make_config, write_rows, tokenizer, monkeypatch):
    encoded = []
    encode = Tokenizer.encode_batch

    def counted(self, texts, **options):
        texts = list(texts)
        encoded.extend(texts)
        return encode(self, texts, **options)

    monkeypatch.setattr(Tokenizer, "encode_batch", counted)
    values = {"path": write_rows([GOOD] * 5000)} if source == "jsonl" else {}
    assert len(lines(make_config(source, **values), tokenizer, rows=3)) == 2 + 3
    assert len(encoded) == 6
