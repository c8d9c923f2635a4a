"""The engines of a run, for training, evaluation and serving."""

from nrt_jax.checkpoints import generation_config
from nrt_jax.checkpoints.abstract_model import Model
from nrt_jax.checkpoints.token_rows import token_id
from nrt_jax.config.rollout import RolloutConfig
from nrt_jax.config.run import RunConfig
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.programs import Programs
from nrt_jax.engine.sampling import Sampling

ONE_SIZE_PROMPT, ONE_SIZE_NEW = 256, 128
"""Limits in tokens up to which the programs of more sizes cost more time than they save."""


def trace_engine(
    config: RunConfig,
    model: Model,
    tokenizer: Tokenizer,
    *,
    num_samples: int | None = None,
    programs: Programs | None = None,
) -> Engine:
    """An engine for traces: prompts `x t_start`, up to the longest trace.

    Without `num_samples` for those of training, whose groups share a prompt.
    """
    if num_samples is None:
        # JetStream prefills each sample and inserts it alone: none of its slots share a prompt.
        shares = config.rollout.driver == "loop"
        num_samples = config.rollout.traces_per_prompt if shares else 1
    return make_engine(
        config,
        model,
        slots=config.rollout.slots,
        longest_prompt=config.data.max_prompt_tokens + 1,
        new_tokens=config.rollout.max_trace_tokens,
        stop_ids=trace_stop_ids(config, tokenizer),
        num_samples=num_samples,
        banned_ids=trace_banned_ids(config, tokenizer),
        programs=programs,
    )


def trace_sampling(rollout: RolloutConfig) -> Sampling:
    """How the tokens of a trace are drawn in training."""
    return Sampling(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        repetition_penalty=rollout.repetition_penalty,
    )


def trace_stop_ids(config: RunConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end a trace; InputError for a stop token that the tokenizer does not have."""
    names = config.rollout.stop_tokens
    if names == "think_end":
        return frozenset({tokenizer.think_end_id})
    if names == "special":
        return answer_stop_ids(config, tokenizer)
    more = {token_id(tokenizer, name, "rollout.stop_tokens") for name in names}
    return answer_stop_ids(config, tokenizer) | more


def trace_banned_ids(config: RunConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that are not sampled in a trace: with `rollout.stop_tokens: think_end` all that would
    end it, except t_end."""
    if config.rollout.stop_tokens != "think_end":
        return frozenset()
    return answer_stop_ids(config, tokenizer) - {tokenizer.think_end_id}


def answer_stop_ids(config: RunConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end an answer: special ones, and the stops of the base, which an export has too.

    Raises InputError for a broken generation_config.json of the base.
    """
    base = config.model.path
    of_base = [] if base is None else generation_config.stop_ids(base)
    return tokenizer.special_ids | set(of_base)


def make_engine(
    config: RunConfig,
    model: Model,
    *,
    slots: int,
    longest_prompt: int,
    new_tokens: int,
    stop_ids: frozenset[int],
    num_samples: int = 1,
    top_logprobs: int = 0,
    banned_ids: frozenset[int] = frozenset(),
    programs: Programs | None = None,
) -> Engine:
    """An engine for a run's weights that decodes as the run's config says; sizes in tokens.

    It shares the compiled programs that fit it with the other engines of `programs`.
    Raises InputError when `rollout.attention` names a kernel that does not support the model here.
    """
    rollout = config.rollout
    longest_part = min(ONE_SIZE_PROMPT, rollout.prefill_chunk or ONE_SIZE_PROMPT)
    return Engine(
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
        num_samples=num_samples,
        prefill_chunk=rollout.prefill_chunk,
        top_logprobs=top_logprobs,
        banned_ids=banned_ids,
        one_size=longest_prompt <= longest_part and new_tokens <= ONE_SIZE_NEW,
        programs=programs,
    )
