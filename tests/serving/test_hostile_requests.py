"""Requests that no client should send: each is refused alone, in one line, and others go on."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.live import Live

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
COMPLETION = {"model": "tiny", "prompt": "a", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
USER = {"role": "user", "content": "a"}
GOOD = {"max_tokens": 12, "temperature": 1, "seed": 5, "top_k": 40, "min_tokens": 3}
DEEP = 900
"""Levels of nesting that JSON still reads."""

FIELDS = [
    *({"top_k": value} for value in (2**31, 2**63, 2**64, -2, 1.0, True, "5", [5], {}, 10**400)),
    *({"seed": value} for value in (2**63, -(2**63) - 1, 10**400, 1.0, True, "1", [1])),
    *({"min_tokens": value} for value in (-1, 2**31, 2**64, 3, 1.5, False, "1")),
    *({"n": value} for value in (0, -1, 129, 2**31, 2**64, 1.0, True, "1", [])),
    *({"temperature": value} for value in (-1e-9, 2.1, 10**400, 1e308, "nan", True, [1.0])),
    *({"top_p": value} for value in (0, -1, 1.1, 10**400, False, "0.5")),
    *({"min_p": value} for value in (-0.1, 1.1, 10**400, True, {})),
    *({"repetition_penalty": value} for value in (0, -1, 1e-30, 101, 10**400, True, "1")),
    *({"max_tokens": value} for value in (-1, 33, 2**31, 2**63, 10**400, 1.0, True, "1")),
    *({"best_of": value} for value in (2, 2**31, 1.0, "1")),
    *({"stop": value} for value in ("", ["a"] * 17, ["a", ""], [1], 5, {}, [["a"]])),
    *({"stop_token_ids": value} for value in ([-1], [2**31], [10**400], [True], [0.0], "1")),
    *({"stop_token_ids": value} for value in (list(range(17)), [613], 5, [[1]])),
    *({"stream": value} for value in (1, "yes", [])),
    *({"stream_options": value} for value in ({}, [], {"include_usage": 1}, {"other": True})),
    *({"ignore_eos": value} for value in (1, "true", [])),
    *({"skip_special_tokens": value} for value in (0, "false")),
    *({"include_stop_str_in_output": value} for value in (1, "true")),
    *({"logit_bias": value} for value in ({"5": 1}, {"x": 10**400}, [1])),
    *({"presence_penalty": value} for value in (0.1, 10**400, "0")),
    *({"response_format": value} for value in ({"type": "json_object"}, "text", [])),
    *({name: {"type": "object"}} for name in ("guided_json", "structured_outputs")),
    *({name: "a|b"} for name in ("guided_regex", "guided_grammar", "guided_decoding_backend")),
    *({"truncate_prompt_tokens": value} for value in (5, -1, 10**400)),
    {"use_beam_search": True},
    {"prompt_logprobs": 1},
    {"allowed_token_ids": [5]},
    {"bad_words": ["a"]},
    {"priority": 1},
    {"nobody": 1},
    {"x" * 100_000: 1},
    {"model": 5},
    {"model": ["tiny"]},
]
OF_COMPLETIONS = [
    *({"prompt": value} for value in (5, 1.5, True, {}, [], [[]], [None], [1.0], ["a", 5])),
    *({"prompt": value} for value in ([10**400], [[2**31]], [[-1]], [[True]], [613], "a" * 10_000)),
    *({"prompt": value} for value in (["a"] * 129, [5] * 129, [[5]] * 1000)),
    {"prompt": None},
    *({"logprobs": value} for value in (-1, 6, 2**31, True, 1.0, "1")),
    *({"echo": value} for value in (1, "true", [])),
    {"suffix": "b"},
    {"max_tokens": 0},
    {"messages": [USER]},
    {"add_special_tokens": 1},
]
OF_CHATS = [
    *({"messages": value} for value in (None, [], {}, "a", [None], [5], ["a"], [[]], [[USER]])),
    *({"messages": [value]} for value in ({}, {"role": "user"}, {"content": "a"})),
    *({"messages": [USER | {"role": value}]} for value in ("tool", "function", "bot", 5, None, [])),
    *({"messages": [USER | {"content": value}]} for value in (None, "", " ", [], 5, {}, True)),
    *(
        {"messages": [USER | {"content": [value]}]}
        for value in (
            5,
            None,
            {},
            {"type": "text"},
            {"type": "text", "text": 5},
            {"type": "image_url", "image_url": {"url": "data:"}},
            {"type": "input_audio", "input_audio": {}},
            {"type": ["text"], "text": "a"},
        )
    ),
    {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
    {"messages": [USER, {"role": "assistant", "content": None, "refusal": "no"}]},
    {"messages": [USER] * 5000},
    *({"logprobs": value} for value in (1, "true", [])),
    *({"top_logprobs": value, "logprobs": True} for value in (-1, 21, 6, True, 1.0)),
    *({"max_reasoning_tokens": value} for value in (0, 13, 2**31, 10**400, True)),
    *({"max_completion_tokens": value} for value in (0, 31, 2**64, 1.0)),
    {"add_generation_prompt": False},
    {"continue_final_message": True},
    {"chat_template": "{{ messages }}"},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"chat_template_kwargs": {"x": 1}},
    {"chat_template_kwargs": []},
    {"documents": [{}]},
    {"echo": True},
    {"tools": [{"type": "function"}]},
    {"tool_choice": "required"},
    {"prompt": "a"},
]
BODIES = [
    b"",
    b"null",
    b"5",
    b"{",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"\x00",
    b"\xff\xfe",
    b'{"model":"tiny","prompt":"a","seed":1,"seed":2}',
    b'{"model":"tiny","prompt":"a","top_k":NaN}',
    b'{"model":"tiny","prompt":"a","top_p":-Infinity}',
    b'{"model":"tiny","prompt":"a","temperature":1e400}',
    b'{"model":"tiny","prompt":"a","top_k":1e400}',
    b'{"model":"tiny","prompt":"a","top_k":' + b"9" * 5000 + b"}",
    b'{"model":"tiny","prompt":[' + b"9" * 5000 + b"]}",
    b'{"model":"tiny","prompt":[1e400]}',
    b'{"model":"tiny","prompt":"\\ud800"}',
    *(
        b'{"model":"tiny","messages":[' + b"[" * deep + b"]" * deep + b"]}"
        for deep in range(940, 1000, 3)
    ),
    b'{"model":"tiny","prompt":' + b"[" * DEEP + b"]" * DEEP + b"}",
    b'{"model":"tiny","messages":' + b"[" * DEEP + b"]" * DEEP + b"}",
    b'{"model":"tiny","prompt":"a","logit_bias":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
]


def cases() -> Iterator[tuple[str, bytes]]:
    """Paths and bodies."""
    for path, base, fields in (
        (COMPLETIONS, COMPLETION, FIELDS + OF_COMPLETIONS),
        (CHATS, CHAT, FIELDS + OF_CHATS),
    ):
        yield from ((path, json.dumps(base | more).encode()) for more in fields)
        yield from ((path, body) for body in BODIES)


@pytest.fixture(scope="module")
def neighbour(live) -> Iterator[tuple[ThreadPoolExecutor, str]]:
    """Who asks for the same all the time, and what the answer is."""
    expected = live.complete("Die Straße", **GOOD).json["choices"][0]["text"]
    with ThreadPoolExecutor(1) as pool:
        yield pool, expected


CASES = list(cases())
SHARES = 8


@pytest.mark.parametrize("share", range(SHARES))
def test_hostile_requests(live: Live, neighbour, share):
    pool, expected = neighbour
    for path, body in CASES[share::SHARES]:
        beside = pool.submit(live.complete, "Die Straße", **GOOD)
        answer = live.post(path, body)
        shown = body[:200]
        assert answer.status in (400, 404), (shown, answer.text)
        message = answer.error["message"]
        assert message, shown
        assert "\n" not in answer.text, shown
        assert len(answer.text) < 1000, shown
        assert answer.error["type"] == "invalid_request_error", shown
        good = beside.result()
        assert good.status == 200, shown
        assert good.json["choices"][0]["text"] == expected, shown


def test_the_table_is_long_and_nothing_is_left_in_the_engine(live):
    assert len(CASES) > 300
    assert live.metric("nrt_engine_errors_total") == 0
    assert live.api.engine.slots_in_use == 0
    assert live.api.admission.running == live.api.admission.waiting == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 5e-324},
        {"temperature": 1e-40},
        {"top_p": 5e-324},
        {"min_p": 5e-324},
        {"repetition_penalty": 0.01, "temperature": 1e-5},
        {"repetition_penalty": 100, "temperature": 1e-4},
        {"top_k": 2**31 - 1},
        {"top_k": 614},
        {"seed": 2**63 - 1},
        {"seed": -(2**63)},
        {"seed": -1},
        {"stop": [f"{i} none" for i in range(16)]},
        {"stop_token_ids": list(range(16))},
        {"stop": ["a" * 100_000]},
    ],
)
def test_extreme_values_are_served(live, fields):
    answer = live.complete("a", **{"temperature": 1, "logprobs": 2, **fields})
    assert answer.status == 200, answer.text
    for logprob in answer.json["choices"][0]["logprobs"]["token_logprobs"]:
        assert -10_000 < logprob <= 0
    assert live.chat("a", **{"temperature": 1, **fields}).status == 200
