"""JetStream's gRPC server on our engine: texts, ids, refusals, failures."""

import logging
import threading
import time
from collections.abc import Iterator

import grpc
import pytest

from nrt_jax.config.serving import ServingConfig
from nrt_jax.serving.jetstream_grpc import GrpcServer, messages, services
from nrt_jax.serving.server import free_port, start_grpc
from tests.serving.live import wait_until
from tests.serving.models import NEW, PROMPT

TEXTS = ["Natalia sold clips to 48", "Die Straße über die Brücke", "数学的な推論", "a"]


@pytest.fixture(scope="module")
def server(served) -> Iterator[GrpcServer]:
    config = ServingConfig(grpc_port=0, grpc_slots=2, grpc_queue=8)
    server = start_grpc(served, config, free_port(config))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def stub(server):
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield services.OrchestratorStub(channel)


def of_text(text: str, max_tokens: int = 16):
    content = messages.DecodeRequest.TextContent(text=text)
    return messages.DecodeRequest(text_content=content, max_tokens=max_tokens)


def of_ids(token_ids: list[int], max_tokens: int = 16):
    content = messages.DecodeRequest.TokenContent(token_ids=token_ids)
    return messages.DecodeRequest(token_content=content, max_tokens=max_tokens)


def decode(stub, request) -> tuple[str, list[int], list[str]]:
    """The text and the ids of a stream, and the texts of its messages."""
    samples = [r.stream_content.samples[0] for r in stub.Decode(request, timeout=60)]
    texts = [sample.text for sample in samples]
    return "".join(texts), [token for sample in samples for token in sample.token_ids], texts


@pytest.mark.parametrize("text", TEXTS)
def test_greedy_texts_and_ids_are_those_of_our_own_loop(stub, served, reference, text):
    prompt = served.text_prompt(text).tolist()
    ((expected, _),) = reference.tokens(prompt, 16)
    whole, tokens, texts = decode(stub, of_text(text))
    assert tokens == expected
    assert whole == served.tokenizer.decode(expected)
    assert not any(part.endswith("\ufffd") for part in texts[:-1])
    assert decode(stub, of_ids(prompt))[:2] == ("", expected)


def test_ids_are_run_as_they_are(stub, served, reference):
    """No beginning of sequence is put in front of them."""
    tokens = served.tokenizer.encode(TEXTS[0])
    ((expected, _),) = reference.tokens(tokens, 5)
    assert decode(stub, of_ids(tokens, 5))[1] == expected
    ((begun, _),) = reference.tokens([served.tokenizer.bos_id, *tokens], 5)
    assert begun != expected


def test_more_requests_than_slots(stub, served, reference):
    prompts = [served.text_prompt(text).tolist() for text in TEXTS]
    expected = [reference.tokens(p, 3 + n)[0][0] for n, p in enumerate(prompts)]
    got: dict[int, list[int]] = {}

    def ask(n: int) -> None:
        got[n] = decode(stub, of_ids(prompts[n], 3 + n))[1]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[n] for n in range(4)] == expected


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (messages.DecodeRequest(max_tokens=3), "content: is empty; send a text or token ids"),
        (of_ids([613]), "token_ids: must be 0 to 612"),
        (of_ids([-1]), "token_ids: must be 0 to 612"),
        (of_ids([5] * (PROMPT + NEW)), f"content: {PROMPT + NEW} tokens; {PROMPT + NEW - 1} are"),
        (of_ids([5], NEW + 1), f"max_tokens: {NEW + 1}; after 1 tokens 1 to {NEW} can be"),
        (of_ids([5], 0), f"max_tokens: 0; after 1 tokens 1 to {NEW} can be"),
    ],
)
def test_refusals(stub, request_, said):
    with pytest.raises(grpc.RpcError) as refused:
        decode(stub, request_)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert said in refused.value.details()


def test_bytes_that_are_no_message(server):
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        decode = channel.unary_stream("/jetstream_proto.Orchestrator/Decode")
        with pytest.raises(grpc.RpcError) as refused:
            list(decode(b"\xff\xff", timeout=60))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert refused.value.details() == "the request is no DecodeRequest"
        health = channel.unary_unary("/jetstream_proto.Orchestrator/HealthCheck")
        assert health(b"\xff\xff", timeout=60)


def test_a_client_that_leaves_frees_its_slot(stub, server, served):
    prompt = served.text_prompt("a").tolist()
    engine, steps = server.drivers._engine, []
    generate = engine.generate

    def slowly(*args):
        steps.append(time.sleep(0.02))
        return generate(*args)

    engine.generate = slowly
    calls = [stub.Decode(of_ids(prompt, NEW)) for _ in range(6)]
    next(iter(calls[0]))
    for call in calls:
        call.cancel()
    wait_until(lambda: not server.drivers.active)
    free = server.drivers._driver._generate_slots[0]
    wait_until(lambda: free.qsize() == 2 and not server.drivers._driver._prefill_backlog.qsize())
    del engine.generate
    # Two at a time, they would have taken three times as many as one.
    assert len(steps) < 2 * NEW
    assert len(decode(stub, of_ids(prompt, 4))[1]) == 4


def test_too_many_requests(served):
    config = ServingConfig(grpc_port=0, grpc_slots=2, grpc_queue=1)
    server = start_grpc(served, config, free_port(config))
    try:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = services.OrchestratorStub(channel)
            first = stub.Decode(of_ids([5], NEW))
            wait_until(lambda: server.drivers.active == 1)
            with pytest.raises(grpc.RpcError) as refused:
                decode(stub, of_ids([5], 1))
            assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert len(list(first)) > 1
    finally:
        server.stop()


@pytest.mark.parametrize("method", ["prefill", "insert", "generate"])
def test_a_failure_in_a_thread_is_an_error_of_the_request(server, stub, served, method, caplog):
    engine, expected = server.drivers._engine, decode(stub, of_text("a"))
    before = server.drivers._driver

    def fails(*args, **kwargs):
        raise RuntimeError("boom")

    setattr(engine, method, fails)
    with caplog.at_level(logging.ERROR, "nrt_jax.serving"), pytest.raises(grpc.RpcError) as ended:
        decode(stub, of_text("a"))
    delattr(engine, method)
    assert ended.value.code() == grpc.StatusCode.INTERNAL
    said = ended.value.details() or ""
    assert "boom" not in said
    (request_id,) = [word for word in said.split() if word.startswith("grpc-")]
    assert "RuntimeError: boom" in caplog.text
    assert request_id in caplog.text
    # The process lives, and another driver does the work.
    assert server.drivers._driver is not before
    assert decode(stub, of_text("a")) == expected
    assert stub.HealthCheck(messages.HealthCheckRequest()).is_live


def test_the_root_logger_is_left_alone():
    assert logging.getLogger().level != logging.DEBUG
