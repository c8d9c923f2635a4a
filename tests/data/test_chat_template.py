"""Prompts as text and as tokens."""

from nrt_jax.data.chat_template import render
from nrt_jax.data.config import DataConfig
from nrt_jax.data.pipeline import load_dataset

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "1+2?</s>"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "not part of it"},
]
BEFORE_EOS = "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHello"
AFTER_EOS = "\n<|user|>\n1+2?</s>\n<|assistant|>\n"


def config(**values) -> DataConfig:
    return DataConfig(source="chain_addition", tokenizer="unused", **values)


def test_plain_is_the_question_as_it_is():
    fields = {"query": " 1+2\n", "reply": " 3 ", "question": "other", "messages": TURNS}
    rendered = render(fields, config(question_field="query", answer_field="reply"))
    assert rendered == ((" 1+2\n",), " 3 ")


def test_tulu_question():
    rendered = render({"question": "1+2", "answer": "3"}, config(template="tulu"))
    assert rendered == (("<|user|>\n1+2\n<|assistant|>\n",), "3")


def test_tulu_messages_stop_before_the_last_assistant_turn():
    rendered = render({"chat": TURNS}, config(template="tulu", messages_field="chat"))
    assert rendered == ((BEFORE_EOS, AFTER_EOS), "3")


def test_an_empty_system_turn_is_fine():
    turns = [{"role": "system", "content": ""}, *TURNS[1:3]]
    rendered = render({"messages": turns}, config(template="tulu"))
    assert rendered == (("<|system|>\n\n<|user|>\nHi\n<|assistant|>\n",), "Hello")


def test_only_the_template_writes_control_ids(
    mistral_directory, mistral, mistral_reference, write_rows
):
    """The eos between turns is the token; the one that a user wrote is text."""
    run = DataConfig(
        source="jsonl",
        path=write_rows([{"messages": TURNS}]),
        tokenizer=mistral_directory,
        template="tulu",
        eval_rows=0,
    )
    (example,) = load_dataset(run, mistral).train
    safe_end = AFTER_EOS.replace("</s>", "")
    prompt = mistral_reference.encode(f"{BEFORE_EOS}</s>{safe_end}")  # BOS in front, eos parsed
    tokens = example.prompt_tokens.tolist()
    assert tokens.count(mistral.eos_id) == 1
    end = tokens.index(mistral.eos_id)
    assert tokens[: end + 1] == prompt[: prompt.index(mistral.eos_id) + 1]
    assert mistral.decode(tokens[end + 1 :]) == AFTER_EOS
    assert example.example.question == f"{BEFORE_EOS}</s>{AFTER_EOS}"
    assert example.answer_tokens.tolist() == [*mistral.encode("3"), mistral.eos_id]
