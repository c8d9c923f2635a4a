"""What lm-eval's texts become: prompts as those of training, and what an answer begins with."""

import numpy as np
import pytest

from nrt_jax.config.data import DataConfig
from nrt_jax.data.row_tokens import RowTokenizer
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError
from nrt_jax.evaluation.contexts import (
    Context,
    ContextTokens,
    of_conversation,
    read_context,
)
from tests.data.made_tokenizers import write_made_tokenizer

USER = {"role": "user", "content": "How many?"}
SHOT = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "It is one."}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(write_made_tokenizer("llama3", tmp_path_factory.mktemp("tokenizer")))


def contexts(tokenizer, *, reasons=False, **data) -> ContextTokens:
    config = DataConfig(**{"source": "chain_addition", "template": "tulu"} | data)
    return ContextTokens(config, tokenizer, reasons=reasons)


def test_a_conversation_travels_as_text():
    context = of_conversation([*SHOT, USER], opens_answer=True)
    assert context == Context((*SHOT, USER))
    assert read_context(context.to_text()) == context
    begun = of_conversation([USER, {"role": "assistant", "content": "Answer:"}], opens_answer=False)
    assert begun == Context((USER,), "Answer:")
    assert read_context(begun.to_text()) == begun


def test_a_plain_text_is_one_turn():
    assert read_context("Q: 1+1\nA:") == Context(({"role": "user", "content": "Q: 1+1\nA:"},))


@pytest.mark.parametrize("reasons", [False, True])
def test_prompts_are_those_of_training(tokenizer, reasons):
    ours = contexts(tokenizer, reasons=reasons).prompt(Context((*SHOT, USER)))
    config = DataConfig(source="chain_addition", template="tulu", max_prompt_tokens=500)
    theirs = RowTokenizer(config, tokenizer).of_messages([*SHOT, USER], opened=reasons)
    np.testing.assert_array_equal(ours, theirs)
    assert (ours[-1] == tokenizer.think_start_id) == reasons


def test_the_beginning_of_the_answer_is_no_part_of_the_prompt(tokenizer):
    made = contexts(tokenizer, reasons=True)
    begun, plain = Context((USER,), "Answer: "), Context((USER,))
    np.testing.assert_array_equal(made.prompt(begun), made.prompt(plain))
    assert tokenizer.decode(made.prefix(begun)) == "Answer: "
    assert not len(made.prefix(plain))


def test_white_space_before_a_given_answer_is_the_answers(tokenizer):
    """As in lm-eval: ` two` is one token, and `Answer: ` with `two` would be others."""
    made = contexts(tokenizer)
    for prefix, answer in (("Answer: ", "two"), ("Answer:", " two")):
        kept, given = made.given_answer(Context((USER,), prefix), answer)
        assert tokenizer.decode(kept) == "Answer:"
        assert tokenizer.decode(given) == " two"
    kept, given = made.given_answer(Context((USER,)), " two")
    assert not len(kept)
    assert tokenizer.decode(given) == " two"
    with pytest.raises(InputError, match="the answer '' has no token"):
        made.given_answer(Context((USER,)), "")


def test_a_template_without_assistant_turns_is_told_for_shots_alone(tokenizer, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages if m.role == 'user' %}<u>{{ m.content }}{% endfor %}<a>"
    )
    made = contexts(tokenizer, template="tokenizer", template_file=template)
    assert len(made.prompt(Context((USER,))))
    with pytest.raises(InputError, match=r"does not write the assistant turn 'It is one.'; set"):
        made.prompt(Context((*SHOT, USER)))


def test_a_text_that_no_prompt_may_hold_is_refused(tokenizer):
    with pytest.raises(InputError, match="no place for other turns"):
        contexts(tokenizer, template="plain").prompt(Context((*SHOT, USER)))
