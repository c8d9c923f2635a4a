"""What lm-eval asks, from its text to token ids: its prompts are built as those of training.

lm-eval hands a conversation to the model as one text. Ours is the JSON of its turns, so that the
template of training renders them, t_start follows x, and what the answer must begin with follows
the trace:

    {"turns": [user, assistant, user], "prefix": "Answer:"}  ─►  x t_start z t_end Answer: y
"""

import json
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nrt_jax.config.data import DataConfig
from nrt_jax.data.bad_rows import BadRow, shorten
from nrt_jax.data.chat_template import PromptTemplate
from nrt_jax.data.row_tokens import RowTokenizer
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError

Turn = dict[str, str]
_BEGIN = '{"turns": '


class Context(NamedTuple):
    """What is before an answer."""

    turns: tuple[Turn, ...]
    prefix: str = ""
    """What the answer begins with; lm-eval's `gen_prefix`."""

    def to_text(self) -> str:
        """The JSON that lm-eval carries."""
        return json.dumps(self._asdict(), ensure_ascii=False)


def of_conversation(turns: Sequence[Turn], *, opens_answer: bool) -> Context:
    """The context of turns; where no new turn opens, the last one begins the answer."""
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    if opens_answer:
        return Context(tuple(turns))
    return Context(tuple(turns[:-1]), turns[-1]["content"])


def read_context(text: str) -> Context:
    """What `Context.to_text` wrote; a plain text is one user turn."""
    if not text.startswith(_BEGIN):
        return Context(({"role": "user", "content": text},))
    value = json.loads(text)
    return Context(tuple(value["turns"]), value["prefix"])


class ContextTokens:
    """Template and tokenizer of a model that is evaluated."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, *, reasons: bool):
        # Evaluation checks lengths itself, against what the model can hold.
        data = config.model_copy(update={"max_prompt_tokens": sys.maxsize})
        self._rows = RowTokenizer(data, tokenizer)
        self._template = PromptTemplate(data, tokenizer)
        self._tokenizer, self._reasons = tokenizer, reasons

    @property
    def is_chat(self) -> bool:
        """Whether prompts are conversations."""
        return self._template.is_chat

    def prompt(self, context: Context) -> np.ndarray:
        """x t_start where a trace comes first, else x; int32.

        Raises InputError for what the template refuses or leaves out, and for a text that no prompt
        may hold.
        """
        try:
            self._check_turns(context.turns)
            return self._rows.of_messages(context.turns, opened=self._reasons)
        except BadRow as bad:
            raise InputError(bad.detail) from bad

    def _check_turns(self, turns: Sequence[Turn]) -> None:
        """InputError for a template that drops an earlier answer, so that shots show none."""
        answers = [turn["content"].strip() for turn in turns if turn["role"] == "assistant"]
        if not answers or not self.is_chat:
            return
        rendered = self._template.chat(list(turns)).text
        if (dropped := next((a for a in answers if a not in rendered), None)) is not None:
            raise InputError(
                f"the chat template does not write the assistant turn {shorten(dropped)}; set "
                "data.template_file to a template that writes the turns of an assistant"
            )

    def prefix(self, context: Context) -> np.ndarray:
        """Ids of what the answer begins with, int32."""
        (ids,) = self._tokenizer.encode_batch([context.prefix], starts=False)
        return np.array(ids, np.int32)

    def given_answer(self, context: Context, answer: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of what the answer begins with and of a given answer after it, both int32.

        As in lm-eval, both are tokenised together, and white space between them is the answer's.
        """
        before = context.prefix.rstrip()
        after = context.prefix[len(before) :] + answer
        kept, whole = self._tokenizer.encode_batch([before, before + after], starts=False)
        if len(kept) >= len(whole):
            raise InputError(f"the answer {shorten(answer)} has no token; leave it out")
        return np.array(whole[: len(kept)], np.int32), np.array(whole[len(kept) :], np.int32)
