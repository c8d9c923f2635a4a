"""An open model as the servers use it: its prompts, its limits, its engines."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from nrt_jax.checkpoints.abstract_model import answering_mesh
from nrt_jax.checkpoints.open import OpenModel, open_model
from nrt_jax.config.run import RunConfig
from nrt_jax.config.serving import ServingConfig
from nrt_jax.data.bad_rows import BadRow
from nrt_jax.data.row_tokens import RowTokenizer
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.make import (
    answer_stop_ids,
    make_engine,
    trace_banned_ids,
    trace_stop_ids,
)
from nrt_jax.engine.sampling import MAX_STOP_IDS
from nrt_jax.errors import InputError
from nrt_jax.serving.logprobs import TokenTexts


@dataclass(frozen=True)
class Limits:
    """In tokens."""

    prompt: int
    """Longest x of a chat."""
    new: int
    """Most tokens after a prompt; in a chat they include t_start, trace, t_end and answer."""
    trace: int
    """Longest trace of a chat; 0 if the model does not reason."""

    @property
    def context(self) -> int:
        """Longest sequence; a completion may split it anywhere into prompt and continuation."""
        return self.prompt + self.new


@dataclass(frozen=True)
class ServedModel:
    """One model with what requests for it need."""

    name: str
    opened: OpenModel
    limits: Limits
    trace_stop_ids: frozenset[int]
    """Tokens that end a trace besides those that end an answer too."""
    rows: RowTokenizer = field(repr=False)
    token_texts: TokenTexts = field(repr=False)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self.opened.tokenizer

    @property
    def reasons(self) -> bool:
        """Whether a trace comes before an answer."""
        return self.opened.reasons

    @property
    def vocab_size(self) -> int:
        """Token ids of requests are below this."""
        return self.opened.vocab_size

    def text_prompt(self, text: str, *, adds_bos: bool = True) -> np.ndarray:
        """Ids of a plain text, int32, with the beginning-of-sequence token if prompts have one.

        Raises InputError for a text that the tokenizer cannot spell, or that spells a control
        token.
        """
        ids = self.tokenizer.encode(text)
        if self.tokenizer.unk_id in ids:
            raise InputError("has characters that the tokenizer cannot spell; leave them out")
        bos = self.tokenizer.bos_id
        starts = adds_bos and bos is not None and self.opened.config.data.add_bos
        return np.array([bos, *ids] if starts else ids, np.int32)

    def chat_prompt(
        self, messages: Sequence[dict[str, str]], *, opened: bool = False
    ) -> np.ndarray:
        """x of a conversation as training builds it, int32; with `opened` x t_start.

        Raises InputError for what the template refuses, and for a text that cannot be a prompt.
        """
        try:
            return self.rows.of_messages(messages, opened=opened)
        except BadRow as bad:
            raise InputError(bad.detail.replace("refuses the row", "refuses them")) from bad

    def engine(self, slots: int, top_logprobs: int = 0) -> Engine:
        """An engine for prompts and texts of these limits."""
        return make_engine(
            self.opened.config,
            self.opened.model,
            slots=slots,
            longest_prompt=self.limits.context,
            new_tokens=self.limits.new,
            stop_ids=answer_stop_ids(self.opened.config, self.tokenizer),
            # Those of the traces; an answer does not obey them.
            banned_ids=self._banned_ids(),
            top_logprobs=top_logprobs,
        )

    def _banned_ids(self) -> frozenset[int]:
        return trace_banned_ids(self.opened.config, self.tokenizer) if self.reasons else frozenset()


def open_served(path: Path, config: ServingConfig, overrides: Sequence[str] = ()) -> ServedModel:
    """Open any kind of model, with `section.field=value` overrides; InputError."""
    mesh_of = partial(answering_mesh, slots=config.slots)
    return serve_model(open_model(path, overrides, mesh_of=mesh_of), config)


def serve_model(opened: OpenModel, config: ServingConfig) -> ServedModel:
    """A model that is open, ready for requests."""
    # The server checks lengths itself: its message names a field of the request, not a row.
    data = opened.config.data.model_copy(update={"max_prompt_tokens": sys.maxsize})
    return ServedModel(
        name=config.name or opened.name,
        opened=opened,
        limits=find_limits(opened.config, config),
        trace_stop_ids=_trace_stop_ids(opened),
        rows=RowTokenizer(data, opened.tokenizer),
        token_texts=TokenTexts(opened.tokenizer),
    )


def _trace_stop_ids(opened: OpenModel) -> frozenset[int]:
    config, tokenizer = opened.config, opened.tokenizer
    more = trace_stop_ids(config, tokenizer) - answer_stop_ids(config, tokenizer)
    if len(more) > MAX_STOP_IDS:
        raise InputError(
            f"rollout.stop_tokens: {len(more)} tokens end a trace of this run; "
            f"{MAX_STOP_IDS} are the most that can be served"
        )
    return more


def find_limits(run: RunConfig, config: ServingConfig) -> Limits:
    """The limits that the server sets, and otherwise those of the model's config.

    Raises InputError when a trace and an answer do not fit together.
    """
    prompt = config.max_prompt_tokens or run.data.max_prompt_tokens
    if run.method != "nrt":
        return Limits(prompt, config.max_new_tokens or run.data.max_answer_tokens, 0)
    new = config.max_new_tokens or run.rollout.max_response_tokens
    # Beside the trace: t_start, t_end and one token of an answer.
    longest = new - 3
    if longest < 1:
        raise InputError(
            f"max_new_tokens={new}: t_start, trace, t_end and answer need 4 tokens or more; "
            "raise it"
        )
    return Limits(prompt, new, min(run.rollout.max_trace_tokens, longest))
