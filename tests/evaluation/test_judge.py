"""The judge: the paper's prompt, replies of every kind, and a run's traces judged by a stub."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from nrt_jax.evaluation.chat_client import ChatClient, ServerGone, ServerRefused
from nrt_jax.evaluation.judge import PROMPT, TRIES, Judge, Judged, fill, read_score
from nrt_jax.evaluation.judged_traces import summarise_verdicts
from tests.evaluation.stub_server import StubServer, completion

ITEM = Judged("1+1?", "one and one", "2")


def scored(score: float, **more) -> dict:
    return completion(json.dumps({"score": score, "justification": "why", **more}))


# --- the prompt ----------------------------------------------------------------------------------


def test_the_prompt_is_the_papers(shared_data):
    """The text of Table 8, out of the fences that the text version of the paper prints it in."""
    papers = [path.read_text("utf-8") for path in (shared_data.parent / "paper").glob("003_*.txt")]
    if not papers:
        pytest.skip("no text of the paper beside the data")
    table = papers[0].partition("\nEvaluation Prompt\n")[2].partition("\nTable 9:")[0]
    blocks = re.sub(r"```\n```\n(.*?)\n```\n```", r"<<<\n\1\n>>>", table, flags=re.S)
    assert blocks.count("<<<") == 3
    text = re.sub(r"```\n(.*?)\n```", r"\1", blocks, flags=re.S)
    assert text.replace("<<<", "```").replace(">>>", "```").strip() == PROMPT


def test_the_prompt_stays_as_it_is():
    digest = hashlib.sha256(PROMPT.encode()).hexdigest()
    assert digest == "f86b354bcf27eedf6237120a6c162f69b4b98ff07fc8e63345a4784544086146"


def test_braces_of_the_texts_are_not_filled_in():
    prompt = fill(Judged("{reasoning} {x}", r"{ground_truth} \1", "{problem}"))
    assert "```\n{reasoning} {x}\n```" in prompt
    assert "```\n{ground_truth} \\1\n```" in prompt
    assert "```\n{problem}\n```\n\nGive higher scores" in prompt
    assert '"score": float in [0, 1]' in prompt


# --- replies -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"score": 0.75, "justification": "a", "flags": ["b"]}', 0.75),
        ('Sure:\n```json\n{"score": 1}\n```\nDone.', 1.0),
        ('{"score": 0, "flags": []}', 0.0),
    ],
)
def test_a_score_is_read(reply, score):
    assert read_score(reply)["score"] == score


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I cannot judge that.",
        "0.8",
        '{"score": 8}',
        '{"score": -0.1}',
        '{"score": "0.8"}',
        '{"score": true}',
        '{"score": NaN}',
        '{"score": null}',
        '{"quality": 0.8}',
        '{"score": 0.8, "score": 0.1}',
        '{"score": 0.8} or {"score": 0.1}',
        '{"score": 0.8, "justification": "cut',
        '{"score": 0.8, "justification": ["a"]}',
        '{"score": 0.8, "flags": "none"}',
        "}{",
    ],
)
def test_what_is_no_score_is_not_scored(reply):
    with pytest.raises(ValueError, match=r".") as raised:
        read_score(reply)
    assert "\n" not in str(raised.value)


def judge(url: str, folder: Path, model: str = "j") -> Judge:
    return Judge(ChatClient(url=url, model=model, tries=2, first_wait_s=0.01), folder)


def test_a_judge_is_asked_greedily_and_once(tmp_path: Path):
    with StubServer(lambda _: (200, scored(0.5, flags=["a"]))) as server:
        first = judge(server.url, tmp_path).verdict(ITEM)
        assert judge(server.url, tmp_path).verdict(ITEM) == first
        judge(server.url, tmp_path).verdict(ITEM._replace(reasoning="other"))
        judge(server.url, tmp_path, "k").verdict(ITEM)
    assert (first.outcome, first.score, first.flags) == ("scored", 0.5, ("a",))
    assert [asked["model"] for asked in server.asked] == ["j", "j", "k"]
    assert server.asked[0]["temperature"] == 0
    assert server.asked[0]["messages"] == [{"role": "user", "content": fill(ITEM)}]


def test_an_unreadable_reply_is_asked_again(tmp_path: Path):
    replies = iter([completion("nonsense"), completion('{"score": 2}'), scored(0.25)])
    with StubServer(lambda _: (200, next(replies))) as server:
        verdict = judge(server.url, tmp_path).verdict(ITEM)
    assert verdict.score == 0.25
    assert verdict.replies[:2] == ("nonsense", '{"score": 2}')


def test_nonsense_is_counted_and_not_kept(tmp_path: Path):
    with StubServer(lambda _: (200, completion("nonsense"))) as server:
        verdict = judge(server.url, tmp_path).verdict(ITEM)
    assert (verdict.outcome, verdict.score) == ("unreadable", None)
    assert len(server.asked) == TRIES
    with StubServer(lambda _: (200, scored(0.5))) as server:
        assert judge(server.url, tmp_path).verdict(ITEM).score == 0.5


@pytest.mark.parametrize(
    "reply",
    [
        (200, completion(None, refusal="I cannot help.")),
        (200, completion('{"score": 1}', "content_filter")),
        (400, {"error": {"message": "content management policy"}}),
    ],
)
def test_a_refusal_is_counted_and_kept(reply, tmp_path: Path):
    with StubServer(lambda _: reply) as server:
        verdict = judge(server.url, tmp_path).verdict(ITEM)
        assert judge(server.url, tmp_path).verdict(ITEM) == verdict
    assert (verdict.outcome, verdict.score) == ("refused", None)
    assert len(server.asked) == 1


@pytest.mark.parametrize(("status", "error"), [(401, ServerRefused), (503, ServerGone)])
def test_what_came_before_the_judge_went_away_is_kept(status, error, tmp_path: Path):
    items = [ITEM._replace(problem=str(i)) for i in range(20)]
    count = iter(range(100))
    with (
        StubServer(lambda _: (200, scored(0.5)) if next(count) < 5 else (status, {})) as server,
        pytest.raises(error),
    ):
        list(judge(server.url, tmp_path).verdicts(items))
    with StubServer(lambda _: (200, scored(0.5))) as server:
        found = dict(judge(server.url, tmp_path).verdicts(items))
    assert sorted(found) == list(range(20))
    assert len(server.asked) == 15


def test_equal_traces_are_asked_about_once(tmp_path: Path):
    with StubServer(lambda _: (200, scored(0.5))) as server:
        found = dict(judge(server.url, tmp_path).verdicts([ITEM] * 5))
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert len(server.asked) == 1


def test_refusals_and_nonsense_have_no_part_in_the_mean(tmp_path: Path):
    answers = {"a": scored(0.5), "b": scored(1.0), "c": completion("?")}
    answers["d"] = completion(None, refusal="no")

    def reply(body: dict) -> tuple[int, dict]:
        problem = body["messages"][0]["content"].partition("Problem:\n\n```\n")[2][0]
        return 200, answers[problem]

    with StubServer(reply) as server:
        items = [ITEM._replace(problem=name) for name in "abcd"]
        found = dict(judge(server.url, tmp_path).verdicts(items))
    records = [{"closed": i > 0, "trace_tokens": 10 * i} for i in range(4)]
    summary = summarise_verdicts(records, [found[i] for i in range(4)])
    assert (summary["quality"], summary["stderr"]) == (0.75, 0.25)
    assert (summary["scored"], summary["refused"], summary["unreadable"]) == (2, 1, 1)
    assert (summary["unclosed"], summary["mean_trace_tokens"]) == (1, 15.0)


# --- a model -------------------------------------------------------------------------------------


@pytest.fixture
def verb(tiny_config: Path, words, tmp_path: Path):
    """verb(url, rows, judge) judges a model of random weights, with its outputs in tmp_path/out."""

    def call(url: str, rows: int = 3, judge: str = "j", *more: str):
        model, out = tiny_config.parent / "model", tmp_path / "out"
        data = ("data.source=chain_addition", "data.chain.digits=3", "data.eval_rows=4")
        data += ("data.chain.rows=40", "rollout.max_trace_tokens=4")
        options = ("--url", url, "--judge", judge, "--rows", rows, "--out", out)
        return words("judge", model, *options, *data, *more)

    return call


def test_a_model_is_judged_and_goes_on(verb, tmp_path: Path):
    out, count = tmp_path / "out", iter(range(10))
    with StubServer(lambda _: (200, scored(0.5)) if next(count) < 1 else (401, {})) as server:
        status, _, err = verb(server.url)
    assert status == 1
    assert re.search(r"judge j: .*status 401.*; 1 of 3 verdicts are kept in .*goes on\n$", err)
    assert err.count("\n") == 1
    traces = (out / "traces.jsonl").read_bytes()
    with StubServer(lambda _: (200, scored(0.25, flags=["hallucination"]))) as server:
        status, printed, _ = verb(server.url)
        files = {path: path.read_bytes() for path in out.glob("*.json*")}
        assert verb(server.url)[:2] == (0, printed)
    assert status == 0
    assert len(server.asked) == 2
    assert "quality 0.333 ± 0.083 by j; 3 of 3 traces scored, 0 refused, 0 repl" in printed
    assert {path: path.read_bytes() for path in out.glob("*.json*")} == files
    assert (out / "traces.jsonl").read_bytes() == traces
    assert json.loads((out / "judge.json").read_text())["flags"] == {"hallucination": 2}
    lines = [json.loads(line) for line in (out / "judgements.jsonl").read_text().split("\n")[:-1]]
    assert len(lines) == 3
    for line in lines:
        assert line.keys() >= {"reasoning", "trace_end", "score", "justification", "replies"}
        total = sum(int(digit) for digit in line["problem"].split("+"))
        assert line["ground_truth"] == f"={total % 5}"


def test_no_score_and_another_judge(verb):
    with StubServer(lambda _: (200, completion("nonsense"))) as server:
        status, _, err = verb(server.url, 2)
        assert (status, err.count("\n")) == (1, 1)
        assert "judge j: none of 2 replies holds a score, such as 'nonsense'" in err
        status, _, err = verb(server.url, 2, "k")
    assert status == 2
    assert "holds answers with judge 'j', and now it is 'k'; name another --out" in err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["method=sft"], "answers without a trace (method sft), so there is nothing to judge"),
        (["data.eval_rows=0"], "there are no held-out rows to judge"),
    ],
)
def test_a_model_without_traces_or_questions(more, said, verb):
    status, _, err = verb("http://127.0.0.1:1", 3, "j", *more)
    assert (status, err.count("\n")) == (2, 1)
    assert said in err


def test_a_url_must_be_one(verb):
    status, _, err = verb("x:1")
    assert (status, "--url x:1: must look like" in err) == (2, True)
