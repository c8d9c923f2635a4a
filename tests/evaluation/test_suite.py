"""A suite from the command line to its results: asked once, continued, behind a server, refused."""

import json
from functools import partial
from pathlib import Path

import pytest

from nrt_jax.evaluation import suite as suite_module
from nrt_jax.evaluation.answer_log import AnswerLog, read_answers
from nrt_jax.evaluation.chat_client import ChatClient
from nrt_jax.evaluation.results import RESULTS_FILE, SCORES_FILE, read_results, read_scores
from nrt_jax.evaluation.suite import SUITES, load_tasks, task_names
from tests.data.made_tokenizers import write_made_tokenizer
from tests.evaluation.stub_server import StubServer, completion
from tests.training.runs import write_model

QUESTIONS = [("Ann has 3 apples.", "3"), ("Bob has 12 pears.", "12"), ("Eve has 7 figs.", "7")]
CHOICES = {
    "Is ice cold?": {"Yes.": 1, "No.": 0},
    "Is fire cold?": {"No.": 1, "Yes.": 0, "It is.": 0},
}
ASKED = ("gsm8k", "truthfulqa")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Random weights whose tokenizer spells every text."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, vocab_size=700)
    write_made_tokenizer("llama3", folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in ("gsm8k", "truthfulqa"):
        (folder / name).mkdir()
    rows = [json.dumps({"question": q, "answer": f"#### {a}"}) for q, a in QUESTIONS]
    (folder / "gsm8k" / "test.jsonl").write_text("\n".join(rows))
    rows = [{"question": q, "mc2_targets": targets} for q, targets in CHOICES.items()]
    (folder / "truthfulqa" / "mc_task.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def evaluate(words, monkeypatch, data):
    """`nrt-jax evaluate` with answers of a few tokens; its status, and what it printed."""

    def short(suite):
        tasks = load_tasks(suite)
        for task in tasks.values():
            if task.get_config("output_type") == "generate_until":
                task.set_config("generation_kwargs", {"max_gen_toks": 6}, update=True)
        return tasks

    monkeypatch.setattr(suite_module, "load_tasks", short)

    def call(model, out, *more, tasks=ASKED):
        options = ["--tasks", ",".join(tasks), "--data", data, "--out", out]
        return words("evaluate", model, *options, *more)

    return call


CHAT = ("data.template=tulu", "rollout.slots=2")


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in (RESULTS_FILE, SCORES_FILE)}


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_bytes(
    evaluate, model, tmp_path, monkeypatch
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, out, err = evaluate(model, whole, *CHAT)
    assert status == 0, err
    result = read_results(whole)
    assert [row.task for row in result.tasks] == list(ASKED)
    assert [(row.n, row.answers, row.unclosed) for row in result.tasks] == [(3, 3, 0), (2, 0, 0)]
    assert "GSM8K" in out

    keep, added = AnswerLog.add, []

    def add(log, *rows):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.extend(rows)
        keep(log, *rows)

    monkeypatch.setattr(AnswerLog, "add", add)
    status, _, err = evaluate(model, killed, *CHAT)
    assert status == 130
    assert "the same command goes on" in err
    assert not (killed / RESULTS_FILE).exists()
    again = []
    monkeypatch.setattr(AnswerLog, "add", lambda log, *rows: (again.extend(rows), keep(log, *rows)))
    assert evaluate(model, killed, *CHAT)[0] == 0
    assert len(added) == 2
    assert {row.key for row in again}.isdisjoint(row.key for row in added)
    assert len(again) + len(added) == len(list(read_answers(whole))) == 3 + 5
    assert contents(killed) == contents(whole)


def test_a_trace_is_no_answer_and_has_a_limit_of_its_own(evaluate, model, tmp_path):
    """Random weights never close a trace of four tokens."""
    tasks = ("gsm8k", "truthfulqa", "truthfulqa_after_trace")
    status, _, err = evaluate(
        model, tmp_path, *CHAT, "method=nrt", "--max-trace-tokens", "4", "--limit", "2", tasks=tasks
    )
    assert status == 0, err
    gsm8k, _, after = read_results(tmp_path).tasks
    assert (gsm8k.n, gsm8k.unclosed, gsm8k.value) == (2, 2, 0.0)
    assert (gsm8k.mean_trace_tokens, gsm8k.mean_answer_tokens) == (4.0, 0.0)
    assert (after.n, after.answers, after.unclosed) == (2, 2, 2)
    rows = list(read_answers(tmp_path))
    assert {row.answer for row in rows if row.task == "gsm8k"} == {""}
    scores = [
        row.answer_logprob for row in rows if row.task.startswith("truthfulqa") and row.answer
    ]
    assert len(scores) == len(set(scores)) == 10, "after a trace the same answers score otherwise"


def test_answers_of_a_server_count_in_the_same_way(evaluate, tmp_path):
    def reply(body):
        text = "It is 12." if "Bob" in body["messages"][-1]["content"] else "<think>12"
        return 200, completion(text, finish="length" if "<think>" in text else "stop")

    with StubServer(reply) as server:
        status, _, err = evaluate("m", tmp_path, "--url", server.url, tasks=("gsm8k",))
        assert status == 0, err
        assert {asked["model"] for asked in server.asked} == {"m"}
        assert {asked["max_tokens"] for asked in server.asked} == {6}
    (row,) = read_results(tmp_path).tasks
    assert (row.value, row.unclosed) == (pytest.approx(1 / 3), 2)
    assert {score.score for score in read_scores(tmp_path)} == {0.0, 1.0}


def test_a_server_that_goes_away_leaves_what_came(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr("nrt_jax.evaluation.server_lm.IN_FLIGHT", 1)
    impatient = partial(ChatClient, first_wait_s=0.01)
    monkeypatch.setattr(suite_module, "ChatClient", impatient)
    came = []

    def reply(_):
        came.append(1)
        return (200, completion("It is 3.")) if len(came) == 1 else (503, b"")

    with StubServer(reply) as server:
        status, _, err = evaluate("m", tmp_path, "--url", server.url, tasks=("gsm8k",))
    assert status == 1
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert "no answer after 5 tries (status 503: ); the 1 answers that came are kept in" in line
    assert [row.answer for row in read_answers(tmp_path)] == ["It is 3."]


def test_answers_on_their_way_are_kept_after_an_error(evaluate, tmp_path):
    fine = []

    def reply(body):
        if "Ann" in body["messages"][-1]["content"]:
            return 400, {"error": "no"}
        fine.append(1)
        return 200, completion("It is 3.")

    with StubServer(reply) as server:
        status, _, err = evaluate("m", tmp_path, "--url", server.url, tasks=("gsm8k",))
    assert status == 1
    assert "refuses a request (status 400: no); the" in err
    assert len(list(read_answers(tmp_path))) == len(fine)


def test_a_server_is_not_asked_for_log_likelihoods(evaluate, tmp_path):
    status, _, err = evaluate("m", tmp_path, "--url", "http://127.0.0.1:9", tasks=("truthfulqa",))
    assert status == 2
    assert "task truthfulqa: needs log-likelihoods of given answers" in err


def test_answers_of_another_model_are_not_mixed_in(evaluate, model, tmp_path):
    (tmp_path / "identity.json").write_text('{"weights": "other"}')
    status, _, err = evaluate(model, tmp_path, *CHAT, tasks=("gsm8k",))
    assert status == 2
    assert "holds answers with weights 'other', and now it is" in err


def test_suites_and_benchmarks_are_named():
    assert len(SUITES["paper"]) == 9
    assert task_names(["paper"]) == SUITES["paper"]
    assert task_names(["gsm8k", "paper"])[:2] == ("gsm8k", SUITES["paper"][0])
    assert task_names(["gsm8k", "gsm8k"]) == ("gsm8k",)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gsm9k", "'gsm9k' is no benchmark; did you mean gsm8k?"),
        ("mmul", "'mmul' is no benchmark; did you mean mmlu"),
        ("xyz", "'xyz' is no benchmark; use paper, bbh, mmlu"),
    ],
)
def test_an_unknown_benchmark_gets_the_nearest_names(words, tmp_path, name, told):
    status, _, err = words("evaluate", "nowhere", "--tasks", name, "--out", tmp_path)
    assert status == 2
    assert told in err


def test_a_missing_file_is_told_before_the_model_is_opened(words, tmp_path):
    status, _, err = words(
        "evaluate", "nowhere", "--tasks", "gsm8k", "--data", tmp_path, "--out", tmp_path / "out"
    )
    assert status == 2
    assert "no gsm8k/test.jsonl; the public file is" in err


def test_without_lm_eval_the_extra_is_named(words, tmp_path, monkeypatch, data):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    status, _, err = words(
        "evaluate", "nowhere", "--tasks", "gsm8k", "--data", data, "--out", tmp_path / "out"
    )
    assert status == 2
    assert "pip install 'nrt-jax[eval]'" in err
