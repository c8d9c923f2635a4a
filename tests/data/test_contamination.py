"""Rows that ask a question of a benchmark are left out, by n-grams; others are not."""

import json

import pytest
from pydantic import ValidationError

from nrt_jax.config.data import DataConfig
from nrt_jax.data.contamination import Contamination
from nrt_jax.data.pipeline import load_dataset
from nrt_jax.errors import InputError

TRAIN = "A train leaves Bonn at 3 and reaches Paris at 9; how long did it travel?"
"""16 words."""
CAPITAL = "What is the capital of Peru?"


@pytest.fixture
def found(write_rows):
    """Whether a prompt is one of a benchmark's questions, and what is said about it."""

    def find(prompt: str, *questions: str, **settings) -> str | None:
        benchmark = write_rows([{"question": question} for question in questions], "bench.jsonl")
        config = DataConfig(path="unread.jsonl", contamination=[benchmark], **settings)
        result = Contamination(config).find([{"role": "user", "content": prompt}])
        return None if result is None else result.detail.replace(f"{benchmark} ", "")

    return find


@pytest.mark.parametrize(
    ("prompt", "share"),
    [
        (TRAIN, 100),
        (f"Solve this.\n{TRAIN.upper()}\nThink first.", 100),  # case, and text around it
        (TRAIN.replace(";", " -").replace(" at 9", "\nat 9"), 100),  # punctuation, white space
        # Eight words, then one other, then seven: one run of eight, half of the words.
        (TRAIN.replace("Paris", "Rome"), None),
        (TRAIN.replace("and", "but"), 56),  # a run of nine after it
        (TRAIN.replace("Bonn", "Rome").replace("at 9", "at 8"), None),  # no run of eight
        ("Where does the train to Paris leave, and how long did it travel?", None),
    ],
)
def test_more_than_half_of_the_words(prompt, share, found):
    said = f"{share}% of the words of line 2 (data.contamination) stand in the prompt in runs of 8"
    assert found(prompt, CAPITAL, TRAIN) == (None if share is None else said)


def test_words_of_several_questions_are_not_added_up(found):
    """Half of one and half of another is no contamination by either."""
    one, other = (" ".join(f"{name}{i}" for i in range(16)) for name in "ab")
    assert found(" ".join([*one.split()[:8], *other.split()[:8]]), one, other) is None
    assert "56% of the words of line 2" in found(" ".join(other.split()[:9]), one, other)
    ends = f"{' '.join(one.split()[-4:])} {' '.join(other.split()[:4])}"
    assert found(ends, one, other, contamination_share=0) is None, "a run of two questions"


def test_the_rule_of_gpt_3(found):
    """Any run of 13 words; 12 are none."""
    words = [f"w{i}" for i in range(60)]
    rule = {"contamination_ngram": 13, "contamination_share": 0}
    assert found(" ".join(words[20:33]), " ".join(words), **rule).startswith("22% of the words")
    assert found(" ".join(words[20:32]), " ".join(words), **rule) is None
    assert found(" ".join(words[20:33]), " ".join(words)) is None


@pytest.mark.parametrize(
    ("prompt", "same"),
    [
        (CAPITAL, True),
        ("what is  the capital\nof Peru", True),
        (f"{CAPITAL} Answer in one word.", False),
        ("What is the capital of Chile?", False),
        ("What is the capital of", False),
    ],
)
def test_a_question_too_short_for_a_run(prompt, same, found):
    assert found(prompt, "?", CAPITAL) == (
        "asks the question of line 2 (data.contamination)" if same else None
    )
    assert found("1-2", "1+2") is None, "a sum is no difference"


def test_rows_are_left_out_and_named(make_config, write_rows, tokenizer):
    """They count towards no share of bad rows, and the answer does not matter."""
    path = write_rows([{"question": f"{i}+1", "answer": "=1"} for i in range(4)])
    benchmark = write_rows([{"question": "2+1"}, {"question": "0+1"}], "bench.jsonl")
    config = make_config(path=path, eval_rows=0, contamination=str(benchmark), max_bad_share=0)
    dataset = load_dataset(config, tokenizer)
    assert [row.example.index for row in dataset.train] == [1, 3]
    assert dataset.bad_rows == {"question of a benchmark": 2}
    first, _ = dataset.rejected
    assert (first.row, first.excerpt) == ("line 1", '{"question": "0+1", "answer": "=1"}')
    assert first.detail == f"asks the question of {benchmark} line 2 (data.contamination)"
    every = write_rows([{"question": f"{i}+1"} for i in range(4)], "every.jsonl")
    config = config.model_copy(
        update={"contamination": make_config(path=path, contamination=[every]).contamination}
    )
    with pytest.raises(InputError, match=r"4 of 4 rows are left out \(4 question of a benchmark\)"):
        load_dataset(config, tokenizer)


def test_turns_before_the_answer_are_compared(make_config, write_rows, tokenizer):
    turns = [("user", "9+9"), ("assistant", "=8"), ("user", "1+2"), ("assistant", "=3")]
    rows = [
        {"messages": [{"role": role, "content": content} for role, content in part]}
        for part in (turns, turns[:2], [("user", "=3"), ("assistant", "9+9")])
    ]
    benchmark = write_rows([{"question": "1+2"}, {"question": "9+8"}], "bench.jsonl")
    config = make_config(
        path=write_rows(rows), eval_rows=0, template="tulu", contamination=[benchmark]
    )
    dataset = load_dataset(config, tokenizer)
    assert [row.example.index for row in dataset.train] == [1, 2]


def test_benchmarks_of_any_form(tmp_path):
    """Each with settings of its own, those of the training rows aside."""
    (tmp_path / "a.csv").write_text(f"{CAPITAL},Lima,A\n")
    choices = {"label": ["A", "B"], "text": ["x", "y"]}
    row = {"question": "Which?", "choices": choices, "answerKey": "A"}
    (tmp_path / "b.jsonl").write_text(json.dumps(row))
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    (tmp_path / "c.json").write_text(json.dumps([{"messages": turns}]))
    benchmarks = [
        {"path": tmp_path / "a.csv", "columns": ["ask", "x", "answer"], "question_field": "ask"},
        {"path": tmp_path / "b.jsonl", "preset": "commonsenseqa"},
        {"path": tmp_path / "c.json", "preset": "messages"},
    ]
    config = DataConfig(path="x.jsonl", question_field="prompt", contamination=benchmarks)
    contamination = Contamination(config)
    for asked in (CAPITAL, "Which?\n(A) x\n(B) y", "Who?"):
        assert contamination.find([{"role": "user", "content": asked}]) is not None, asked
    assert contamination.find([{"role": "user", "content": "Which?"}]) is None


def test_a_benchmark_is_read_whole(make_config, write_rows, tokenizer):
    """Settings that choose training rows choose none of its rows."""
    path = write_rows([{"question": f"{i}+1", "answer": "=1", "of": "a"} for i in range(6)])
    benchmark = write_rows([{"question": f"{i}+1"} for i in (1, 4)], "bench.jsonl")
    choice = {"permutation_seed": 0, "source_field": "of", "source_rows": {"a": 3}}
    config = make_config(
        path=path, eval_rows=0, contamination=[benchmark], max_bad_share=0.5, **choice
    )
    dataset = load_dataset(config, tokenizer)
    assert {row.example.index for row in dataset.train} <= {0, 2, 3, 5}
    assert dataset.bad_rows == {"question of a benchmark": 2}


def test_benchmarks_that_cannot_be_read(tmp_path, write_rows):
    def refused(path, **settings) -> str:
        with pytest.raises(InputError) as caught:
            Contamination(
                DataConfig(path="x.jsonl", contamination=[{"path": str(path), **settings}])
            )
        return str(caught.value)

    assert refused(tmp_path / "none.jsonl") == (
        f"a benchmark of data.contamination: {tmp_path}/none.jsonl: No such file or directory; set "
        "data.contamination to a file"
    )
    path = write_rows([{"question": CAPITAL}])
    assert "1 of 1 rows are unusable (1 without 'ask'), none is left; first line 1" in refused(
        path, question_field="ask"
    )
    with pytest.raises(ValidationError, match="a benchmark needs files; set its path"):
        DataConfig(path="x.jsonl", contamination=[{"question_field": "q"}])
    with pytest.raises(
        ValidationError, match="a benchmark cannot be prepared data; name the files"
    ):
        DataConfig(path="x.jsonl", contamination=[{"path": str(path), "source": "prepared"}])
    with pytest.raises(ValidationError, match="source 'chain_addition' generates its rows; leave"):
        DataConfig(source="chain_addition", contamination=[str(path)])
