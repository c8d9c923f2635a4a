"""What counts as an answer: cases by hand, and every row of real sets."""

import csv
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nrt_jax.config.evaluation import EXTRACTS, EvaluationConfig
from nrt_jax.config.load import Section, load_config
from nrt_jax.errors import InputError
from nrt_jax.evaluation.extract import make_extract

MINUS = "\u2212"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", "72"),
        ("He has 12 and then 72 apples.", "72"),
        ("1,234", "1234"),
        ("1,234,567.50", "2469135/2"),
        ("12,34", "34"),  # no thousands: two numbers
        ("1, 2", "2"),
        ("$5.00", "5"),
        ("US$1,000.", "1000"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("50%", "50"),
        ("5.", "5"),
        ("5.0.", "5"),
        (".5", "1/2"),
        ("0.50", "1/2"),
        ("1/2", "1/2"),
        ("-3/6", "-1/2"),
        ("\\frac{1}{2}", "1/2"),
        ("-\\dfrac{3}{4}", "-3/4"),
        ("10{,}000", "10000"),
        (f"{MINUS}3", "-3"),
        ("= -3", "-3"),
        ("3-5", "5"),
        ("(3)-5", "5"),
        ("10 - 4 = 6", "6"),
        ("01/04/1938", "1938"),
        ("6/0", "0"),
        ("2e3", "2000"),
        ("20 t of CO2", "20"),
        ("<<12/60=0.2>>0.2", "1/5"),
        ("none", None),
        ("", None),
        ("CO22", None),
        ("9" * 1000, None),
        ("1e999999999", "1"),
    ],
)
def test_last_number(text, number):
    assert make_extract("last_number").of_answer(text) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so $\\boxed{2}$.", "2"),
        ("\\boxed{3} or \\boxed{4}", "4"),
        ("\\fbox{5.0}", "5"),
        ("\\boxed{\\frac{1}{2}}", "1/2"),
        ("\\boxed{\\dfrac12}", "1/2"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\boxed{a \\fbox{b} c}", "a\\fbox{b}c"),
        ("\\boxed 9.", "9"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{\\left(3, \\frac{\\pi}{2}\\right)}", "(3,\\frac{\\pi}{2})"),
        ("\\boxed{x = 5}", "5"),
        ("\\boxed{12\\text{ cm}^2}", "12"),
        ("\\boxed{90^\\circ}", "90"),
        ("\\boxed{\\$1{,}000}", "1000"),
        ("\\boxed{10\\%}", "10"),
        (f"\\boxed{{{MINUS}2\\sqrt3}}", f"{MINUS}2\\sqrt{{3}}"),
        ("\\boxed{\\text{yes}}", "yes"),
        ("\\boxed{1} and \\boxed{2", "1"),
        ("\\boxed{2", None),
        ("\\boxed{}", None),
        ("\\boxedx{1}", None),
        ("2", None),
        ("\\boxed{" * 5000 + "1" + "}" * 5000, "1"),
    ],
)
def test_boxed(text, answer):
    assert make_extract("boxed").of_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        (" b) ", "B"),
        ("**B**", "B"),
        ("\uff08B\uff09", "B"),
        ("answer: b", "B"),
        ("Answer: (C)", "C"),
        ("ANSWER - D", "D"),
        ("The answer is A because B is wrong", "A"),
        ("The answer is A. No, the answer is B.", "B"),
        ("The correct option is (b).", "B"),
        ("The answer is \\textbf{E}", "E"),
        ("$\\boxed{\\text{(A)}}$", "A"),
        ("B) 42", "B"),
        ("A) 21\nB) 22\n\nC", "C"),
        ("A)Rs.16", "A"),
        ("As (a) and (b) fail, (c)", "C"),
        ("I think it is C", "C"),
        ("It is A", "A"),
        ("I", "I"),
        ("The answer is a dog", None),
        ("A cat", None),
        ("I think so", None),
        ("K", None),
        ("none", None),
        ("", None),
    ],
)
def test_choice(text, letter):
    assert make_extract("choice").of_answer(text) == letter


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("x = 72\n#### 72", "72"),
        ("#### 1\n#### $1,000.", "1000"),
        ("####\n\n  blue whale. \nmore", "blue whale"),
        ("#### **5.0**", "5"),
        ("####", None),
        ("### 72", None),
    ],
)
def test_after(text, answer):
    assert make_extract("after:####").of_answer(text) == answer
    assert make_extract("after: #### ").of_answer(text) == answer


def test_any_of():
    extract = make_extract("any_of")
    assert extract.is_right("the u.s.\n", ["United States", "US"])
    assert extract.is_right("\u201cBob\u201d Russell", ["Bob Russell"])
    assert extract.is_right("1,000", ["1000", "a thousand"])
    assert extract.is_right("The The", ["the the"])
    assert not extract.is_right("5.0", ["50"])
    assert not extract.is_right("-5", ["5"])
    assert not extract.is_right("Bob", ["Bob Russell"])
    assert not extract.is_right("", ["", "a"])
    assert not extract.is_right("Bob", [])


def test_whole():
    extract = make_extract("whole")
    assert extract.is_right(" 3\n", ["3 "])
    assert not extract.is_right("3.0", ["3"])


def test_a_reference_may_be_the_bare_answer():
    assert make_extract("boxed").is_right("\\boxed{\\frac12}", ["0.5"])
    assert make_extract("after:####").is_right("#### 72", ["72"])
    assert make_extract("choice").is_right("(B) blue", ["B"])
    assert not make_extract("last_number").is_right("72", ["seventy-two"])
    assert not make_extract("choice").is_right("(B)", ["none"])


@given(text=st.text())
@pytest.mark.parametrize("name", [*EXTRACTS, "after:a"])
def test_any_text(name, text):
    """Nothing fails, and what is found in a text is right with the text as the reference."""
    extract = make_extract(name)
    assert extract.is_right(text, [text]) == (extract.of_answer(text) is not None)


@pytest.mark.parametrize("name", [*EXTRACTS, "after:a"])
@pytest.mark.parametrize(
    "piece", ["answer ", " ", "1,", "-", "1/", "\\boxed ", "\\text{ ", "{", "}", "A ", "(", "$ "]
)
def test_long_texts_take_no_long_time(name, piece):
    start = time.process_time()
    make_extract(name).of_answer("answer" + piece * 5000 + "x")
    assert time.process_time() - start < 2


# --- the config ----------------------------------------------------------------------------------


class Run(Section):
    evaluation: EvaluationConfig


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("last_numbr", "; did you mean 'last_number'?"),
        ("Boxed", "; did you mean 'boxed'?"),
        ("aftr:####", "; did you mean 'after:TEXT'?"),
        ("anything", "must be one of whole, last_number, boxed, choice, any_of, after:TEXT"),
        ("after:", "needs the text in front of the answer, as in after:####"),
        ("'after:  '", "needs the text in front of the answer, as in after:####"),
        ("after", "needs the text in front of the answer, as in after:####"),
    ],
)
def test_values_that_are_none(value, said):
    with pytest.raises(InputError) as caught:
        load_config(Run, [], [f"evaluation.extract={value}"])
    assert str(caught.value).startswith("override evaluation.extract")
    assert said in str(caught.value)


@pytest.mark.parametrize("value", [*EXTRACTS, "after:####", "after:The answer is", "after: 5"])
def test_values(value):
    config = load_config(Run, [], [f"evaluation.extract={value}"])
    assert config.evaluation.extract.replace(" ", "") == value.replace(" ", "")
    assert make_extract(config.evaluation.extract).name == config.evaluation.extract


# --- real sets -----------------------------------------------------------------------------------


def rows(path) -> list[dict]:
    """Of a file that is JSON, or one JSON object per line."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if text[0] == "[" else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("part", ["train", "test"])
def test_gsm8k(part, shared_data):
    number, line = make_extract("last_number"), make_extract("after:####")
    for row in rows(shared_data / "gsm8k" / f"{part}.jsonl"):
        worked, _, final = row["answer"].rpartition("####")
        for extract, said in ((number, f"So it is ${final.strip()}.00."), (line, row["answer"])):
            assert extract.is_right(said, [row["answer"]]), row
        assert not line.is_right(worked, [row["answer"]])
        assert number.of_reference(row["answer"]) == line.of_reference(row["answer"])


def test_math(shared_data):
    extract = make_extract("boxed")
    for row in rows(shared_data / "math_test" / "test.jsonl"):
        assert extract.is_right(row["solution"], [row["solution"]]), row
    wrong = 0
    for row in rows(shared_data / "math_train" / "math.json"):
        if row["answer"]:
            assert extract.is_right(f"so $\\boxed{{{row['answer']}}}$.", [row["answer"]]), row
            wrong += extract.is_right("\\boxed{12345678}", [row["answer"]])
    assert wrong == 0


def test_aqua(shared_data):
    extract = make_extract("choice")
    found = 0
    for row in rows(shared_data / "aqua" / "dev.json"):
        for letter, option in zip("ABCDE", row["options"], strict=True):
            assert extract.of_answer(option) == letter
            assert extract.is_right(f"The answer is ({letter}).", [row["correct"]]) == (
                letter == row["correct"]
            )
        # Some of the explanations name no letter; all that do name the right one.
        named = extract.of_answer(row["rationale"])
        assert named in (None, row["correct"]), row
        found += named is not None
    assert found > 230


def test_commonsenseqa(shared_data):
    extract = make_extract("choice")
    for row in rows(shared_data / "commonsenseqa" / "train_rand_split.jsonl"):
        for option in row["question"]["choices"]:
            said = f"({option['label']}) {option['text']}"
            assert extract.is_right(said, [row["answerKey"]]) == (
                option["label"] == row["answerKey"]
            )


def test_mmlu(shared_data):
    extract = make_extract("choice")
    for path in sorted((shared_data / "mmlu" / "dev").glob("*.csv")):
        for row in csv.reader(path.open(encoding="utf-8")):
            text = row[1 + "ABCD".index(row[5])]
            assert extract.is_right(f"{row[5]}. {text}", [row[5]]), row
            assert extract.is_right(f"answer: {row[5].lower()}", [row[5]])


def test_bbh(shared_data):
    extract = make_extract("choice")
    for row in rows_of_bbh(shared_data / "bbh/bbh/date_understanding.json"):
        assert extract.is_right(f"So the answer is {row['target']}.", [row["target"]])


def rows_of_bbh(path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["examples"]


def test_svamp(shared_data):
    extract = make_extract("last_number")
    for row in rows(shared_data / "svamp" / "SVAMP.json"):
        assert extract.is_right(f"The answer is {int(row['Answer']):,}.", [str(row["Answer"])])


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("nq_open/NQ-open.dev.jsonl", "answer"),
        ("popqa/popqa_test.json", "aliases"),
        ("webquestions/val.json", "answers"),
    ],
)
def test_aliases(path, field, shared_data):
    extract = make_extract("any_of")
    every = [row[field] for row in rows(shared_data / path)]
    for aliases, others in zip(every, [*every[1:], every[0]], strict=True):
        for alias in aliases:
            assert extract.is_right(f" {alias}\n", aliases), alias
        same = set(map(extract.of_reference, aliases)) & set(map(extract.of_reference, others))
        assert any(extract.is_right(other, aliases) for other in others) == bool(same)
