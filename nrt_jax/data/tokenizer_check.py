"""Checks of a tokenizer when it is loaded.

The library reads whatever a broken conversion wrote, and the loss of a run would not show it.
"""

from pathlib import Path

import tokenizers

from nrt_jax.data.tokenizer_files import TOKENIZER_FILE
from nrt_jax.errors import InputError

NONCHARACTER = "\ufdd0"
MIN_ORDINARY = 8
# A larger vocabulary should have every letter; a smaller one may be the alphabet of a small task.
LARGE_VOCABULARY = 1000
ASCII_PROBES = ("The sum of 1,234 and 5.6 is 1239.6!", "a  b   c    d", "trailing  ")
PROBES = (
    *ASCII_PROBES,
    *("  leading", "one\n\ntwo\n", "\tin\t\ttabs"),
    "def f(x):\n    if x:\n        return {'a': [x ** 2]}",
    "Straße, café, naïve, ½ ≠ √2",
    "数学的な推論を学習する。한국어",
    "مرحبا بالعالم، كيف حالك؟",
    "🙂👩‍👩‍👧‍👦",
)
# The first pieces after the byte pieces in the sentencepiece vocabularies of Llama and Mistral,
# which have the lowest ids. Their models score runs of spaces lowest of all all the same.
LATE_SPACES = (("▁▁", "▁t", "er", "in", "▁a"), ("▁▁", "▁▁▁▁", "▁t", "in", "er"))
REMEDY = "download tokenizer.json again from the model's page"


def check_tokenizer(directory: Path, backend: tokenizers.Tokenizer, unk_id: int | None) -> None:
    """InputError when the tokenizer has no vocabulary, loses text, or merges spaces too early."""
    path = directory / TOKENIZER_FILE
    added = backend.get_added_tokens_decoder().values()
    ordinary = backend.get_vocab_size(with_added_tokens=True) - sum(t.special for t in added)
    if ordinary < MIN_ORDINARY:
        raise InputError(
            f"{path}: has {ordinary} ordinary vocabulary entries, as saved by a tokenizer that did "
            f"not find its vocabulary; {REMEDY}"
        )
    unknown = _unknown_ids(backend, unk_id)
    for probe in PROBES:
        _check_probe(path, backend, probe, unknown, ordinary)
    _check_spaces(path, backend)


def _check_probe(
    path: Path, backend: tokenizers.Tokenizer, probe: str, unknown: set[int], ordinary: int
) -> None:
    try:
        ids = backend.encode(probe, add_special_tokens=False).ids
    except Exception as error:  # the library's bare one, for words that it has no id for
        raise InputError(f"{path}: cannot encode {probe!r} ({error}); {REMEDY}") from error
    if not unknown.isdisjoint(ids):
        if probe in ASCII_PROBES and ordinary >= LARGE_VOCABULARY:
            raise InputError(
                f"{path}: has {ordinary} ordinary entries and none to spell all of {probe!r}; "
                f"{REMEDY}"
            )
        return
    back = backend.decode(ids, skip_special_tokens=False)
    # Sentencepiece adds a space before a text and removes one when it decodes. Some tokenizers
    # remove one, and add none, where the text begins with spaces.
    if back.lstrip(" ") != probe.lstrip(" "):
        raise InputError(f"{path}: encodes {probe!r} to ids that decode to {back!r}; {REMEDY}")


def _check_spaces(path: Path, backend: tokenizers.Tokenizer) -> None:
    """The models of Llama and Mistral read "a  b" as ▁a ▁ ▁b.

    A conversion that lost the scores orders the merges by id and reads ▁a ▁▁ b: every text with two
    spaces or more gets other ids, and nothing else shows it.
    """
    first = backend.token_to_id("▁▁")
    if first is None or backend.id_to_token(first - 1) != "<0xFF>":
        return
    pieces = tuple(backend.id_to_token(first + i) for i in range(5))
    tokens = backend.encode("a  b", add_special_tokens=False).tokens
    if pieces in LATE_SPACES and "▁▁" in tokens:
        raise InputError(
            f"{path}: was converted from a sentencepiece model without its scores: 'a  b' becomes "
            f"{' '.join(tokens)}, and the model was trained on {tokens[0]} ▁ ▁b; {REMEDY}"
        )


def _unknown_ids(backend: tokenizers.Tokenizer, unk_id: int | None) -> set[int]:
    """Ids that stand for unknown text; not every directory names its token for it."""
    try:
        tokens = backend.model.tokenize(NONCHARACTER)
    except Exception:  # the library's bare one: a word-level model without an unknown token
        tokens = []
    found = {tokens[0].id} if len(tokens) == 1 else set()
    return found if unk_id is None else found | {unk_id}
