"""A Hugging Face tokenizer directory, read without transformers."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tokenizers

from nrt_jax.data.think_tokens import ThinkTokens, edit_tokenizer_json, find_think_tokens
from nrt_jax.data.tokenizer_check import check_tokenizer
from nrt_jax.data.tokenizer_export import write_tokenizer
from nrt_jax.data.tokenizer_files import (
    SETTINGS_FILE,
    TOKENIZER_FILE,
    build_backend,
    read_settings,
    read_tokenizer_json,
    role_names,
)
from nrt_jax.errors import InputError


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back; control ids come from the attributes alone, never from text."""

    directory: Path
    backend: tokenizers.Tokenizer = field(repr=False)
    inner: tokenizers.Tokenizer = field(repr=False)
    """Encodes text that follows a control token: without the space that some tokenizers put in
    front of a sequence. The backend itself where it puts none, or one in front of every text."""
    roles: dict[str, str]
    """Names of the tokens with a role, such as bos_token, as the directory's settings have them."""
    bos_id: int | None
    """Beginning of sequence; None when the tokenizer has none."""
    unk_id: int | None
    """Stands for text that the vocabulary cannot spell, and for nothing else; None without one."""
    eos_id: int
    think_start_id: int
    think_end_id: int
    new_ids: tuple[int, ...]
    """Think ids that no checkpoint has learned: their rows in one mean nothing yet."""
    special_ids: frozenset[int]
    """Every special token, the think tokens and the one for unknown text included."""
    control_tokens: dict[int, tokenizers.AddedToken] = field(repr=False)
    """The special tokens with their descriptions."""
    think: ThinkTokens = field(repr=False)
    """Where the names of the think tokens went."""
    vocab_size: int
    """The highest id + 1: the fewest rows that an embedding must have."""

    @classmethod
    def load(
        cls,
        directory: Path,
        think_start: str = "<|think_start|>",
        think_end: str = "<|think_end|>",
    ) -> "Tokenizer":
        """Read `directory`, and find or make the think tokens.

        A think name is that of an added token, or else becomes that of the next reserved token, or
        else of a token after the last id. Raises InputError when a file or the token that ends a
        sequence is missing, when a think name is something else's, and for tokenizers that fail
        `check_tokenizer`.
        """
        roles = role_names(read_settings(directory))
        text = read_tokenizer_json(directory)
        backend = build_backend(text, directory)
        bos_id, eos_id, unk_id = (
            None if name is None else backend.token_to_id(name)
            for name in map(roles.get, ("bos_token", "eos_token", "unk_token"))
        )
        if eos_id is None:
            raise InputError(
                f"{directory / SETTINGS_FILE}: eos_token is {roles.get('eos_token')!r}; "
                "name the token that ends a sequence, one that tokenizer.json has"
            )
        think = find_think_tokens(directory, (think_start, think_end), backend, roles)
        if think.new_ids:
            backend = _with_think_tokens(text, think, directory)
        check_tokenizer(directory, backend, unk_id)
        think_ids = tuple(think.ids.values())
        controls = [i for i in (bos_id, eos_id, *think_ids) if i is not None]
        flags = backend.get_added_tokens_decoder()
        # Some tokenizers list their think tokens as plain added ones, which text could spell out.
        backend.add_special_tokens([_as_special(backend, i) for i in controls])
        inner = _without_first_space(backend, directory)
        for each in (backend, inner):
            # From here on a special token's name inside a text is ordinary characters.
            each.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        return cls(
            directory=directory,
            backend=backend,
            inner=inner,
            roles=roles,
            bos_id=bos_id,
            unk_id=None if unk_id in controls else unk_id,
            eos_id=eos_id,
            think_start_id=think_ids[0],
            think_end_id=think_ids[1],
            new_ids=think.new_ids,
            special_ids=frozenset(i for i, token in added.items() if token.special),
            # What a chat template writes is read by the flags that the file has.
            control_tokens={
                i: token if i in think_ids else flags.get(i, token)
                for i, token in added.items()
                if token.special
            },
            think=think,
            vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone: nothing is added, and special tokens' names are plain characters.

        Raises InputError for the rare text that `control_in` objects to.
        """
        (ids,) = self.encode_batch([text])
        control = self.control_in(ids)
        if control is not None:
            raise InputError(f"text {text[:60]!r} spells the control token {control}; reword it")
        return ids

    def control_in(self, ids: Sequence[int]) -> str | None:
        """The first control token among the ids of a text, if any.

        Unigram and word-level vocabularies can hold a control token's name as an ordinary piece, so
        that a text spells it after all; the token for unknown text does not count.
        """
        controls = (i for i in ids if i in self.special_ids and i != self.unk_id)
        found = next(controls, None)
        return None if found is None else self.token(found)

    def encode_batch(self, texts: Iterable[str], *, starts: bool = True) -> list[list[int]]:
        """Ids of each text as from `encode`, on all cores; the caller asks `control_in`.

        `starts` false is for texts that follow a control token.
        """
        backend = self.backend if starts else self.inner
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[SupportsIndex] | np.ndarray, skip_special: bool = False) -> str:
        """The text of `ids`; special tokens show as their names unless skipped."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token(self, token_id: SupportsIndex) -> str:
        """The vocabulary's own name of one id."""
        name = self.backend.id_to_token(int(token_id))
        assert name is not None, f"no token has the id {token_id}"
        return name

    def find(self, text: str) -> int | None:
        """The id of the vocabulary entry of exactly this name, added or ordinary."""
        return self.backend.token_to_id(text)

    def copy_to(self, directory: Path, chat_template: str | None = None) -> None:
        """Write the tokenizer's files into `directory`, the think tokens in them.

        With a chat template, a Jinja text, the copy has this one and no other.
        """
        write_tokenizer(self.directory, directory, self.think, chat_template)


def _with_think_tokens(text: str, think: ThinkTokens, directory: Path) -> tokenizers.Tokenizer:
    edited = edit_tokenizer_json(text, think)
    assert edited is not None, "new tokens are an edit"
    backend = build_backend(edited, directory)
    for name, expected in think.ids.items():
        # The library numbers added tokens itself, by how many there are.
        if backend.token_to_id(name) != expected:
            raise InputError(
                f"{directory / TOKENIZER_FILE}: has gaps in its ids, so {name!r} cannot be added "
                "to it; set data.think_start and data.think_end to special tokens that it has"
            )
    return backend


def _as_special(backend: tokenizers.Tokenizer, token_id: int) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(backend.id_to_token(token_id), special=True, normalized=False)


def _without_first_space(backend: tokenizers.Tokenizer, directory: Path) -> tokenizers.Tokenizer:
    """The same tokenizer for text inside a sequence; the backend itself where that is no other."""
    if backend.pre_tokenizer is None or b'"first"' not in backend.pre_tokenizer.__getstate__():
        return backend
    data = json.loads(backend.to_str())
    _set_prepend_scheme(data["pre_tokenizer"])
    return build_backend(json.dumps(data), directory)


def _set_prepend_scheme(pre_tokenizer: dict[str, Any]) -> None:
    if pre_tokenizer.get("prepend_scheme") == "first":
        pre_tokenizer["prepend_scheme"] = "never"
    for part in pre_tokenizer.get("pretokenizers", []):
        _set_prepend_scheme(part)
