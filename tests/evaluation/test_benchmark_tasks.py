"""Prompts and graders of the benchmarks: gold answers of real data score 1, wrong ones 0."""

import json
import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nrt_jax.evaluation.benchmark_data import task_manager
from nrt_jax.evaluation.tasks import (
    BENCHMARKS,
    bbh,
    drop,
    gsm8k,
    hendrycks_math,
    humaneval,
    mmlu,
    pass_at_k,
    popqa,
    truthfulqa,
)


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


# --- answers of all tasks ------------------------------------------------------------------------

ODD = json.loads((Path(__file__).parent / "odd_answers.json").read_text())
GRADERS = {
    "gsm8k": gsm8k,
    "math": hendrycks_math,
    "mmlu": mmlu,
    "bbh": bbh,
    "drop": drop,
    "popqa": popqa,
}


@pytest.mark.parametrize("name", GRADERS)
def test_odd_answers_have_the_values_that_were_given_by_hand(name):
    """Units, LaTeX, signs, commas, several boxes: each row is the gold, an answer and its score."""
    wrong = []
    for *gold, answer, value in ODD[name]:
        doc = {"group": gold[0], "gold": gold[-1], "answers": gold[-1]}
        found = GRADERS[name].process_results(doc, [answer])[BENCHMARKS[name].metric]
        if found != pytest.approx(value, abs=0.005):
            wrong.append((gold, answer, value, found))
    assert wrong == []


def test_there_are_200_odd_answers():
    assert sum(map(len, ODD.values())) >= 200


def written(doc) -> str:
    """A DROP answer in the forms that the prompt asks for."""
    spans = doc["answers"][0]
    number = spans[0].replace(".", "", 1).isdigit()
    return spans[0] if number else ", ".join(f"<{span}>" for span in spans)


@pytest.mark.parametrize(
    ("name", "render", "wrong"),
    [
        ("bbh", lambda doc: f"We look.\nSo the answer is {doc['gold']}.", "So the answer is"),
        ("bbh", lambda doc: doc["gold"], "I cannot say"),
        ("drop", lambda doc: f"We count.\nThe answer is {written(doc)}.", "The answer is <qqq>."),
        ("drop", written, ""),
        ("popqa", lambda doc: doc["gold"][-1], "???"),
        ("math", lambda doc: f"So $x = \\boxed{{{doc['gold']}}}$.", ""),
        ("math", lambda doc: f"So the answer is ${doc['gold']}$.", "I cannot say"),
    ],
)
def test_gold_answers_are_right_and_others_wrong(shared_data, name, render, wrong):
    task = load_task(name, shared_data)
    assert [doc["id"] for doc in task.eval_docs if score(task, doc, render(doc)) != 1] == []
    assert [doc["id"] for doc in task.eval_docs if score(task, doc, wrong) != 0] == []


def test_an_answer_that_is_one_more_is_wrong_in_math(shared_data):
    task = load_task("math", shared_data)
    for doc in task.eval_docs[::20]:
        assert score(task, doc, f"\\boxed{{{doc['gold']} + 1}}") == 0


def test_math_is_graded_in_a_thread_too():
    doc = {"gold": r"\frac{\sqrt{2}}{2}"}
    with ThreadPoolExecutor(1) as pool:
        graded = pool.submit(hendrycks_math.process_results, doc, [r"\boxed{1/\sqrt{2}}"])
    assert graded.result()["exact_match"] == 1


def test_shots_of_bbh_are_turns_and_the_first_says_what_the_task_is(shared_data):
    task = load_task("bbh", shared_data)
    docs = {doc["group"]: doc for doc in task.eval_docs}
    turns = []
    task.fewshot_context(
        docs["navigate"],
        3,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        chat_template=lambda messages, **_: turns.extend(messages) or "",
    )
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 3 + ["user"]
    assert turns[0]["content"].startswith("Given a series of navigation instructions, determine")
    assert turns[1]["content"].endswith("So the answer is No.")
    assert turns[2]["content"].startswith("Q: If you follow these instructions")
    assert turns[-1]["content"] == docs["navigate"]["prompt"]


def test_popqa_has_a_shot_of_each_template_but_that_of_the_question(shared_data):
    task = load_task("popqa", shared_data)
    for doc in task.eval_docs:
        shots = task.sampler.sample(15, eval_doc=doc)
        assert len(shots) == 15
    doc = {"prompt": "Q: Who is the father of Isaac? A:"}
    prompts = [shot["prompt"] for shot in task.sampler.sample(15, eval_doc=doc)]
    assert not any("father" in prompt for prompt in prompts)
    assert "Q: Who is the mother of Elizabeth I? A:" in prompts


def test_drop_draws_1000_documents_with_the_seed_of_olmes(shared_data):
    docs = drop.load(data_dir=str(shared_data))["test"]
    drawn = random.Random(1234).sample(range(1504), 1000)
    assert [doc["id"] for doc in docs] == [f"drop/drop_v0_dev.jsonl.gz:{n + 1}" for n in drawn]


def test_drop_reads_its_own_files(shared_data, tmp_path):
    (tmp_path / "drop").mkdir()
    (tmp_path / "drop" / "drop.json").write_bytes(
        (shared_data / "drop_native" / "drop.json").read_bytes()
    )
    docs = drop.load(data_dir=str(tmp_path))["test"]
    assert docs[0]["question"].startswith("What happened second")
    assert docs[0]["answers"][0] == ["sixth terminal"]
    for doc in docs:
        assert drop.process_results(doc, [f"The answer is {written(doc)}"])["f1"] == 1


# --- HumanEval -----------------------------------------------------------------------------------

SQUARE = {
    "prompt": 'import math\n\ndef one() -> int:\n    return 1\n\ndef square(x):\n    """x * x"""\n',
    "entry_point": "square",
    "test": "def check(candidate):\n    assert candidate(3) == 9\n",
    "canonical_solution": "    return x * x\n",
    "unsafe_code": False,
}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("```python\ndef square(x):\n    return x * x\n```", True),
        ("Sure!\n```python\ndef square(x):\n    return math.pow(x, 2) * one()\n```\nDone.", True),
        ("```\nprint(1)\n```\nor\n```py\ndef square(x): return x * x\n```", True),
        ("```python\ndef square(x):\n    return x * x", True),
        ("    return x * x\n", True),
        ("    y = x * x\n\n    return y\n\nThis works since y is x * x.", True),
        ("```python\n    return x * x\n```", True),
        ("Here it is:\n\ndef square(x):\n    return x * x\n\nIt multiplies.", True),
        ("```python\ndef square(x):\n    return x + x\n```", False),
        ("```python\ndef cube(x):\n    return x * x\n```", False),
        ("I cannot do that.", False),
    ],
)
def test_code_is_found_in_an_answer(answer, right):
    program = humaneval.program(SQUARE, answer)
    if right:
        exec(program, {})
    else:
        with pytest.raises((AssertionError, NameError, SyntaxError, TypeError)):
            exec(program, {})


def test_pass_at_k_is_unbiased():
    assert pass_at_k.pass_at(10, 20, 2) == pytest.approx(0.76316, abs=5e-6)
    assert pass_at_k.pass_at(1, 20, 2) == pytest.approx(0.1)
    assert pass_at_k.pass_at(10, 20, 0) == 0
    assert pass_at_k.pass_at(10, 20, 11) == 1


@pytest.mark.parametrize("documents", [3, pytest.param(None, marks=pytest.mark.slow)])
def test_gold_solutions_of_humaneval_pass_in_the_jail(shared_data, documents):
    task = load_task("humaneval", shared_data)
    assert task.config.repeats == 20
    for doc in task.eval_docs[:documents]:
        whole = f"```python\n{doc['prompt']}{doc['canonical_solution']}```"
        samples = [whole, doc["canonical_solution"], *[""] * 18]
        assert task.process_results(doc, [samples])["pass@10"] == pytest.approx(14.5 / 19)


def test_all_samples_of_a_document_reach_the_grader(shared_data):
    task = load_task("ifeval_pass10", shared_data)
    task.build_all_requests(limit=2)
    for request in task.instances:
        request.resps = [str(n) for n in range(20)]
    task.apply_filters()
    (kept,) = task.instances[1].filtered_resps.values()
    assert kept == [str(n) for n in range(20)]
