"""A Hugging Face tokenizer directory, read without transformers."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import tokenizers

from nrt_jax.errors import InputError

TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
DIRECTORY_NEEDS = f"a tokenizer directory holds {TOKENIZER_FILE} and {SETTINGS_FILE}"
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
OPTIONAL_FILES = ("special_tokens_map.json", "chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back; control ids come from the attributes alone, never from text."""

    directory: Path
    backend: tokenizers.Tokenizer = field(repr=False)
    bos_id: int | None
    """Beginning of sequence; None when the tokenizer has none."""
    unk_id: int | None
    """Stands for text that the vocabulary cannot spell, and for nothing else; None without one."""
    eos_id: int
    think_start_id: int
    think_end_id: int
    special_ids: frozenset[int]
    """Every special token, the think tokens and the one for unknown text included."""
    vocab_size: int
    """The highest id + 1: the fewest rows that an embedding must have."""

    @classmethod
    def load(
        cls,
        directory: Path,
        think_start: str = "<|think_start|>",
        think_end: str = "<|think_end|>",
    ) -> "Tokenizer":
        """Read `directory`; InputError when a file or a named special token is missing."""
        names = _token_names(directory)
        backend = _read_backend(directory)
        bos_id, eos_id, unk_id = (
            None if name is None else backend.token_to_id(name)
            for name in map(names.get, ("bos_token", "eos_token", "unk_token"))
        )
        if eos_id is None:
            raise InputError(
                f"{directory / SETTINGS_FILE}: eos_token is {names['eos_token']!r}; "
                "name the token that ends a sequence, one that tokenizer.json has"
            )
        think_ids = _find_think_tokens(directory, (think_start, think_end), backend, names)
        controls = [bos_id, eos_id, *think_ids]
        # Some tokenizers list their think tokens as plain added ones, which text could spell out.
        backend.add_special_tokens([_as_special(backend, i) for i in controls if i is not None])
        # From here on a special token's name inside a text is ordinary characters.
        backend.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        return cls(
            directory=directory,
            backend=backend,
            bos_id=bos_id,
            unk_id=None if unk_id in controls else unk_id,
            eos_id=eos_id,
            think_start_id=think_ids[0],
            think_end_id=think_ids[1],
            special_ids=frozenset(i for i, token in added.items() if token.special),
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

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as from `encode`, on all cores; the caller asks `control_in`."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[SupportsIndex] | np.ndarray, skip_special: bool = False) -> str:
        """The text of `ids`; special tokens show as their names unless skipped."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token(self, token_id: SupportsIndex) -> str:
        """The vocabulary's own name of one id."""
        name = self.backend.id_to_token(int(token_id))
        assert name is not None, f"no token has the id {token_id}"
        return name

    def copy_to(self, directory: Path) -> None:
        """Copy the tokenizer's files, unchanged, into `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in (TOKENIZER_FILE, SETTINGS_FILE, *OPTIONAL_FILES):
            if (self.directory / name).is_file():
                # Not `copy`: a read-only source must not make a read-only copy.
                shutil.copyfile(self.directory / name, directory / name)


def _token_names(directory: Path) -> dict[str, str | None]:
    """What the directory's settings call the tokens of each role."""
    if not directory.is_dir():
        raise InputError(
            f"{directory}: no such tokenizer directory; set data.tokenizer ({DIRECTORY_NEEDS})"
        )
    path = directory / SETTINGS_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {DIRECTORY_NEEDS}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); download the tokenizer again") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}: holds no JSON object; download the tokenizer again")
    names = {}
    for role in ROLES:
        value = settings.get(role)
        # Older files hold the name inside a description of the token.
        name = value.get("content") if isinstance(value, dict) else value
        names[role] = name if isinstance(name, str) else None
    return names


def _read_backend(directory: Path) -> tokenizers.Tokenizer:
    path = directory / TOKENIZER_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {DIRECTORY_NEEDS}") from error
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a tokenizer ({reason}); download it again") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _find_think_tokens(
    directory: Path,
    wanted: tuple[str, str],
    backend: tokenizers.Tokenizer,
    names: dict[str, str | None],
) -> tuple[int, int]:
    """The ids of the start and the end token, which must be added tokens without another role."""
    added = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
    taken = set(names.values())
    hints = ("think", "reserved", "control")
    free = [token for token in added if token not in taken]
    free.sort(key=lambda token: (not any(hint in token for hint in hints), added[token]))
    offer = f"such as {', '.join(free[:5])}" if free else "but it has none to spare"
    for key, name in zip(("data.think_start", "data.think_end"), wanted, strict=True):
        if name not in free:
            problem = "has another role in" if name in taken else "is not a special token of"
            raise InputError(
                f"{directory}: {key}={name!r} {problem} this tokenizer; set data.think_start and "
                f"data.think_end to two special tokens that it has, {offer}"
            )
    start, end = wanted
    if start == end:
        raise InputError(f"data.think_end={end!r} is data.think_start too; they must differ")
    return added[start], added[end]


def _as_special(backend: tokenizers.Tokenizer, token_id: int) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(backend.id_to_token(token_id), special=True, normalized=False)
