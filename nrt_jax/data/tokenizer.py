"""A tokenizer with think tokens, and text that never becomes a control token."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np
import tokenizers

from nrt_jax.data.think_tokens import (
    ThinkTokens,
    as_special,
    find_think_tokens,
    with_think_tokens,
)
from nrt_jax.data.tokenizer_check import check_tokenizer
from nrt_jax.data.tokenizer_files import SETTINGS_FILE, fast_class, read_directory
from nrt_jax.errors import InputError

if TYPE_CHECKING:
    import transformers

FIRST_SPACE, NO_SPACE = b'"prepend_scheme":"first"', b'"prepend_scheme":"never"'


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back; control ids come from the attributes alone, never from text."""

    directory: Path
    fast: "transformers.PreTrainedTokenizerFast" = field(repr=False)
    """The same tokenizer in transformers, which renders chat templates and writes exports."""
    backend: tokenizers.Tokenizer = field(repr=False)
    """What `fast` encodes with, set to split special tokens' names in a text into characters."""
    inner: tokenizers.Tokenizer = field(repr=False)
    """Encodes text that follows a control token: without the space that some tokenizers put in
    front of a sequence. The backend itself where it puts none, or one in front of every text."""
    bos_id: int | None
    """Beginning of sequence; None when the tokenizer has none."""
    unk_id: int | None
    """Stands for text that the vocabulary cannot spell, and for nothing else; None without one."""
    eos_id: int
    think_start_id: int
    think_end_id: int
    special_ids: frozenset[int]
    """Every special token, the think tokens and the one for unknown text included."""
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
        backend, settings = read_directory(directory)
        roles = {key: str(value) for key, value in settings.items() if _names_token(key, value)}
        _add_described(backend, settings.pop("added_tokens_decoder"), directory)
        eos = roles.get("eos_token")
        if eos is None or backend.token_to_id(eos) is None:
            raise InputError(
                f"{directory / SETTINGS_FILE}: eos_token is {eos!r}; "
                "name the token that ends a sequence, one that tokenizer.json has"
            )
        wanted = think_start, think_end
        taken = set(map(str, settings.get("model_specific_special_tokens", {}).values()))
        think = find_think_tokens(directory, wanted, backend, roles, taken)
        backend = with_think_tokens(backend, think, directory)
        _make_special(backend, [roles[key] for key in ("bos_token", "eos_token") if key in roles])
        listed = [str(token) for token in settings.get("extra_special_tokens") or []]
        listed = [*(think.renamed.get(name, name) for name in listed), *think.ids]
        settings["extra_special_tokens"] = list(dict.fromkeys(listed))
        return cls._of(directory, fast_class()(tokenizer_object=backend, **settings), think)

    @classmethod
    def _of(
        cls, directory: Path, fast: "transformers.PreTrainedTokenizerFast", think: ThinkTokens
    ) -> "Tokenizer":
        backend = fast.backend_tokenizer
        bos_id, eos_id, unk_id = fast.bos_token_id, fast.eos_token_id, fast.unk_token_id
        check_tokenizer(directory, backend, unk_id)
        # What transformers calls split_special_tokens, and does not write into exports here.
        backend.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        think_start_id, think_end_id = think.ids.values()
        return cls(
            directory=directory,
            fast=fast,
            backend=backend,
            inner=_without_first_space(backend),
            bos_id=bos_id,
            unk_id=None if unk_id in (bos_id, eos_id, *think.ids.values()) else unk_id,
            eos_id=eos_id,
            think_start_id=think_start_id,
            think_end_id=think_end_id,
            special_ids=frozenset(i for i, token in added.items() if token.special),
            think=think,
            vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        )

    def __reduce__(self) -> tuple[Callable[..., "Tokenizer"], tuple[Path, str, str]]:
        """For pickle: another process reads the directory itself."""
        start, end = self.think.ids
        return Tokenizer.load, (self.directory, start, end)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what it does: a copy in another directory has the same."""
        roles = [self.bos_id, self.eos_id, self.unk_id, sorted(self.special_ids)]
        return hashlib.sha256((self.backend.to_str() + json.dumps(roles)).encode()).hexdigest()

    @property
    def new_ids(self) -> tuple[int, ...]:
        """Think ids that no checkpoint has learned: their rows in one mean nothing yet."""
        return self.think.new_ids

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
        if self.special_ids.isdisjoint(ids):
            return None
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
        """Write the tokenizer into `directory` for AutoTokenizer, the think tokens in it.

        With a chat template, a Jinja text, the copy has this one and no other.
        """
        fast = copy.copy(self.fast)
        if chat_template is not None:
            fast.chat_template = chat_template
        fast.save_pretrained(directory)


def _names_token(key: str, value: object) -> bool:
    """Whether a setting gives the token of a role, as eos_token does and add_eos_token does not."""
    return key.endswith("_token") and isinstance(value, str | tokenizers.AddedToken)


def _add_described(
    backend: tokenizers.Tokenizer, described: Mapping[int, tokenizers.AddedToken], directory: Path
) -> None:
    """Add what the settings describe and tokenizer.json lacks, as transformers does."""
    backend.add_tokens([token for _, token in sorted(described.items())])
    for i, token in described.items():
        if (found := backend.token_to_id(token.content)) != i:
            raise InputError(
                f"{directory / SETTINGS_FILE}: added_tokens_decoder gives {token.content!r} the id "
                f"{i}, and in tokenizer.json it gets {found}; download both files again"
            )


def _make_special(backend: tokenizers.Tokenizer, names: list[str]) -> None:
    """Some tokenizers list control tokens as plain added ones, which text could spell."""
    special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    backend.add_special_tokens([as_special(name) for name in names if name not in special])


def _without_first_space(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer for text inside a sequence; the backend itself where that is no other."""
    pre_tokenizer = copy.deepcopy(backend.pre_tokenizer)
    if pre_tokenizer is None or FIRST_SPACE not in (state := pre_tokenizer.__getstate__()):
        return backend
    inner = copy.deepcopy(backend)
    inner.encode_special_tokens = True
    pre_tokenizer.__setstate__(state.replace(FIRST_SPACE, NO_SPACE))
    inner.pre_tokenizer = pre_tokenizer
    return inner
