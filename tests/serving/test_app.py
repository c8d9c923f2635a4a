"""Completions and chats over HTTP, against the engine asked for one sequence at a time."""

import dataclasses
import json

import numpy as np
import pytest

from nrt_jax.config.serving import ServingConfig
from nrt_jax.serving.detokenize import prompt_offsets
from nrt_jax.serving.logprobs import REPLACEMENT
from nrt_jax.serving.server import make_server
from tests.serving.conftest import SETTINGS
from tests.serving.live import Live, listening, wait_until
from tests.serving.models import NEW, TRACE, TRACE_STOPS, Reference

TEXTS = ["Natalia sold clips to 48", "Die Straße über die Brücke", "数学的な推論", "a"]


def ids(served, text: str) -> list[int]:
    return [served.tokenizer.bos_id, *served.tokenizer.encode(text)]


def text_of(answer, index: int = 0) -> str:
    return answer.json["choices"][index]["text"]


# --- completions ----------------------------------------------------------------------------------


def test_greedy_completions_are_those_of_the_engine(live, served, reference):
    answer = live.complete(TEXTS, max_tokens=16)
    assert answer.status == 200
    choices = answer.json["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for text, choice in zip(TEXTS, choices, strict=True):
        ((tokens, end),) = reference.tokens(ids(served, text), 16)
        assert choice["text"] == served.tokenizer.decode(tokens)
        assert choice["finish_reason"] == ("length" if end is None else "stop")
    usage = answer.json["usage"]
    assert usage["prompt_tokens"] == sum(len(ids(served, text)) for text in TEXTS)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_four_kinds_of_prompt(live, served):
    one = text_of(live.complete(TEXTS[0]))
    assert text_of(live.complete([TEXTS[0]])) == one
    assert text_of(live.complete(ids(served, TEXTS[0]))) == one
    many = live.complete([ids(served, text) for text in TEXTS[:2]])
    assert [choice["text"] for choice in many.json["choices"]] == [
        one,
        text_of(live.complete(TEXTS[1])),
    ]


def test_seeds_copies_and_sampling_settings(live, served, reference):
    settings = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01}
    settings["repetition_penalty"] = 1.2
    answer = live.complete(TEXTS[:2], n=3, seed=11, max_tokens=9, **settings)
    texts = [choice["text"] for choice in answer.json["choices"]]
    expected = [
        served.tokenizer.decode(tokens)
        for stream, text in enumerate(TEXTS[:2])
        for tokens, _ in reference.tokens(
            ids(served, text), 9, seed=11, stream=stream, copies=3, **settings
        )
    ]
    assert texts == expected
    assert len(set(texts)) == 6


def test_without_a_seed_no_two_answers_are_alike(live):
    drawn = {text_of(live.complete(TEXTS[0], temperature=1, max_tokens=12)) for _ in range(4)}
    assert len(drawn) == 4


def test_stop_texts_may_span_tokens(live, served, reference):
    ((tokens, _),) = reference.tokens(ids(served, TEXTS[0]), 24)
    whole, offsets = prompt_offsets(served.tokenizer, tokens)
    # Around the beginning of a token, late in the text, that nothing before it looks like.
    stop = next(
        whole[at - 1 : at + 2]
        for at in offsets[12:]
        if whole.find(whole[at - 1 : at + 2]) == at - 1
    )
    answer = live.complete(TEXTS[0], max_tokens=24, stop=["never there", stop], logprobs=0)
    assert text_of(answer) == whole[: whole.index(stop)]
    choice = answer.json["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert all(offset < len(choice["text"]) for offset in choice["logprobs"]["text_offset"])
    assert answer.json["usage"]["completion_tokens"] < 24


def test_stop_token_ids(live, served, reference):
    ((tokens, _),) = reference.tokens(ids(served, TEXTS[0]), 16)
    at = next(i for i in range(4, 16) if tokens[i] not in tokens[:i])
    answer = live.complete(TEXTS[0], max_tokens=16, stop_token_ids=[tokens[at]], logprobs=0)
    scored = answer.json["choices"][0]["logprobs"]["tokens"]
    assert scored == [served.token_texts[token] for token in tokens[: at + 1]]
    assert text_of(answer) == served.tokenizer.decode(tokens[:at])
    assert answer.json["choices"][0]["finish_reason"] == "stop"
    assert answer.json["usage"]["completion_tokens"] == at + 1


@pytest.mark.parametrize(
    "fields", [{}, {"n": 2, "temperature": 1, "seed": 5}, {"stop": ["e", "т"]}]
)
@pytest.mark.parametrize("echo", [False, True])
def test_streams_join_to_the_whole(live, fields, echo):
    fields = {"max_tokens": 20, "logprobs": 2, "echo": echo, **fields}
    whole = live.complete(TEXTS, **fields).json
    stream = live.complete(TEXTS, stream=True, stream_options={"include_usage": True}, **fields)
    assert stream.headers["content-type"].startswith("text/event-stream")
    *chunks, last = stream.chunks
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [p["finish_reason"] for p in parts if p["finish_reason"]] == [
            choice["finish_reason"]
        ]
        for name, values in choice["logprobs"].items():
            joined = [value for part in parts for value in part["logprobs"][name]]
            if name in ("tokens", "text_offset"):
                assert joined == values
            else:
                assert flat(joined) == pytest.approx(flat(values), abs=1e-5)
    assert len(chunks) > len(whole["choices"])


def flat(values: list) -> list[float]:
    """Logprobs of a list, or of a list of dictionaries, without those that are null."""
    rows = [v if isinstance(v, dict) else {"": v} for v in values if v is not None]
    return [row[key] for row in rows for key in sorted(row) if row[key] is not None]


def test_no_chunk_has_half_a_character(live, served):
    prompt = ids(served, TEXTS[2])
    for seed in range(6):
        fields = {"temperature": 1, "seed": seed, "max_tokens": NEW}
        whole = text_of(live.complete(prompt, **fields))
        texts = [
            chunk["choices"][0]["text"]
            for chunk in live.complete(prompt, stream=True, **fields).chunks
        ]
        assert "".join(texts) == whole
        for text in texts[:-1]:
            assert not text.endswith(REPLACEMENT)


# --- logprobs ------------------------------------------------------------------------------------


def forward_logprobs(served, tokens: list[int]) -> np.ndarray:
    """log pi(token i + 1 | tokens <= i) of every vocabulary entry, from one plain forward."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    model = nnx.merge(served.opened.model.definition, served.opened.params)
    logits = model(jnp.asarray(tokens, jnp.int32)[None])[0]
    return np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1))


@pytest.mark.parametrize("max_tokens", [0, 6])
def test_echoed_logprobs_are_those_of_a_plain_forward(live, served, max_tokens):
    answer = live.complete(TEXTS[1], echo=True, logprobs=3, max_tokens=max_tokens)
    (choice,) = answer.json["choices"]
    assert choice["text"].startswith(TEXTS[1])
    scores, tokens = choice["logprobs"], ids(served, TEXTS[1])
    generated = served.tokenizer.encode(choice["text"][len(TEXTS[1]) :])
    names = [served.token_texts[token] for token in tokens]
    assert scores["tokens"][: len(tokens)] == names
    assert len(scores["tokens"]) == len(tokens) + max_tokens
    assert scores["token_logprobs"][0] is None
    assert scores["top_logprobs"][0] is None
    expected = forward_logprobs(served, tokens)
    got = scores["token_logprobs"][1 : len(tokens)]
    want = [expected[i, token] for i, token in enumerate(tokens[1:])]
    np.testing.assert_allclose(got, want, atol=1e-4)
    for i, top in enumerate(scores["top_logprobs"][1 : len(tokens)]):
        best = np.sort(expected[i])[::-1][:3]
        np.testing.assert_allclose(sorted(top.values())[::-1][:3], best, atol=1e-4)
    if not max_tokens:
        assert generated == []
        assert choice["finish_reason"] == "length"
        assert answer.json["usage"]["completion_tokens"] == 0


def test_logprobs_of_what_is_written(live, served, reference):
    prompt = ids(served, TEXTS[0])
    ((tokens, _),) = reference.tokens(prompt, 8)
    (choice,) = live.complete(prompt, max_tokens=8, logprobs=1).json["choices"]
    scores = choice["logprobs"]
    expected = forward_logprobs(served, prompt + tokens)
    want = [expected[len(prompt) - 1 + i, token] for i, token in enumerate(tokens)]
    np.testing.assert_allclose(scores["token_logprobs"], want, atol=1e-4)
    assert scores["tokens"] == [served.token_texts[token] for token in tokens]
    for logprob, top in zip(scores["token_logprobs"], scores["top_logprobs"], strict=True):
        # Greedy: none is more probable.
        assert logprob == max(top.values())


# --- chat -----------------------------------------------------------------------------------------


def chat_ids(served, text: str) -> list[int]:
    turns = [{"role": "user", "content": text}]
    return served.rows.of_messages(turns).tolist()


def expected_chat(served, reference, text: str, trace_limit: int = TRACE, seed=0, **sampling):
    """Trace and answer as evaluation has them."""
    opened = [*chat_ids(served, text), served.tokenizer.think_start_id]
    ends = frozenset(served.tokenizer.find(name) for name in TRACE_STOPS)
    ((trace, end),) = reference.tokens(opened, trace_limit, seed=seed, stop_ids=ends, **sampling)
    used = len(trace) + (end is not None)
    closed = [*opened, *trace, served.tokenizer.think_end_id]
    ((answer, _),) = reference.tokens(closed, NEW - 2 - used, seed=seed, stream=1, **sampling)
    decode = served.tokenizer.decode
    return decode(trace), decode(answer), used


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 4}])
def test_a_chat_reasons_and_then_answers(live, served, reference, sampling):
    trace, answer, used = expected_chat(served, reference, TEXTS[0], **sampling)
    got = live.chat(TEXTS[0], **sampling).json
    (choice,) = got["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": answer,
        "reasoning_content": trace,
    }
    assert got["usage"]["completion_tokens_details"] == {"reasoning_tokens": used}
    assert got["usage"]["prompt_tokens"] == len(chat_ids(served, TEXTS[0])) + 1


def test_a_trace_at_its_limit_is_closed(live, served, reference):
    trace, answer, used = expected_chat(served, reference, TEXTS[1], trace_limit=5)
    (choice,) = live.chat(TEXTS[1], max_reasoning_tokens=5).json["choices"]
    assert used == 5
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == (trace, answer)


def test_the_runs_own_stop_tokens_end_a_trace(served, reference):
    assert served.trace_stop_ids == {served.tokenizer.find(name) for name in TRACE_STOPS}
    opened = [*chat_ids(served, TEXTS[0]), served.tokenizer.think_start_id]
    ((trace, _),) = reference.tokens(opened, TRACE)
    at = next(i for i in range(3, TRACE) if trace[i] not in trace[:i])
    stopped = dataclasses.replace(served, trace_stop_ids=frozenset({trace[at]}))
    with listening(make_server(stopped, ServingConfig(**SETTINGS))) as live:
        got = live.chat(TEXTS[0]).json
    message = got["choices"][0]["message"]
    assert message["reasoning_content"] == served.tokenizer.decode(trace[:at])
    assert got["usage"]["completion_tokens_details"] == {"reasoning_tokens": at + 1}
    closed = [*opened, *trace[:at], served.tokenizer.think_end_id]
    assert message["content"] == reference.text(closed, NEW - 2 - at - 1, stream=1)


def test_max_tokens_bound_trace_and_answer_together(live):
    got = live.chat(TEXTS[0], max_completion_tokens=TRACE).json
    (choice,) = got["choices"]
    assert choice["message"]["content"] == ""
    assert choice["finish_reason"] == "length"
    assert got["usage"]["completion_tokens"] == TRACE
    got = live.chat(TEXTS[0], max_tokens=TRACE + 3).json
    assert got["usage"]["completion_tokens"] == TRACE + 3


def test_a_run_that_does_not_reason_answers_at_once(live_direct, direct):
    (choice,) = live_direct.chat(TEXTS[0]).json["choices"]
    expected = Reference(direct).text(chat_ids(direct, TEXTS[0]), NEW)
    assert choice["message"] == {"role": "assistant", "content": expected}


def test_a_conversation_with_parts_and_roles(live, served, reference):
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "reasoning_content": "forgotten"},
        {"role": "user", "content": "d"},
    ]
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    got = live.chat(turns).json
    assert got["choices"] == live.chat(plain).json["choices"]
    x = served.rows.of_messages(plain)
    assert got["usage"]["prompt_tokens"] == len(x) + 1


def test_chat_streams_join_to_the_whole(live):
    fields = {"n": 2, "temperature": 1, "seed": 9, "logprobs": True, "top_logprobs": 2}
    whole = live.chat(TEXTS[1], **fields).json
    *chunks, last = live.chat(
        TEXTS[1], stream=True, stream_options={"include_usage": True}, **fields
    ).chunks
    assert last["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        for name in ("content", "reasoning_content"):
            joined = "".join(part["delta"].get(name, "") for part in parts)
            assert joined == choice["message"][name]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        tokens = [
            entry["token"]
            for part in parts
            if part["logprobs"]
            for entry in part["logprobs"]["content"]
        ]
        assert tokens == [entry["token"] for entry in choice["logprobs"]["content"]]
        assert all(len(entry["top_logprobs"]) == 2 for entry in choice["logprobs"]["content"])
    # The trace comes before the answer.
    kinds = [next(iter(c["choices"][0]["delta"]), "") for c in chunks if c["choices"][0]["delta"]]
    assert kinds.index("reasoning_content") < len(kinds) - kinds[::-1].index("content")


# --- the rest -------------------------------------------------------------------------------------


def test_models_health_and_metrics(live):
    (card,) = live.get("/v1/models").json["data"]
    assert (card["id"], card["object"], card["step"]) == ("tiny", "model", 7)
    assert live.get("/v1/models/tiny").json == card
    assert live.get("/v1/models/other").error["code"] == "model_not_found"
    assert live.get("/health").json == {"status": "ok"}
    before = live.metric("nrt_generated_tokens_total")
    answered = live.metric("nrt_requests_total", route="/v1/completions", status="200")
    live.complete(TEXTS[0], max_tokens=7)
    assert live.metric("nrt_generated_tokens_total") == before + 7
    labels = {"route": "/v1/completions", "status": "200"}
    # A request is counted when all of its answer has been handed over.
    wait_until(lambda: live.metric("nrt_requests_total", **labels) == answered + 1)
    shown = live.get("/metrics")
    assert "nrt_time_to_first_token_seconds_bucket" in shown.text
    assert "nrt_slots_in_use 0.0" in shown.text


def test_every_answer_has_an_id_of_its_own(live: Live):
    answers = [live.complete("a", max_tokens=1) for _ in range(2)] + [live.get("/nothing")]
    seen = {answer.headers["x-request-id"] for answer in answers}
    assert len(seen) == 3
    assert answers[0].json["id"] == f"cmpl-{answers[0].headers['x-request-id']}"
    json.loads(answers[2].text)
