"""Prefill, decode and scoring have their names in the programs, which a trace shows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.engine import toy


class Lowered(Exception):
    """Raised with the text of a program instead of running it."""


@pytest.fixture
def text_of(monkeypatch) -> Callable[..., str]:
    """The text of the program of this kind that a call of an engine's method would run."""
    engine, params = toy.engine(), toy.params()
    state = engine.init_decode_state()
    usual = engine._program

    def text(kind: str, method: str, *args: Any, **options: Any) -> str:
        def lower(name: str, *key: Any, make: Callable) -> Callable:
            if name != kind:
                return usual(name, *key, make=make)

            def show(*args: Any) -> None:
                raise Lowered(make().lower(*args).as_text(debug_info=True))

            return show

        monkeypatch.setattr(engine, "_program", lower)
        args = tuple(state if isinstance(arg, str) else arg for arg in args)
        with pytest.raises(Lowered) as shown:
            getattr(engine, method)(params, *args, **options)
        return str(shown.value)

    return text


def test_prefill(text_of):
    tokens, lengths = np.zeros((1, 8), np.int32), np.full(1, 8, np.int32)
    assert "/prefill/" in text_of("prefill", "prefill_rows", None, tokens, lengths)


def test_decode(text_of):
    assert "/decode/" in text_of("generate", "generate", "state", steps=2)


def test_scoring(text_of):
    rows = np.zeros(1, np.int32)
    words = ("state", rows, rows, np.zeros((1, 4), np.int32))
    assert "/scoring/" in text_of("suffix_logprobs", "suffix_logprobs", *words)
    assert "/scoring/" in text_of("prompt_logprobs", "prompt_logprobs", np.arange(4), 2)
