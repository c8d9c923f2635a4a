"""The adapter to JetStream's interface, its driver, and what the import of the package leaves."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from queue import Queue

import jax
import numpy as np
import pytest

from nrt_jax.engine.decode_state import padded
from nrt_jax.engine.sampling import Sampling
from nrt_jax.serving.jetstream import (
    Driver,
    JetStreamEngine,
    SampledTokens,
    Start,
    orchestrator,
)
from tests.engine.toy import (
    LLAMA_64,
    STOPS,
    engine,
    greedy,
    logits_after,
    params,
    prompt,
    prompts,
)

REPOSITORY = Path(__file__).resolve().parents[2]

PROBE = """
import importlib.util, json, logging, sys
root = logging.getLogger()
before = root.level, list(root.handlers)
from nrt_jax.serving import jetstream
from jetstream.engine import token_utils
print(json.dumps({
    "root_logger_untouched": (root.level, root.handlers) == before,
    "loaded": sorted({"seqio", "tensorflow"} & set(sys.modules)),
    "seqio_found": importlib.util.find_spec("seqio") is not None,
    "vocabulary": token_utils.Vocabulary.__module__,
    "engine": jetstream.JetStreamEngine.__bases__[0].__module__,
}))
"""


def probe(**environment: str) -> dict:
    result = subprocess.run(
        [sys.executable, "-c", PROBE],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


def test_importing_leaves_the_process_as_it_was():
    seen = probe()
    assert seen["root_logger_untouched"]
    assert seen["engine"] == "jetstream.engine.engine_api"
    assert "tensorflow" not in seen["loaded"]
    if not seen["seqio_found"]:
        assert seen["loaded"] == []


def test_the_real_seqio_is_used_where_there_is_one(tmp_path: Path):
    package = tmp_path / "seqio"
    package.mkdir()
    (package / "__init__.py").touch()
    names = "class Vocabulary: pass\nclass SentencePieceVocabulary: pass\n"
    (package / "vocabularies.py").write_text(names)
    seen = probe(PYTHONPATH=f"{tmp_path}{os.pathsep}{REPOSITORY}")
    assert seen["loaded"] == ["seqio"]
    assert seen["vocabulary"] == "seqio.vocabularies"


def test_training_and_the_http_server_import_neither_jetstream_nor_grpc():
    code = """
import sys
from nrt_jax.evaluation import answer
from nrt_jax.serving import server
from nrt_jax.training import loop
print({"jetstream", "grpc", "seqio"} & set(sys.modules))
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "set()\n"


# The adapter


def prefill(run, tokens):
    return run.prefill(params=params(), padded_tokens=padded(tokens), true_length=len(tokens))


def drive(run, state, steps):
    """Results of some steps on the host, as JetStream's detokenize thread reads them."""
    results = []
    for _ in range(steps):
        state, result = run.generate(params(), state)
        result.copy_to_host_async()
        results.append(result.convert_to_numpy())
    return state, results


def tokens_at(results, slot):
    data = [result.get_result_at_slot(slot) for result in results]
    return [int(d.tokens[0, 0]) for d in data if d.valid[0, 0]]


def test_is_an_engine_of_jetstream():
    run = JetStreamEngine(engine())
    api = importlib.import_module("jetstream.engine.engine_api")
    assert isinstance(run, api.Engine)
    assert run.max_concurrent_decodes == 4
    assert run.max_prefill_length == 32
    assert run.samples_per_slot == 1
    weights = params()
    assert run.load_params(weights) is weights
    parameters = importlib.import_module("jetstream.engine.tokenizer_pb2").TokenizerParameters
    assert run.get_tokenizer() == parameters(path="")


def test_driven_as_jetstream_does_it_writes_the_greedy_continuation():
    """Prefill, transfer, insert, free the prefix, generate, read by slot, refill the slot."""
    run, (first, second, third) = JetStreamEngine(engine()), prompts(6, 17, 9)
    state = run.init_decode_state()
    for slot, tokens in ((2, first), (0, second)):
        prefix = jax.device_put(prefill(run, tokens), run.get_prefix_destination_sharding())
        state = run.insert(prefix, state, slot=slot)
        jax.tree.map(lambda leaf: leaf.delete(), prefix)
    state, results = drive(run, state, 13)
    state = run.insert(prefill(run, third), state, slot=2)
    state, more = drive(run, state, 13)
    for tokens, slot, read in ((first, 2, results), (second, 0, results), (third, 2, more)):
        written, end = greedy(LLAMA_64, tokens, 12, STOPS)
        assert tokens_at(read, slot) == written + ([] if end is None else [end])
    assert tokens_at(results + more, 1) == tokens_at(more, 0) == []


def test_results_are_what_jetstreams_detokenizer_expects():
    """It stops a slot by its lengths, by its own stop tokens, and at the first invalid token."""
    run, tokens = JetStreamEngine(engine()), prompt(6)
    written, end = greedy(LLAMA_64, tokens, 12, STOPS)
    state = run.insert(prefill(run, tokens), run.init_decode_state(), slot=1)
    _, results = drive(run, state, 13)
    data = [result.get_result_at_slot(1) for result in results]
    drawn = len(written) + (end is not None)
    assert [int(d.lengths[0]) for d in data[:drawn]] == list(range(1, drawn + 1))
    assert [bool(d.valid[0, 0]) for d in data] == [True] * drawn + [False] * (13 - drawn)
    assert data[0].tokens.shape == data[0].valid.shape == (1, 1)


def test_convert_to_numpy_keeps_the_columns_and_the_class():
    run, tokens = JetStreamEngine(engine()), prompt(6)
    run.announce(Start(jax.random.key(3), 1, Sampling()))
    state = run.insert(prefill(run, tokens), run.init_decode_state(), 3)
    _, result = run.generate(params(), state)
    host = result.convert_to_numpy()
    assert isinstance(host, SampledTokens)
    assert isinstance(host.data, np.ndarray)
    token, valid, length, bits, done = host.data[3]
    assert (valid, length, done) == (1, 1, 1)
    assert not host.data[:3, [1, 4]].any()
    expected = jax.nn.log_softmax(logits_after(LLAMA_64, tokens, [0])[0])[token]
    np.testing.assert_allclose(bits.view(np.float32), expected, atol=1e-4)


def test_an_announcement_is_for_one_prefill():
    run, tokens = JetStreamEngine(engine()), prompt(6)
    run.announce(Start(jax.random.key(3), 2, Sampling(temperature=0.5)))
    first, second = prefill(run, tokens), prefill(run, tokens)
    for prefilled, limit, temperature in ((first, 2, 0.5), (second, 12, 0.0)):
        assert prefilled.request.limit_K.tolist() == [limit]
        assert prefilled.request.sampling.temperature_B.tolist() == [temperature]


# The driver


@pytest.mark.parametrize(("free_slots", "calls"), [(4, 2), (3, 1)])
def test_the_generate_thread_starts_over_when_all_slots_are_free(monkeypatch, free_slots, calls):
    """JetStream asserts that a slot is in use, though its sequence may just have ended."""
    called = []

    def stock(driver, idx):
        called.append(idx)
        assert len(called) > 1

    monkeypatch.setattr(orchestrator.Driver, "_generate_thread", stock)
    driver = object.__new__(Driver)
    driver.live, driver._generate_slots = True, [Queue(4)]
    for slot in range(free_slots):
        driver._generate_slots[0].put(slot)
    with contextlib.nullcontext() if free_slots == 4 else pytest.raises(AssertionError):
        driver._generate_thread(0)
    assert len(called) == calls
