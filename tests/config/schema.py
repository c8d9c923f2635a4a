"""A small config, and what loads it from texts."""

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, model_validator

from nrt_jax.config.load import ConfigPath, Section, load_config
from nrt_jax.errors import InputError


class Shares(Section):
    copy_share: float = 0.5
    noise_share: float = 0.5

    @model_validator(mode="after")
    def _sum_to_one(self):
        if self.copy_share + self.noise_share != 1:
            raise ValueError(f"shares must sum to 1,\n  not {self.copy_share + self.noise_share}")
        return self


class Train(Section):
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak of the schedule."""
    steps: int = Field(default=10, ge=1, le=1000)
    scheme: Literal["am", "gm"] = "am"
    cap: float | Literal["auto"] | None = None
    shares: Shares = Shares()


class Source(Section):
    path: ConfigPath
    """A data file."""


class Config(Section):
    name: str = "run"
    train: Train = Train()
    """How to train."""
    data: Source | None = None
    sources: tuple[Source, ...] = ()
    notes: dict[str, str | int] = Field(default_factory=dict)
    output: Path = Path("runs/x")
    tags: tuple[str, ...] = ()


class Optional(Section):
    text: str | None = "default"


class Strict(Section):
    train: Train = Train()
    data: Source


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def load(text: str = "", *overrides: str, schema=Config):
    return load_config(schema, [write("c.yaml", text)], overrides)


def message(call, *args, **kwargs) -> str:
    with pytest.raises(InputError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)
