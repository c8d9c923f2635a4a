"""The built-in task of long answers: right totals, held-out templates and numbers, its lengths."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nrt_jax.config.data import DataConfig
from nrt_jax.config.hard_tokens import HardTokensConfig
from nrt_jax.data.generators import generate_evaluation, generate_row
from nrt_jax.data.hard_tokens import (
    CLAUSES,
    COUNTS,
    FILLERS,
    NAMES,
    PEOPLE,
    TOPICS,
    answer_to,
    document,
    evaluation_examples,
    is_held_out,
    row,
    words,
    worked_steps,
)

TASK = HardTokensConfig()


def chains(question: str) -> list[tuple[str, list[int]]]:
    """Topic and numbers of each part, names as their places in NAMES."""
    parts = (part.split() for part in question.split(" ; "))
    return [
        (topic, [NAMES.index(word) if word in NAMES else int(word) for word in numbers])
        for topic, *numbers in parts
    ]


def template_of(question: str) -> str:
    return " ".join(topic for topic, _ in chains(question))


def numbers_of(question: str) -> str:
    return " ".join(str(number) for _, numbers in chains(question) for number in numbers)


def only(**share: float) -> HardTokensConfig:
    """A mixture of one kind of document."""
    none = dict.fromkeys(("worked_share", "nothing_share", "noise_share", "copy_share"), 0.0)
    return HardTokensConfig(**{**none, **share})


def parts(rest: str) -> tuple[str, str]:
    """The z and the answer of a document."""
    before, reasoning, answer = rest.split("|")
    assert before == ""
    return reasoning.strip(), answer.strip()


def test_the_worked_example():
    question = "rain 3 1 4 2 ; key ann 2 1 3 ; coins 7 7 0 5"
    steps = "rain 3 4 8 0 ; key ann cat dan gus ; coins 7 4 4 9"
    assert worked_steps(question) == steps
    answer = answer_to(TASK, question)
    assert answer.startswith("every night the rain filled 0 jars , as it was every spring , and")
    assert " . at last the key went to gus , " in answer
    assert " . the iron box still holds 9 coins , " in answer


@settings(deadline=None)
@given(
    tokens=st.integers(60, 200),
    values=st.integers(3, 8),
    hops=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
    index=st.integers(0, 2**31 - 2),
)
def test_rows_are_right_and_reproducible(tokens, values, hops, seed, index):
    task = HardTokensConfig(answer_tokens=tokens, hard_share=values / tokens, hops=hops)
    example = row(task, seed, index)
    assert task.values == values == len(chains(example.question))
    sentences = example.answer.removesuffix(" .").split(" . ")
    for (topic, numbers), sentence in zip(chains(example.question), sentences, strict=True):
        assert len(numbers) == hops + 1
        total = sum(numbers) % 10
        value = NAMES[total] if topic in PEOPLE else str(total)
        assert sentence.startswith({**COUNTS, **PEOPLE}[topic].format(value))
    assert set(f"{example.question} {example.answer}".split()) <= set(words())
    assert row(task, seed, index) == example


@pytest.mark.parametrize("tokens", [60, 80, 137, 200])
@pytest.mark.parametrize("values", [3, 5, 8])
def test_an_answer_has_the_length_nearest_to_the_one_asked_for(tokens, values):
    task = HardTokensConfig(answer_tokens=tokens, hard_share=values / tokens)
    lengths = {len(row(task, 0, i).answer.split()) for i in range(20)}
    possible = [values * (8 + 6 * clauses) for clauses in range(20)]
    assert lengths == {min(possible, key=lambda length: abs(length - tokens))}


def test_a_topic_has_one_sentence_but_for_its_value():
    sentences: dict[str, set[str]] = {}
    for i in range(300):
        example = row(TASK, 0, i)
        given = zip(chains(example.question), example.answer.split(" . "), strict=True)
        for (topic, numbers), sentence in given:
            total = sum(numbers) % 10
            value = NAMES[total] if topic in PEOPLE else str(total)
            words_around = sentence.removesuffix(" .").split()
            words_around[words_around.index(value)] = "{}"
            sentences.setdefault(topic, set()).add(" ".join(words_around))
    assert set(sentences) == set(TOPICS)
    assert all(len(variants) == 1 for variants in sentences.values()), sentences


def test_the_sentences_have_equal_lengths():
    assert {len(text.split()) for text in (*COUNTS.values(), *PEOPLE.values())} == {7}
    assert {len(text.split()) for text in CLAUSES} == {6}
    assert not set(NAMES) & set(" ".join((*COUNTS.values(), *PEOPLE.values(), *CLAUSES)).split())


def test_rows_do_not_depend_on_the_process():
    assert row(TASK, 0, 0).question == "song cat 8 6 0 ; boats 3 8 5 0 ; key hal 7 8 1"
    (held_out,) = evaluation_examples(TASK, 1, documents=False)
    assert held_out.question == "miles 6 0 8 2 ; ball eve 1 9 3 ; door eve 9 1 1"


def test_templates_and_numbers_of_the_evaluation_never_occur_in_training():
    # 3,000 draws of the 1,320 templates of three topics.
    task = HardTokensConfig(hops=1)
    train = [
        make(task, seed, i).question
        for make in (row, document)
        for seed in range(2)
        for i in range(750)
    ]
    for documents in (False, True):
        held_out = evaluation_examples(task, 200, documents=documents)
        questions = [example.question for example in held_out]
        assert len(set(questions)) == 200
        assert [example.index for example in held_out] == list(range(200))
        assert all(is_held_out(template_of(question)) for question in questions)
        assert all(is_held_out(numbers_of(question)) for question in questions)
    assert not any(is_held_out(template_of(question)) for question in train)
    assert not any(is_held_out(numbers_of(question)) for question in train)
    assert len(set(map(template_of, train))) > 800


def test_evaluation_answers_are_right():
    for example in evaluation_examples(TASK, 50, documents=False):
        assert example.answer == answer_to(TASK, example.question)


def test_documents_of_each_kind():
    for i in range(50):
        example = document(only(worked_share=1), 0, i)
        expected = worked_steps(example.question), answer_to(TASK, example.question)
        assert parts(example.answer) == expected

        example = document(only(nothing_share=1), 0, i)
        assert example.answer == f"| | {answer_to(TASK, example.question)}"

        reasoning, _ = parts(document(only(noise_share=1), 0, i).answer)
        assert 1 <= len(reasoning.split()) <= 17
        assert set(reasoning.split()) <= set(FILLERS)

        example = document(only(copy_share=1), 0, i)
        reasoning, _ = parts(example.answer)
        assert reasoning
        assert f" {reasoning} " in f" {example.question} "


def test_the_mixture_follows_its_shares_after_the_curriculum():
    task = HardTokensConfig(worked_rows=40)
    documents = [document(task, 0, i) for i in range(2040)]
    for example in documents[:40]:
        assert parts(example.answer)[0] == worked_steps(example.question)
    reasonings = [parts(example.answer)[0] for example in documents[40:]]
    assert abs(reasonings.count("") - 600) < 80
    noise = sum(set(text.split()) <= set(FILLERS) for text in reasonings if text)
    assert abs(noise - 400) < 80


def test_the_config_chooses_task_and_documents():
    def config(source: str) -> DataConfig:
        return DataConfig(source=source, eval_rows=3, seed=5)

    assert config("hard_tokens").generated_rows == TASK.rows
    assert generate_row(config("hard_tokens"), 7) == row(TASK, 5, 7)
    assert generate_row(config("hard_documents"), 7) == document(TASK, 5, 7)
    held_out = generate_evaluation(config("hard_tokens"))
    assert held_out == evaluation_examples(TASK, 3, documents=False)
    with_reasoning = generate_evaluation(config("hard_documents"))
    assert with_reasoning == evaluation_examples(TASK, 3, documents=True)
    assert not any(re.search(r"\|", example.answer) for example in held_out)
