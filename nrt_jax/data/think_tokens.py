"""The two think tokens of a checkpoint that was trained without them.

Each name is looked up among the added tokens. If it is not there, the next reserved token of the
vocabulary (Llama 3 has some) takes the name; without one, a token is appended after the last id.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from nrt_jax.data.tokenizer_files import TOKENIZER_FILE
from nrt_jax.errors import InputError

RESERVED = re.compile(r"<\|reserved_special_token_(\d+)\|>")


@dataclass(frozen=True)
class ThinkTokens:
    """Where the names of the think tokens went."""

    ids: dict[str, int]
    """The start and the end token, in this order."""
    renamed: dict[str, str]
    """From the name of a reserved token to the think name that replaced it."""
    new_ids: tuple[int, ...]
    """Ids whose rows in a checkpoint mean nothing yet, the start token's first."""


def find_think_tokens(
    directory: Path,
    wanted: tuple[str, str],
    backend: tokenizers.Tokenizer,
    roles: dict[str, str],
    taken: set[str],
) -> ThinkTokens:
    """Resolve the names; InputError for a name that something else has.

    `taken` are tokens that are in use, so that none of them is renamed.
    """
    start, end = wanted
    if start == end:
        raise InputError(f"data.think_end={end!r} is data.think_start too; they must differ")
    added = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    for key, name in zip(("data.think_start", "data.think_end"), wanted, strict=True):
        _check_name(f"{directory}: {key}={name!r}", name, added, vocabulary, roles)
    reserved = _reserved(added, {*roles.values(), *taken, *wanted})
    next_id = max(vocabulary.values(), default=-1) + 1
    ids, renamed, new_ids = {}, {}, []
    for name in wanted:
        if name in added:
            ids[name] = added[name]
            continue
        if reserved:
            old = reserved.pop(0)
            ids[name], renamed[old] = added[old], name
        else:
            ids[name], next_id = next_id, next_id + 1
        new_ids.append(ids[name])
    return ThinkTokens(ids, renamed, tuple(new_ids))


def with_think_tokens(
    backend: tokenizers.Tokenizer, think: ThinkTokens, directory: Path
) -> tokenizers.Tokenizer:
    """The tokenizer with the think tokens in it; InputError when they cannot get their ids."""
    if think.renamed:
        text = backend.to_str()
        for old, new in think.renamed.items():
            # In JSON only a whole string, a key or a value, has both its quotes unescaped.
            text = text.replace(json.dumps(old), json.dumps(new, ensure_ascii=False))
        backend = tokenizers.Tokenizer.from_str(text)
    backend.add_special_tokens([as_special(name) for name in think.ids])
    for name, expected in think.ids.items():
        # The library numbers added tokens itself, by how many there are.
        if backend.token_to_id(name) != expected:
            raise InputError(
                f"{directory / TOKENIZER_FILE}: has gaps in its ids, so {name!r} cannot be added "
                "to it; set data.think_start and data.think_end to special tokens that it has"
            )
    return backend


def as_special(name: str) -> tokenizers.AddedToken:
    """A token that no text spells and that takes in no spaces beside it."""
    return tokenizers.AddedToken(name, special=True, normalized=False)


def _check_name(
    place: str, name: str, added: dict[str, int], vocabulary: dict[str, int], roles: dict[str, str]
) -> None:
    if not name.strip():
        raise InputError(f"{place} is empty; give the token a name such as <|think_start|>")
    role = next((role for role, token in roles.items() if token == name), None)
    if role is not None:
        raise InputError(
            f"{place} is the {role} of this tokenizer; choose a name that has no other role"
        )
    if name in vocabulary and name not in added:
        raise InputError(
            f"{place} is an ordinary entry of this tokenizer's vocabulary (id {vocabulary[name]}), "
            "which text can spell; choose a name that it does not have, such as <|think_start|>"
        )


def _reserved(added: dict[str, int], taken: set[str]) -> list[str]:
    """Names of the reserved tokens that are free, by number."""
    found = [match for name in added if (match := RESERVED.fullmatch(name))]
    return [match[0] for match in sorted(found, key=lambda m: int(m[1])) if match[0] not in taken]
