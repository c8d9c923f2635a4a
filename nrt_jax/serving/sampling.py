"""What both kinds of completion say to the engine, and of what it did."""

from nrt_jax.engine.sampling import Sampling
from nrt_jax.serving.errors import bad_request
from nrt_jax.serving.schemas import SamplingFields
from nrt_jax.serving.served_model import ServedModel


def usage(prompt: int, sampled: int) -> dict[str, int]:
    """Counts of tokens, those that ended a sequence included."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
    }


def sampling_of(body: SamplingFields) -> Sampling:
    """How the engine is to draw."""
    return Sampling(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        stop_ids=frozenset(body.stop_token_ids),
    )


def check_stop_ids(served: ServedModel, body: SamplingFields) -> None:
    """ApiError 400 for a stop id that no token has."""
    size = served.tokenizer.vocab_size
    for token in body.stop_token_ids:
        if not 0 <= token < size:
            raise bad_request("stop_token_ids", f"{token}; token ids are 0 to {size - 1}")
