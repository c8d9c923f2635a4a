"""The two think tokens of a checkpoint that was trained without them.

A name is looked for among the added tokens; without success it goes to the next token that the
vocabulary reserves for such use (Llama 3), and without one of those to a token after the last id.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from nrt_jax.errors import InputError

RESERVED = re.compile(r"<\|reserved_special_token_(\d+)\|>")
SPECIAL = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}
"""How the description of a think token reads, in every file that has one."""


@dataclass(frozen=True)
class ThinkTokens:
    """Where the names of the think tokens went."""

    ids: dict[str, int]
    """The start and the end token, in this order."""
    renamed: dict[str, str]
    """Reserved tokens and the think names that they got."""
    appended: dict[str, int]
    """Tokens after the last id."""

    @property
    def new_ids(self) -> tuple[int, ...]:
        """Ids whose rows in a checkpoint mean nothing yet, the start token's first."""
        new = {*self.renamed.values(), *self.appended}
        return tuple(i for name, i in self.ids.items() if name in new)


def find_think_tokens(
    directory: Path,
    wanted: tuple[str, str],
    backend: tokenizers.Tokenizer,
    roles: dict[str, str],
) -> ThinkTokens:
    """Resolve the names; InputError for a name that something else has."""
    start, end = wanted
    if start == end:
        raise InputError(f"data.think_end={end!r} is data.think_start too; they must differ")
    added = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    for key, name in zip(("data.think_start", "data.think_end"), wanted, strict=True):
        _check_name(f"{directory}: {key}={name!r}", name, added, vocabulary, roles)
    reserved = _reserved(added, {*roles.values(), *wanted})
    next_id = max(vocabulary.values(), default=-1) + 1
    ids, renamed, appended = {}, {}, {}
    for name in wanted:
        if name in added:
            ids[name] = added[name]
        elif reserved:
            old = reserved.pop(0)
            ids[name], renamed[old] = added[old], name
        else:
            ids[name] = appended[name] = next_id + len(appended)
    return ThinkTokens(ids, renamed, appended)


def edit_tokenizer_json(text: str, think: ThinkTokens) -> str | None:
    """tokenizer.json with the think tokens in it as special tokens; None when it had them so."""
    data = json.loads(text)
    tokens = data.setdefault("added_tokens", [])
    before = json.dumps(tokens)
    for token in tokens:
        token["content"] = think.renamed.get(token["content"], token["content"])
        if token["content"] in think.ids:
            token.update(SPECIAL)
    tokens += [{"id": i, "content": name, **SPECIAL} for name, i in think.appended.items()]
    if json.dumps(tokens) == before:
        return None
    if think.renamed:
        model = data["model"]
        # A key of a vocabulary, or the first of a pair [piece, score].
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = rename_keys(model["vocab"], think.renamed)
        else:
            model["vocab"] = rename_values(model.get("vocab"), think.renamed)
        data["post_processor"] = rename_values(
            rename_keys(data.get("post_processor"), think.renamed), think.renamed
        )
    return json.dumps(data, ensure_ascii=False, indent=2)


def rename_values(value: Any, renamed: dict[str, str]) -> Any:
    """A JSON value in which every string that is exactly an old name is the new one."""
    if isinstance(value, str):
        return renamed.get(value, value)
    if isinstance(value, list):
        return [rename_values(item, renamed) for item in value]
    if isinstance(value, dict):
        return {key: rename_values(item, renamed) for key, item in value.items()}
    return value


def rename_keys(value: Any, renamed: dict[str, str]) -> Any:
    """A JSON value in which every key that is exactly an old name is the new one."""
    if isinstance(value, list):
        return [rename_keys(item, renamed) for item in value]
    if isinstance(value, dict):
        return {renamed.get(key, key): rename_keys(item, renamed) for key, item in value.items()}
    return value


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
