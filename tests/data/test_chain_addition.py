"""The built-in task: right sums, reproducible rows, no question in both training and evaluation."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nrt_jax.config.data import ChainConfig
from nrt_jax.data.chain_addition import (
    NOISE_SYMBOLS,
    addition,
    document,
    evaluation_examples,
    is_held_out,
    running_totals,
)
from nrt_jax.errors import InputError

CHAIN = ChainConfig()


def reference_totals(question: str, modulus: int) -> list[int]:
    """Left to right in plain steps, reduced after each one."""
    first, *rest = re.findall(r"\d", question)
    value, totals = int(first), []
    for digit in rest:
        value = (value + int(digit)) % modulus
        totals.append(value)
    return totals


def only(**share: float) -> ChainConfig:
    """A mixture of one kind of document."""
    none = {f"{kind}_share": 0.0 for kind in ("totals", "nothing", "noise", "copy")}
    return ChainConfig(**{**none, **share})


def parts(rest: str) -> tuple[str, str]:
    """The z and the answer of a document."""
    before, reasoning, answer = rest.split("\n")
    assert before == ""
    return reasoning, answer


def test_the_worked_example():
    assert running_totals("3+1+4+0+2+2+1", 5) == "433023"


@settings(deadline=None)
@given(
    digits=st.integers(3, 12),
    modulus=st.integers(2, 10),
    seed=st.integers(0, 2**32 - 1),
    index=st.integers(0, 2**31 - 2),
)
def test_rows_are_right_and_reproducible(digits, modulus, seed, index):
    chain = ChainConfig(digits=digits, modulus=modulus)
    row = addition(chain, seed, index)
    assert re.fullmatch(rf"\d(\+\d){{{digits - 1}}}", row.question)
    assert all(int(digit) < modulus for digit in row.question.split("+"))
    totals = reference_totals(row.question, modulus)
    assert running_totals(row.question, modulus) == "".join(map(str, totals))
    assert row.answer == f"={sum(map(int, row.question.split('+'))) % modulus}"
    assert row.index == index
    assert addition(chain, seed, index) == row


def test_rows_do_not_depend_on_the_process():
    assert [addition(CHAIN, 0, i).question for i in range(2)] == [
        "4+3+2+1+1+0+0",
        "4+2+0+1+3+2+3",
    ]
    held_out = [row.question for row in evaluation_examples(CHAIN, 2, documents=False)]
    assert held_out == ["2+4+4+2+1+4+1", "2+1+3+3+4+3+1"]


def test_rows_differ_by_seed_and_index():
    rows = [addition(CHAIN, seed, i).question for seed in range(3) for i in range(100)]
    assert len(set(rows)) > 290


def test_all_digits_are_drawn_about_equally_often():
    digits = "".join(addition(CHAIN, 1, i).question for i in range(1000)).replace("+", "")
    counts = Counter(digits)
    assert set(counts) == set("01234")
    assert all(1300 < count < 1500 for count in counts.values())


@pytest.mark.parametrize("documents", [False, True])
def test_evaluation_questions_never_occur_in_training(documents):
    # A space of 5^4 = 625 questions, of which 4,000 draws see nearly all of the training share.
    chain = ChainConfig(digits=4)
    make = document if documents else addition
    train = {make(chain, seed, i).question for seed in range(4) for i in range(1000)}
    held_out = evaluation_examples(chain, 50, documents=documents)
    questions = {row.question for row in held_out}
    assert len(questions) == 50
    assert [row.index for row in held_out] == list(range(50))
    assert not questions & train
    assert len(train) > 500


def test_one_question_in_eight_is_held_out():
    questions = ["+".join(f"{i:05d}") for i in range(8000)]
    assert 900 < sum(map(is_held_out, questions)) < 1100


def test_evaluation_answers_are_right():
    for row in evaluation_examples(CHAIN, 100, documents=False):
        assert is_held_out(row.question)
        assert row.answer == f"={reference_totals(row.question, 5)[-1]}"


def test_too_few_questions_to_evaluate_or_to_train_on():
    with pytest.raises(InputError) as caught:
        evaluation_examples(ChainConfig(digits=3), 100, documents=False)
    assert re.fullmatch(
        r"data\.eval_rows: 100 is more than the held-out questions of chain\.digits=3 "
        r"chain\.modulus=5 \(found \d+\); lower data\.eval_rows or raise data\.chain\.digits",
        str(caught.value),
    )


def test_documents_of_each_kind():
    for i in range(50):
        row = document(only(totals_share=1), 0, i)
        totals = "".join(map(str, reference_totals(row.question, 5)))
        assert parts(row.answer) == (totals, f"={totals[-1]}")

        row = document(only(nothing_share=1), 0, i)
        assert row.answer == f"\n\n={reference_totals(row.question, 5)[-1]}"

        row = document(only(noise_share=1), 0, i)
        reasoning, answer = parts(row.answer)
        assert 1 <= len(reasoning) <= 14
        assert set(reasoning) <= set(NOISE_SYMBOLS)
        assert answer == f"={reference_totals(row.question, 5)[-1]}"

        row = document(only(copy_share=1), 0, i)
        reasoning, answer = parts(row.answer)
        assert reasoning
        assert reasoning in row.question
        assert answer == f"={reference_totals(row.question, 5)[-1]}"


def test_noise_and_copies_take_every_length():
    noise = {len(parts(document(only(noise_share=1), 0, i).answer)[0]) for i in range(400)}
    assert noise == set(range(1, 15))
    copies = {len(parts(document(only(copy_share=1), 0, i).answer)[0]) for i in range(1500)}
    assert copies == set(range(1, 14))


def kind_of(rest: str) -> str:
    reasoning, _ = parts(rest)
    if not reasoning:
        return "nothing"
    if set(reasoning) <= set(NOISE_SYMBOLS):
        return "noise"
    return "totals" if len(reasoning) == 6 and "+" not in reasoning else "copy"


def test_the_mixture_follows_its_shares():
    counts = Counter(kind_of(document(CHAIN, 0, i).answer) for i in range(2000))
    expected = {"totals": 600, "nothing": 600, "noise": 400, "copy": 400}
    assert all(abs(counts[kind] - count) < 80 for kind, count in expected.items()), counts


def test_the_curriculum_comes_first_and_ends():
    chain = ChainConfig(totals_rows=40)
    kinds = [kind_of(document(chain, 0, i).answer) for i in range(140)]
    assert set(kinds[:40]) == {"totals"}
    assert set(kinds[40:]) == {"totals", "nothing", "noise", "copy"}
    evaluation = evaluation_examples(ChainConfig(totals_rows=1000), 100, documents=True)
    assert {kind_of(row.answer) for row in evaluation} == {"totals", "nothing", "noise", "copy"}
