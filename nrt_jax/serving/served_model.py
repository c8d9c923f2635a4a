"""A trained run as the servers see it: its name, its prompts, its limits, its engines."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nrt_jax.checkpoints import run_dir
from nrt_jax.checkpoints.open import Trained, load_trained
from nrt_jax.config.run import RunConfig
from nrt_jax.config.serving import ServingConfig
from nrt_jax.data.bad_rows import BadRow
from nrt_jax.data.row_tokens import RowTokenizer
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.make import make_engine, trace_stop_ids
from nrt_jax.engine.sampling import MAX_STOP_IDS
from nrt_jax.errors import InputError
from nrt_jax.serving.logprobs import TokenTexts


@dataclass(frozen=True)
class Limits:
    """In tokens."""

    prompt: int
    """Longest x of a chat."""
    new: int
    """Most that is written after a prompt; for a chat t_start, trace, t_end and answer."""
    trace: int
    """Longest trace of a chat; 0 where the run does not reason."""

    @property
    def context(self) -> int:
        """Longest sequence: a prompt of any other kind may be any beginning of one."""
        return self.prompt + self.new


@dataclass(frozen=True)
class ServedModel:
    """One checkpoint with what requests for it need."""

    name: str
    trained: Trained
    limits: Limits
    trace_stop_ids: frozenset[int]
    """What ends a trace besides the special tokens."""
    rows: RowTokenizer = field(repr=False)
    token_texts: TokenTexts = field(repr=False)

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's."""
        return self.trained.tokenizer

    @property
    def reasons(self) -> bool:
        """Whether a trace comes before an answer."""
        return self.trained.config.method == "nrt"

    def text_prompt(self, text: str) -> np.ndarray:
        """Ids of a plain text, int32, with the beginning-of-sequence token where the run has it.

        Raises InputError for a text that the tokenizer cannot spell, or that spells a control
        token.
        """
        ids = self.tokenizer.encode(text)
        if self.tokenizer.unk_id in ids:
            raise InputError("has characters that the tokenizer cannot spell; leave them out")
        bos = self.tokenizer.bos_id
        starts = bos is not None and self.trained.config.data.add_bos
        return np.array([bos, *ids] if starts else ids, np.int32)

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> np.ndarray:
        """x of a conversation as training builds it, int32; InputError for one it would drop."""
        try:
            return self.rows.of_messages(messages)
        except BadRow as bad:
            raise InputError(bad.detail) from bad

    def engine(self, slots: int, top_logprobs: int = 0) -> Engine:
        """An engine for prompts and texts of these limits."""
        return make_engine(
            self.trained.config,
            self.trained.model,
            slots=slots,
            longest_prompt=self.limits.context,
            new_tokens=self.limits.new,
            stop_ids=self.tokenizer.special_ids,
            top_logprobs=top_logprobs,
        )


def open_checkpoint(path: Path, config: ServingConfig) -> ServedModel:
    """Load `RUN` or `RUN/checkpoints/STEP`; InputError when there is none."""
    trained = load_trained(path)
    directory = path.parent.parent if path.parent.name == run_dir.CHECKPOINTS else path
    return serve_trained(trained, config.name or directory.resolve().name, config)


def serve_trained(trained: Trained, name: str, config: ServingConfig) -> ServedModel:
    """A model that is loaded, by the name that requests give it."""
    # Whoever asks is told in the words of a request, not of a row.
    data = trained.config.data.model_copy(update={"max_prompt_tokens": sys.maxsize})
    return ServedModel(
        name=name,
        trained=trained,
        limits=find_limits(trained.config, config),
        trace_stop_ids=_trace_stop_ids(trained),
        rows=RowTokenizer(data, trained.tokenizer),
        token_texts=TokenTexts(trained.tokenizer),
    )


def _trace_stop_ids(trained: Trained) -> frozenset[int]:
    more = trace_stop_ids(trained.config, trained.tokenizer) - trained.tokenizer.special_ids
    if len(more) > MAX_STOP_IDS:
        raise InputError(
            f"rollout.stop_tokens: {len(more)} tokens end a trace of this run; "
            f"{MAX_STOP_IDS} are the most that can be served"
        )
    return more


def find_limits(run: RunConfig, config: ServingConfig) -> Limits:
    """Those of the config, and otherwise those that the run was trained with.

    Raises InputError when no trace fits beside an answer.
    """
    prompt = config.max_prompt_tokens or run.data.max_prompt_tokens
    if run.method != "nrt":
        return Limits(prompt, config.max_new_tokens or run.data.max_answer_tokens, 0)
    new = config.max_new_tokens or run.rollout.max_response_tokens
    # The longest trace leaves room for t_start, t_end and one token of an answer.
    room = new - 3
    if room < 1:
        raise InputError(
            f"max_new_tokens={new}: t_start, trace, t_end and answer need 4 tokens or more; "
            "raise it"
        )
    return Limits(prompt, new, min(run.rollout.max_trace_tokens, room))
