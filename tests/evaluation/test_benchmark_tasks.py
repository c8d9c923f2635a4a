"""Prompts and graders of the benchmarks: gold answers of real data score 1, wrong ones 0."""

import math

import pytest

from nrt_jax.evaluation.benchmark_data import task_manager
from nrt_jax.evaluation.tasks import BENCHMARKS, gsm8k, mmlu, truthfulqa


def load_task(name, shared_data):
    return task_manager(shared_data).load([name])["tasks"][name]


def score(task, doc, answer) -> float:
    """The primary metric of an answer to a document."""
    return task.process_results(doc, [answer])[BENCHMARKS[task.task_name].metric]


def test_gold_solutions_of_gsm8k_are_right_and_other_numbers_wrong(shared_data):
    task = load_task("gsm8k", shared_data)
    for doc in task.eval_docs:
        assert score(task, doc, f"We add and get 12 in all.\nThe answer is ${doc['gold']}.") == 1
        assert score(task, doc, f"#### {doc['gold']}\nBut no, it is 987654321.") == 0
        assert score(task, doc, "") == 0


@pytest.mark.parametrize("name", ["mmlu", "mmlu_summarize"])
def test_gold_letters_of_mmlu_are_right_and_others_wrong(shared_data, name):
    task = load_task(name, shared_data)
    form = "Therefore, the answer is " + ("({})" if name == "mmlu" else ": {}")
    for doc in task.eval_docs:
        for letter in mmlu.LETTERS:
            right = float(letter == doc["gold"])
            assert score(task, doc, f"(A) and (B) fail. {form.format(letter)}.") == right
        assert score(task, doc, "") == 0
    assert len({doc["group"] for doc in task.eval_docs[:57]}) == 57


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Therefore, the answer is (A). Wait. Therefore, the answer is (B)", "B"),
        ("Therefore, the answer is (A). Hence the answer is (C).", "A"),
        ("therefore the answer is C", "C"),
        ("Therefore, the answer is: D.", "D"),
        ("Answer is: b\nnot (C)", "B"),
        ("I think (B) is correct, not (A)", "B"),
        ("Of these (C) and (D)", "C"),
        ("It is A or B", "B"),
        ("Cats and Dogs", None),
        ("", None),
    ],
)
def test_patterns_of_mmlu_are_tried_in_order(text, letter):
    assert mmlu.letter(text) == letter


def test_mc2_is_the_share_of_the_true_choices():
    doc = {"labels": [1, 0, 1]}
    logprobs = [(math.log(p), False) for p in (0.2, 0.3, 0.1)]
    assert truthfulqa.process_results(doc, logprobs)["mc2"] == pytest.approx(0.5)
    far = [(logprob - 5000.0, False) for logprob, _ in logprobs]
    assert truthfulqa.process_results(doc, far)["mc2"] == pytest.approx(0.5)
    assert truthfulqa.process_results(doc, [(-math.inf, False)] * 3)["mc2"] == 0


def test_true_choices_of_truthfulqa_score_one_and_false_ones_zero(shared_data):
    task = load_task("truthfulqa", shared_data)
    for doc in task.eval_docs:
        for wanted in (1, 0):
            logprobs = [(-5.0 if label == wanted else -500.0, False) for label in doc["labels"]]
            assert task.process_results(doc, logprobs)["mc2"] == pytest.approx(wanted)
    ctx = task.fewshot_context(doc, 0)
    assert ctx.count("Q: ") == 7
    assert ctx.endswith(f"Q: {doc['question']}\nA:")


def test_requests_of_truthfulqa_join_question_and_choice_by_one_space(shared_data):
    task = load_task("truthfulqa", shared_data)
    task.build_all_requests(limit=1, apply_chat_template=True, chat_template=lambda turns, **_: "x")
    assert {request.args[1][:2].count(" ") for request in task.instances} == {1}
    assert gsm8k.prompt({"question": "How many?"}) == "Question: How many?\nAnswer:"
