"""The engines of a run: one that samples traces, one that writes answers."""

from nrt_jax.data.pipeline import Dataset
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.evaluation.exact_match import Answerer
from nrt_jax.rollout.engine import DecoderEngine
from nrt_jax.training.config import RunConfig
from nrt_jax.training.model import Model


def trace_engine(config: RunConfig, model: Model, tokenizer: Tokenizer) -> DecoderEngine:
    """Prompts `x t_start`, up to the longest trace."""
    return _engine(
        config, model, tokenizer, config.data.max_prompt_tokens + 1, config.rollout.max_trace_tokens
    )


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
    return Answerer(
        tokenizer,
        trace_engine(config, model, tokenizer) if reasons else None,
        _engine(config, model, tokenizer, longest, answer_tokens),
        config.rollout.max_trace_tokens,
        answer_tokens,
        config.evaluation.trace_temperature,
    )


def _engine(
    config: RunConfig, model: Model, tokenizer: Tokenizer, longest_prompt: int, new_tokens: int
) -> DecoderEngine:
    return DecoderEngine(
        model.definition,
        model.architecture,
        model.mesh,
        slots=config.rollout.slots,
        max_prompt_tokens=longest_prompt,
        max_new_tokens=new_tokens,
        stop_ids=tokenizer.special_ids,
        dtype=config.model.jax_dtype,
        tokenizer_path=str(tokenizer.directory),
    )
