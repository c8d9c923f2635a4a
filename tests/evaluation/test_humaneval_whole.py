"""HumanEval from the command line to its tables: right, hostile and missing answers of a server."""

import json
import math
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from nrt_jax.errors import InputError
from nrt_jax.evaluation import suite
from nrt_jax.evaluation.chat_client import ChatClient
from nrt_jax.evaluation.jail import check_jail
from nrt_jax.evaluation.results import read_results, read_scores
from tests.evaluation.stub_server import StubServer, completion

SAMPLES = 20
ANSWERS = {
    "right": "```python\ndef {name}(x):\n    return x + 1\n```",
    "wrong": "```python\ndef {name}(x):\n    return x\n```",
    "forks": "```python\nimport os\nwhile True: os.fork()\ndef {name}(x): return x + 1\n```",
    "exits": "```python\ndef {name}(x):\n    raise SystemExit(0)\n```",
    "unclosed": "<think>I think",
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    try:
        check_jail()
    except InputError as error:
        pytest.skip(str(error))
    rows = [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f"def {name}(x):\n    '''The next number.'''\n",
            "entry_point": name,
            "canonical_solution": "    return x + 1\n",
            "test": "def check(candidate):\n    assert candidate(1) == 2\n",
        }
        for i, name in enumerate(["first", "second", "third"])
    ]
    folder = tmp_path / "data" / "humaneval"
    folder.mkdir(parents=True)
    (folder / "HumanEval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder.parent


def kind_of(body: dict) -> str:
    """A function of the request alone, as the answer of a server with seeds is."""
    return list(ANSWERS)[body["seed"] % len(ANSWERS)]


def reply(body: dict) -> tuple[int, dict]:
    name = "first" if "def first" in body["messages"][0]["content"] else "second"
    text = ANSWERS[kind_of(body)].replace("{name}", name)
    return 200, completion(text, "length" if text.startswith("<think>") else "stop")


@pytest.mark.slow
def test_two_documents_with_a_kill_between(data: Path, words, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(suite, "ChatClient", partial(ChatClient, first_wait_s=0.01))

    def evaluate(server: StubServer, name: str) -> tuple[int, str, str]:
        options = ("--tasks", "humaneval", "--limit", 2, "--data", data, "--out", tmp_path / name)
        return words("evaluate", "m", "--url", server.url, *options)

    with StubServer(reply) as server:
        status, printed, err = evaluate(server, "whole")
        assert status == 0, err
        asked = list(server.asked)
        server.asked.clear()
        left = iter(range(15))
        server.reply = lambda body: reply(body) if next(left, None) is not None else (503, {})
        status, _, err = evaluate(server, "killed")
        assert status == 1
        assert "the same command goes on" in err
        server.asked.clear()
        server.reply = reply
        assert evaluate(server, "killed")[:2] == (0, printed)
        assert len(server.asked) >= SAMPLES * 2 - 15
    for file in ("results.json", "scores.parquet", "results.html", "results.csv", "results.tex"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert "HEval" in printed

    counts = Counter((body["messages"][0]["content"], kind_of(body)) for body in asked)
    (row,) = read_results(tmp_path / "whole").tasks
    assert (row.n, row.answers) == (2, 2 * SAMPLES)
    assert row.unclosed == sum(n for (_, kind), n in counts.items() if kind == "unclosed")
    right = sorted(n for (_, kind), n in counts.items() if kind == "right")
    expected = [1 - math.comb(SAMPLES - n, 10) / math.comb(SAMPLES, 10) for n in right]
    found = sorted(score.score for score in read_scores(tmp_path / "whole"))
    assert found == pytest.approx(expected)
    assert len(found) == 2
