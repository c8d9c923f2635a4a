"""The schema of a sweep: what its runs have in common, and how they differ."""

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from nrt_jax.config.load import LocalPath, Section

Words = str | tuple[str, ...]
"""Configs, presets and overrides, as after `nrt-jax train`: one, or a list."""
Axis = dict[str, Words] | tuple[Any, ...]
"""Options by name, each with its words; or values of the config key that the axis is named by."""


class SweepConfig(Section):
    """Many runs: `nrt-jax sweep SWEEP`."""

    base: Words
    """Configs, presets and overrides of every run. Files are relative to the sweep's file."""
    grid: dict[str, Axis] = Field(default={})
    """Axes of which every combination is a run. An axis is a list of values, and is then named by a
    config key such as rollout.traces_per_prompt; or a mapping of names to configs, presets and
    overrides."""
    zip: dict[str, Axis] = Field(default={})
    """Axes of equal length that advance together, as one more axis of the grid."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Seeds of every combination."""
    exclude: tuple[dict[str, Any], ...] = ()
    """Combinations that are left out: options by axis, such as {method: sft, seed: 1}. All runs
    with these options are meant, whatever their other options."""
    out: LocalPath | None = None
    """Folder of the runs; otherwise runs/sweeps/ and the name of the sweep's file."""

    @field_validator("grid", "zip")
    @classmethod
    def _has_options(cls, axes: dict[str, Axis]) -> dict[str, Axis]:
        for name, options in axes.items():
            if not options:
                raise ValueError(f"axis {name} has no options")
            if name == "seed":
                raise ValueError("seed is no axis; list the seeds in seeds")
        return axes

    @model_validator(mode="after")
    def _zips(self) -> "SweepConfig":
        lengths = {name: len(options) for name, options in self.zip.items()}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise ValueError(f"axes of zip must have as many options each: {shown}")
        if twice := sorted(set(self.grid) & set(self.zip)):
            raise ValueError(f"axis {twice[0]} stands in grid and in zip")
        return self

    def folder(self, file: Path) -> Path:
        """The folder of the runs of a sweep that stands in `file`."""
        return self.out if self.out is not None else Path("runs/sweeps") / file.stem
