"""Prompts as training builds them, and limits that follow from the run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from nrt_jax.config.serving import ServingConfig
from nrt_jax.data.row_tokens import RowTokenizer
from nrt_jax.engine.generate import generate
from nrt_jax.engine.requests import Request
from nrt_jax.engine.sampling import Sampling
from nrt_jax.errors import InputError
from nrt_jax.serving.chat import Chat
from nrt_jax.serving.protocol import ApiError
from nrt_jax.serving.request_fields import ChatRequest
from nrt_jax.serving.served_model import find_limits, open_served, serve_model
from tests.data.templates import TEMPLATES
from tests.serving.models import NEW, PROMPT, TRACE
from tests.serving.runs import STEP, write_chat_model, write_run

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Zürich <|eot_id|> 🙂"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "  why?\n"},
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run whose template is plain, from its directory."""
    run = write_run(tmp_path_factory.mktemp("plain"), "sft")
    return open_served(run / "checkpoints" / str(STEP), ServingConfig())


def with_rollout(served, **settings):
    """The same weights with other settings of the run's rollouts."""
    rollout = served.opened.config.rollout.model_copy(update=settings)
    config = served.opened.config.model_copy(update={"rollout": rollout})
    return serve_model(dataclasses.replace(served.opened, config=config), ServingConfig())


@pytest.mark.parametrize("turns", [1, 2, 4])
def test_a_conversation_is_that_of_transformers(served, turns):
    theirs = transformers.AutoTokenizer.from_pretrained(served.tokenizer.directory)
    messages = CONVERSATION[-1:] if turns == 1 else CONVERSATION[:turns]
    if turns != 1:
        # There the name of a special token inside a text is that token.
        messages = [m | {"content": m["content"].replace("<|eot_id|>", "")} for m in messages]
    expected = theirs.apply_chat_template(
        messages,
        chat_template=TEMPLATES["llama3"],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert served.chat_prompt(messages).tolist() == expected


def test_a_chat_follows_what_the_template_opens(tmp_path):
    """The prompt that is served is that of transformers, t_start and the break after it once."""
    names = ("<think>", "</think>")
    template = TEMPLATES["llama3"] + "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    model = write_chat_model(tmp_path / "model", template, think=names)
    named = [f"data.think_start={names[0]}", f"data.think_end={names[1]}"]
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    chat = CONVERSATION[-1:]
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    body = ChatRequest(model="model", messages=chat)
    limits = [*named, f"data.max_prompt_tokens={len(ids) - 1}"]
    served = open_served(model, ServingConfig(), limits)
    assert Chat.prepare(served, body, sequences=1, top=0).prompt.tolist() == ids
    small = open_served(model, ServingConfig(), [*named, f"data.max_prompt_tokens={len(ids) - 2}"])
    with pytest.raises(ApiError, match=f"has {len(ids) - 1} tokens; {len(ids) - 2} are the most"):
        Chat.prepare(small, body, sequences=1, top=0)


def test_a_text_spells_no_control_token(served):
    prompt = served.chat_prompt(CONVERSATION).tolist()
    clean = [turn | {"content": turn["content"].replace("<|eot_id|>", "")} for turn in CONVERSATION]
    ends = served.tokenizer.eos_id
    assert prompt.count(ends) == served.chat_prompt(clean).tolist().count(ends)


def test_a_plain_run_takes_one_question(plain):
    question = [{"role": "user", "content": "1+2+3"}]
    data = plain.opened.config.data
    expected = RowTokenizer(data, plain.tokenizer).of_question("1+2+3").tolist()
    assert plain.chat_prompt(question).tolist() == expected
    assert plain.text_prompt("1+2+3").tolist() == expected
    for messages in (question * 2, [{"role": "system", "content": "1"}], []):
        with pytest.raises(InputError, match="no place for other turns"):
            plain.chat_prompt(messages)
    with pytest.raises(InputError, match="cannot spell"):
        plain.chat_prompt([{"role": "user", "content": "1+x"}])
    with pytest.raises(InputError, match="cannot spell"):
        plain.text_prompt("1+x")


def test_a_run_goes_by_the_name_of_its_directory(plain):
    assert plain.name == "run"
    assert plain.opened.step == STEP
    assert not plain.reasons


def test_limits(served):
    run = served.opened.config
    limits = find_limits(run, ServingConfig())
    assert (limits.prompt, limits.new, limits.trace) == (PROMPT, NEW, TRACE)
    assert limits.context == PROMPT + NEW
    small = find_limits(run, ServingConfig(max_prompt_tokens=5, max_new_tokens=8))
    # t_start, a trace of 5, t_end and one token of an answer.
    assert (small.prompt, small.new, small.trace) == (5, 8, 5)
    with pytest.raises(InputError, match="max_new_tokens=3: t_start, trace, t_end and answer"):
        find_limits(run, ServingConfig(max_new_tokens=3))


def test_too_many_stop_tokens(served):
    with pytest.raises(InputError, match=r"rollout.stop_tokens: 17 tokens .* 16 are the most"):
        with_rollout(served, stop_tokens=list("abcdefghijklmnopq"))


def test_a_run_whose_traces_only_t_end_ends_is_served_so(served):
    """The answers draw the tokens that are banned from traces."""
    engine = with_rollout(served, stop_tokens="think_end").engine(2)
    others = served.tokenizer.special_ids - {served.tokenizer.think_end_id}
    question = np.asarray(
        [*served.chat_prompt([{"role": "user", "content": "1"}]), served.tokenizer.think_start_id],
        np.int32,
    )
    for in_trace in (True, False):
        hot = Sampling(temperature=1e3, obeys_bans=in_trace)
        requests = [Request(question, stream, 2, NEW, hot) for stream in range(12)]
        groups = generate(engine, served.opened.params, requests, jax.random.key(0))
        ends = {trace.end_token for group in groups for trace in group}
        assert bool(ends & others) is not in_trace


def test_an_engine_decodes_as_the_run_does(served):
    rollout = {"dtype": "bfloat16", "cache_dtype": "int8", "prefill_chunk": 32}
    engine = with_rollout(served, **rollout).engine(4, top_logprobs=2)
    caches = jax.tree.leaves(engine.init_decode_state().layers)
    assert jnp.dtype("int8") in {leaf.dtype for leaf in caches}
    assert engine.empty_prefix(16).k_LRHSd.dtype == jnp.bfloat16
    assert engine.prefill_chunk == 32
    assert engine.max_concurrent_decodes == 4
    assert engine.top_logprobs == 2
    with pytest.raises(InputError, match=r"rollout.attention: pallas: there is no kernel for the"):
        with_rollout(served, attention="pallas").engine(4)
