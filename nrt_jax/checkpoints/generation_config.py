"""`generation_config.json` of a directory: token ids, stops and defaults of sampling.

An export has what its base had, unknown fields included, and the stops of the training beside those
of the base.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nrt_jax.checkpoints.hf_config import CONFIG_FILE, GENERATION_FILE, read_architecture
from nrt_jax.checkpoints.json_files import read_json
from nrt_jax.data.bad_rows import shorten
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields that `config.json` has too."""
AGAIN = "correct it, or download the file again"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return _is_int(value) and value >= 0


def _is_list(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(holds, value))


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


Kind = tuple[Callable[[Any], bool], str]
ID: Kind = _is_id, "a token id"
IDS: Kind = lambda v: _is_id(v) or _is_list(v, _is_id), "a token id or a list of token ids"
ID_LIST: Kind = lambda v: v == [] or _is_list(v, _is_id), "a list of token ids"
NUMBER: Kind = _is_number, "a number"
INTEGER: Kind = _is_int, "an integer"
TRUTH: Kind = lambda v: isinstance(v, bool), "true or false"

_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("bos_token_id", "pad_token_id", "forced_bos_token_id"), ID),
    **dict.fromkeys(("eos_token_id", "decoder_start_token_id", "forced_eos_token_id"), IDS),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), ID_LIST),
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "repetition_penalty"), NUMBER),
    **dict.fromkeys(("top_k", "max_length", "max_new_tokens", "min_length"), INTEGER),
    **dict.fromkeys(("min_new_tokens", "num_beams", "num_return_sequences"), INTEGER),
    **dict.fromkeys(("do_sample", "use_cache"), TRUTH),
}
"""Types of the fields about tokens, lengths and sampling, where they are not null."""
# Old conversions write -1 for a token that there is not.
_CONFIG_IDS: Kind = lambda v: _is_int(v) or v == [] or _is_list(v, _is_int), IDS[1]
_KINDS_OF_CONFIG: dict[str, Kind] = {
    "bos_token_id": INTEGER,
    "eos_token_id": _CONFIG_IDS,
    "pad_token_id": INTEGER,
}


def read_generation(directory: Path) -> dict[str, Any]:
    """The content of `generation_config.json`; without the file, the token ids of `config.json`.

    Raises InputError for a field of another type and for a token id outside the vocabulary.
    """
    file = Path(directory) / GENERATION_FILE
    if not file.exists() and not file.is_symlink():
        return _usable_token_ids(directory)
    content = read_json(file)
    _check(file, content, _KINDS)
    size = read_architecture(directory).vocab_size
    for field in [name for name in content if _KINDS.get(name) in (ID, IDS, ID_LIST)]:
        outside = next((i for i in _flat(content[field]) if i >= size), None)
        if outside is not None:
            raise InputError(
                f"{file}: {field}={shorten(content[field])}: {outside} is outside the vocabulary "
                f"of {size} tokens; {AGAIN}"
            )
    return content


def read_token_ids(directory: Path) -> dict[str, Any]:
    """The token ids of `config.json` that are not null; InputError for one of another type."""
    file = Path(directory) / CONFIG_FILE
    content = read_json(file)
    _check(file, content, _KINDS_OF_CONFIG)
    return {key: content[key] for key in TOKEN_IDS if content.get(key) is not None}


def _usable_token_ids(directory: Path) -> dict[str, Any]:
    """Those that the vocabulary has; transformers warns of others and goes on."""
    size, usable = read_architecture(directory).vocab_size, {}
    for key, value in read_token_ids(directory).items():
        ids = [i for i in _flat(value) if 0 <= i < size]
        if ids:
            usable[key] = ids if isinstance(value, list) else ids[0]
    return usable


def stop_ids(directory: Path) -> list[int]:
    """Tokens that end an answer of a directory's model, in the order of its files; InputError.

    They are the eos_token_id of `generation_config.json`, and without one that of `config.json`.
    """
    return list(_flat(_with_ids_of_config(directory).get("eos_token_id")))


def trained_generation(base: Path | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """The `generation_config.json` of a model that was trained from the directory `base`.

    It stops at the base's stops and at the tokenizer's end of sequence, in this order.
    """
    content = {} if base is None else _with_ids_of_config(base)
    # An export writes trace and answer in one go, so t_end must not stop it.
    think_ids = tokenizer.think_start_id, tokenizer.think_end_id
    stops = [i for i in _flat(content.get("eos_token_id")) if i not in think_ids]
    stops = list(dict.fromkeys([*stops, tokenizer.eos_id]))
    content["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    if tokenizer.bos_id is not None:
        content["bos_token_id"] = tokenizer.bos_id
    return content


def _with_ids_of_config(directory: Path) -> dict[str, Any]:
    """`generation_config.json` with the ids of `config.json` where it has none."""
    content = read_generation(directory)
    given = {key for key in TOKEN_IDS if content.get(key) is not None}
    more = {k: v for k, v in _usable_token_ids(directory).items() if k not in given}
    return content | more


def _flat(ids: Any) -> Iterator[int]:
    """The ids of a field that holds one, several, or null."""
    yield from ids if isinstance(ids, list) else [] if ids is None else [ids]


def _check(file: Path, content: dict[str, Any], kinds: dict[str, Kind]) -> None:
    for field, (allowed, words) in kinds.items():
        value = content.get(field)
        if value is not None and not allowed(value):
            raise InputError(f"{file}: {field}={shorten(value)}: must be {words}; {AGAIN}")
