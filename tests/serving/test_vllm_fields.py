"""Fields that vLLM's clients send: they do what vLLM says, or ask for nothing, or are refused."""

import pytest

from tests.serving.models import NEW

TEXT = "Natalia sold clips to 48"
NEUTRAL = {
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "ignore_eos": False,
    "min_tokens": 0,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "early_stopping": False,
    "stop_token_ids": [],
    "truncate_prompt_tokens": None,
    "prompt_logprobs": None,
    "allowed_token_ids": None,
    "bad_words": [],
    "logits_processors": None,
    "guided_json": None,
    "guided_choice": None,
    "structured_outputs": None,
    "response_format": {"type": "text"},
    "priority": 0,
    "detokenize": True,
    "return_tokens_as_token_ids": False,
    "return_token_ids": None,
    "request_id": "mine",
    "cache_salt": "mine",
    "kv_transfer_params": None,
    "parallel_tool_calls": True,
    "user": "me",
    "store": True,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "seed": None,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": None,
    "best_of": None,
    "stop": [],
    "n": 1,
}
OF_CHATS = {
    "add_generation_prompt": True,
    "continue_final_message": False,
    "add_special_tokens": False,
    "chat_template_kwargs": {"enable_thinking": True},
    "chat_template": None,
    "documents": None,
    "echo": False,
    "include_reasoning": True,
    "tools": None,
    "tool_choice": "none",
    "reasoning_effort": None,
}


def test_what_asks_for_nothing_changes_nothing(live):
    assert live.complete(TEXT, **NEUTRAL).json["choices"] == live.complete(TEXT).json["choices"]
    chat = live.chat(TEXT, **NEUTRAL, **OF_CHATS)
    assert chat.json["choices"] == live.chat(TEXT).json["choices"]
    options = {"include_usage": True, "continuous_usage_stats": False, "include_obfuscation": True}
    assert live.complete(TEXT, stream=True, stream_options=options).chunks[-1]["usage"]


def ended(live, served, **fields):
    """A request, by its seed, that a special token ends early."""
    special = {served.token_texts[token] for token in served.tokenizer.special_ids}
    for seed in range(200):
        body = {"temperature": 2.0, "seed": seed, "max_tokens": NEW - 4, "logprobs": 0}
        (choice,) = live.complete(TEXT, **body).json["choices"]
        if choice["finish_reason"] == "stop" and len(choice["logprobs"]["tokens"]) > 2:
            assert choice["logprobs"]["tokens"][-1] in special
            return body, choice
    raise AssertionError("no sequence ends")


@pytest.fixture(scope="module")
def stopped(live, served):
    return ended(live, served)


def test_ignore_eos(live, stopped):
    """The same noise: what was drawn before the end is drawn again, and it goes on."""
    body, before = stopped
    answer = live.complete(TEXT, **body, ignore_eos=True).json
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == body["max_tokens"]
    tokens = before["logprobs"]["tokens"]
    assert choice["logprobs"]["tokens"][: len(tokens)] == tokens
    assert choice["text"].startswith(before["text"])
    assert tokens[-1] not in choice["text"]
    (shown,) = live.complete(TEXT, **body, ignore_eos=True, skip_special_tokens=False).json[
        "choices"
    ]
    assert shown["text"].startswith(before["text"] + tokens[-1])
    stream = live.complete(
        TEXT, **body, ignore_eos=True, skip_special_tokens=False, stream=True
    ).chunks
    assert "".join(chunk["choices"][0]["text"] for chunk in stream) == shown["text"]


def test_min_tokens(live, stopped):
    body, before = stopped
    least = len(before["logprobs"]["tokens"]) + 2
    (choice,) = live.complete(TEXT, **body, min_tokens=least).json["choices"]
    tokens = choice["logprobs"]["tokens"]
    assert len(tokens) > least
    assert before["logprobs"]["tokens"][-1] not in tokens[:least]


def test_the_stop_text_can_be_part_of_the_answer(live):
    whole = live.complete(TEXT, max_tokens=NEW).json["choices"][0]["text"]
    stop = whole[10:12]
    end = whole.index(stop)
    cut = live.complete(TEXT, max_tokens=NEW, stop=stop).json["choices"][0]
    kept = live.complete(TEXT, max_tokens=NEW, stop=stop, include_stop_str_in_output=True)
    (kept,) = kept.json["choices"]
    assert (cut["text"], kept["text"]) == (whole[:end], whole[:end] + stop)
    assert cut["finish_reason"] == kept["finish_reason"] == "stop"


def test_a_stop_token_can_be_part_of_the_answer(live, served, reference):
    prompt = [served.tokenizer.bos_id, *served.tokenizer.encode(TEXT)]
    ((tokens, _),) = reference.tokens(prompt, 16)
    at = next(i for i in range(4, 16) if tokens[i] not in tokens[:i])
    fields = {"max_tokens": 16, "stop_token_ids": [tokens[at]]}
    kept = live.complete(TEXT, include_stop_str_in_output=True, **fields).json["choices"][0]
    assert kept["text"] == served.tokenizer.decode(tokens[: at + 1])


def test_a_text_without_special_tokens(live, served):
    ids = served.tokenizer.encode(TEXT)
    bare = live.complete(TEXT, add_special_tokens=False).json
    assert bare["usage"]["prompt_tokens"] == len(ids)
    assert bare["choices"] == live.complete(ids).json["choices"]


def test_ends_of_chats_are_about_the_answer(live):
    plain = live.chat(TEXT).json
    trace = plain["choices"][0]["message"]["reasoning_content"]
    more = live.chat(TEXT, ignore_eos=True, min_tokens=5, max_tokens=NEW - 4).json
    assert more["choices"][0]["message"]["reasoning_content"] == trace
    assert more["usage"]["completion_tokens"] == NEW - 4
    assert more["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fields", "param", "instead"),
    [
        ({"guided_json": {"type": "object"}}, "guided_json", "check the form of the answer"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "shorten the prompt"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "with echo and logprobs"),
        ({"use_beam_search": True}, "use_beam_search", "several answers with n"),
        ({"presence_penalty": 1}, "presence_penalty", "set repetition_penalty"),
        ({"continue_final_message": True}, "continue_final_message", "/v1/completions"),
        ({"add_generation_prompt": False}, "add_generation_prompt", "/v1/completions"),
        ({"chat_template": "x"}, "chat_template", "data.template_file"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "max_reasoning_tokens"),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            "chat_template_kwargs.enable_thinking",
            "this model always reasons, max_reasoning_tokens bounds it",
        ),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs.a", "leave it out"),
        ({"max_token": 5}, "max_token", "did you mean max_tokens?"),
        ({"prompt": "a"}, "prompt", "/v1/completions has it"),
        ({"qqqq": "a"}, "qqqq", "is no field of this request; leave it out"),
    ],
)
def test_what_to_do_instead(live, fields, param, instead):
    answer = live.chat(TEXT, **fields)
    assert answer.status == 400
    assert answer.error["param"] == param
    assert instead in answer.error["message"]


def test_a_name_that_occurs_twice(live):
    body = b'{"model": "tiny", "prompt": "a", "stop": "a", "stop": "b"}'
    answer = live.post("/v1/completions", body)
    assert answer.status == 400
    assert "the key 'stop' occurs twice in one object" in answer.error["message"]
