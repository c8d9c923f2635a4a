"""The engines of a run: one that samples traces, one that writes answers."""

from functools import partial
from typing import TypeVar

from nrt_jax.checkpoints.run_model import Model, token_id
from nrt_jax.config.run import RunConfig
from nrt_jax.data.pipeline import Dataset
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.engine import DecoderEngine
from nrt_jax.evaluation.exact_match import Answerer
from nrt_jax.objective.rewards import score_rewards

E = TypeVar("E", bound=DecoderEngine)


def trace_engine(config: RunConfig, model: Model, tokenizer: Tokenizer) -> DecoderEngine:
    """Prompts `x t_start`, up to the longest trace."""
    return make_engine(
        config,
        model,
        tokenizer,
        slots=config.rollout.slots,
        longest_prompt=config.data.max_prompt_tokens + 1,
        new_tokens=config.rollout.max_trace_tokens,
        stop_ids=trace_stop_ids(config, tokenizer),
        copies=config.rollout.traces_per_prompt,
    )


def trace_stop_ids(config: RunConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """What ends a trace; InputError for a stop token that the tokenizer does not have."""
    names = config.rollout.stop_tokens
    return tokenizer.special_ids | {token_id(tokenizer, n, "rollout.stop_tokens") for n in names}


def make_answerer(
    config: RunConfig, model: Model, tokenizer: Tokenizer, dataset: Dataset
) -> Answerer | None:
    """What evaluation and `nrt-jax generate` answer with; None when nothing is to be evaluated."""
    if not config.evaluation.examples or not dataset.eval:
        return None
    return answerer(config, model, tokenizer)


def answerer(config: RunConfig, model: Model, tokenizer: Tokenizer) -> Answerer:
    """NRT reasons before it answers, SFT answers at once."""
    reasons = config.method == "nrt"
    longest = config.data.max_prompt_tokens
    if reasons:
        longest += config.rollout.max_trace_tokens + 2
    answer_tokens = config.evaluation.max_answer_tokens
    answers = make_engine(
        config,
        model,
        tokenizer,
        slots=config.rollout.slots,
        longest_prompt=longest,
        new_tokens=answer_tokens,
        stop_ids=tokenizer.special_ids,
        copies=1,
    )
    scores = reasons and config.evaluation.score_references
    return Answerer(
        tokenizer,
        trace_engine(config, model, tokenizer) if reasons else None,
        answers,
        config.rollout.max_trace_tokens,
        answer_tokens,
        config.evaluation.trace_temperature,
        decode_steps=config.rollout.decode_steps,
        judge=partial(score_rewards, objective=config.objective) if scores else None,
    )


def make_engine(
    config: RunConfig,
    model: Model,
    tokenizer: Tokenizer,
    *,
    slots: int,
    longest_prompt: int,
    new_tokens: int,
    stop_ids: frozenset[int],
    copies: int,
    top_log_probs: int = 0,
    kind: type[E] = DecoderEngine,
) -> E:
    """An engine for a run's weights, which decodes as the run's config says; sizes in tokens.

    Raises InputError when `rollout.attention` asks for a kernel and none here takes the model.
    """
    rollout = config.rollout
    return kind(
        model.definition,
        model.architecture,
        model.mesh,
        slots=slots,
        max_prompt_tokens=longest_prompt,
        max_new_tokens=new_tokens,
        stop_ids=stop_ids,
        dtype=rollout.dtype or config.model.dtype,
        cache_dtype=rollout.cache_dtype,
        attention=rollout.attention,
        copies=copies,
        prefill_chunk=rollout.prefill_chunk,
        top_log_probs=top_log_probs,
        tokenizer_path=str(tokenizer.directory),
    )
