"""The prompts of a completion: texts or token ids, one or several."""

from typing import Any, NamedTuple

import numpy as np

from nrt_jax.errors import InputError
from nrt_jax.serving.errors import bad_request
from nrt_jax.serving.served_model import ServedModel


class Prompt(NamedTuple):
    """One prompt of a request."""

    tokens: np.ndarray
    text: str | None
    """None when it came as token ids."""


def read_prompts(served: ServedModel, value: Any, most: int) -> list[Prompt]:
    """A text, a list of texts, token ids, or a list of lists of token ids."""
    if isinstance(value, str) or _is_ids(value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise bad_request("prompt", "must be a text, token ids, or a list of one of these")
    if len(value) > most:
        raise bad_request("prompt", f"{len(value)} prompts; with this n {most} are the most")
    return [_read_prompt(served, index, item) for index, item in enumerate(value)]


def _is_ids(value: Any) -> bool:
    # A bool is an int of Python, and no token id.
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _read_prompt(served: ServedModel, index: int, value: Any) -> Prompt:
    if isinstance(value, str):
        return Prompt(_text_tokens(served, index, value), value)
    if not _is_ids(value):
        raise bad_request(
            "prompt", f"prompt {index} must be a text or a list of one or more token ids"
        )
    size = served.tokenizer.vocab_size
    strange = next((token for token in value if not 0 <= token < size), None)
    if strange is not None:
        raise bad_request("prompt", f"prompt {index} has {strange}; token ids are 0 to {size - 1}")
    return Prompt(np.array(value, np.int32), None)


def _text_tokens(served: ServedModel, index: int, text: str) -> np.ndarray:
    try:
        tokens = served.text_prompt(text)
    except InputError as error:
        raise bad_request("prompt", f"prompt {index} {error}") from None
    if not len(tokens):
        raise bad_request("prompt", f"prompt {index} is empty; write something")
    return tokens
