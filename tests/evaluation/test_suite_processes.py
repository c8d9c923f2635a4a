"""Two processes that share one mesh below lm-eval, and a process that is killed."""

import json
import signal

import pytest

from nrt_jax.evaluation.answer_log import ANSWERS
from nrt_jax.evaluation.results import RESULTS_FILE
from nrt_jax.local import _environment, _free_port
from tests.data.made_tokenizers import write_made_tokenizer
from tests.training.runs import Process, write_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start `nrt-jax evaluate` of a model of random weights, with other environments."""
    folder = tmp_path_factory.mktemp("processes")
    write_model(folder / "model", vocab_size=700)
    write_made_tokenizer("llama3", folder / "model")
    for name in ("gsm8k", "truthfulqa"):
        (folder / "data" / name).mkdir(parents=True)
    rows = [json.dumps({"question": f"{n} + 1?", "answer": f"#### {n + 1}"}) for n in range(6)]
    (folder / "data" / "gsm8k" / "test.jsonl").write_text("\n".join(rows))
    choices = [{"question": "Is ice cold?", "mc2_targets": {"Yes.": 1, "No.": 0}}]
    (folder / "data" / "truthfulqa" / "mc_task.json").write_text(json.dumps(choices))

    def start(out, **environment):
        options = ["--data", str(folder / "data"), "--out", str(out), "--max-trace-tokens", "8"]
        words = ["evaluate", str(folder / "model"), "method=nrt", "data.template=tulu"]
        tasks = ["--tasks", "gsm8k,truthfulqa_after_trace"]
        logs = tmp_path_factory.mktemp("logs")
        return Process([*words, "rollout.slots=2", *tasks, *options], logs, environment)

    return start


def test_processes_share_the_work_and_the_first_writes(start, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    outcome = start(alone, JAX_NUM_CPU_DEVICES="2").end()
    assert outcome.status == 0, outcome
    address = f"localhost:{_free_port()}"
    processes = [start(shared, **_environment(address, i, 2, 1)) for i in range(2)]
    outcomes = [process.end() for process in processes]
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
    assert "GSM8K" in outcomes[0].out
    assert not outcomes[1].out
    assert (shared / RESULTS_FILE).read_bytes() == (alone / RESULTS_FILE).read_bytes()


def test_a_process_that_is_killed_goes_on_to_the_same_table(start, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).end().status == 0
    process = start(killed)
    assert process.wait_until(lambda: any((killed / ANSWERS).glob("*.parquet")))
    process.signal(signal.SIGKILL)
    process.end()
    assert start(killed).end().status == 0
    assert (killed / RESULTS_FILE).read_bytes() == (whole / RESULTS_FILE).read_bytes()
