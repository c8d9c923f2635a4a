"""What a run reads by path, as digests: a run must not continue over other data in silence."""

import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

from nrt_jax import distributed
from nrt_jax.checkpoints.hf_config import CONFIG_FILE, GENERATION_FILE
from nrt_jax.checkpoints.import_format import PARAMS
from nrt_jax.config.rows import location
from nrt_jax.config.run import RunConfig
from nrt_jax.data.chat_template import template_text
from nrt_jax.data.digests import (
    WHOLE,
    digests_of_data,
    digests_of_files,
    digests_of_training_data,
)
from nrt_jax.data.manifest import MANIFEST_FILE
from nrt_jax.data.prepared import prepared_directory
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.data.tokenizer_files import LEGACY_FILES, SETTINGS_FILE, TOKENIZER_FILE
from nrt_jax.data.training_rows import evaluation_source
from nrt_jax.errors import InputError
from nrt_jax.types import TokenizedExample

log = logging.getLogger(__name__)

InputName = Literal["data", "eval_data", "tokenizer", "template", "model"]
"""What `train --allow-changed` names."""
INPUT_NAMES: tuple[InputName, ...] = get_args(InputName)
OF_EXAMPLES = frozenset(INPUT_NAMES) - {"model"}
"""Inputs that decide which rows there are, and their tokens."""

_HELD_OUT, _WEIGHTS = "held-out rows", "weights as read"
_SAMPLES, _SAMPLE_BYTES = 64, 2**14
"""Blocks of a weight file that its sampled digest reads; a smaller file is read whole."""


class Input(NamedTuple):
    """One input: where it was found, and a digest of each of its parts."""

    path: str
    parts: dict[str, str]


class Change(NamedTuple):
    """An input that is not what it was, and its parts that differ."""

    name: str
    before: Input | None
    after: Input | None
    parts: list[str]


@dataclass(frozen=True)
class RunInputs:
    """The inputs of a run by name, and the changes of them that were allowed."""

    inputs: dict[str, Input]
    allowed_changes: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "inputs": {name: found._asdict() for name, found in self.inputs.items()},
            "allowed_changes": list(self.allowed_changes),
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "RunInputs":
        """The opposite of `to_json`."""
        inputs = {name: Input(**found) for name, found in saved["inputs"].items()}
        return cls(inputs, tuple(saved["allowed_changes"]))

    def check_alike(self) -> None:
        """InputError, with the name of the first that differs, unless all processes read these."""
        parts = {
            name + (f" ({part})" if part else ""): digest
            for name, found in self.inputs.items()
            for part, digest in found.parts.items()
        }
        distributed.check_same("inputs", parts, "give all hosts the same files")

    def with_weights(self, fingerprints: Mapping[str, int]) -> "RunInputs":
        """Also the exact fingerprints of weights that a run reads again when it continues."""
        model = self.inputs["model"]
        parts = model.parts | {_WEIGHTS: _of_json(dict(fingerprints))}
        return replace(self, inputs=self.inputs | {"model": model._replace(parts=parts)})

    def continued(
        self, saved: "RunInputs", allowed: Collection[str], *, run: Path, step: int
    ) -> tuple["RunInputs", frozenset[str]]:
        """These inputs for a run that continues from `step`, and the names of the changed ones.

        Raises InputError, which names every change, unless all of them are `allowed`.
        """
        changes = [change for name in INPUT_NAMES if (change := _compare(name, saved, self))]
        names = frozenset(change.name for change in changes)
        if refused := names - set(allowed) - _follows(changes, allowed):
            to_allow = names - _follows(changes, names)
            named = ",".join(name for name in INPUT_NAMES if name in to_allow)
            what = "; ".join(_described(change) for change in changes if change.name in refused)
            raise InputError(
                f"{run}: the run was trained on other inputs: {what}; restore them, or continue "
                f"on purpose with --allow-changed {named}, or choose another run_dir"
            )
        for change in changes:
            log.warning("allowed from step %d on: %s", step, _described(change))
        records = [_record(change, step) for change in changes]
        return replace(self, allowed_changes=(*saved.allowed_changes, *records)), names


def read_inputs(
    config: RunConfig, tokenizer: Tokenizer, held_out: Sequence[TokenizedExample]
) -> RunInputs:
    """Digests of the config's inputs: data, tokenizer and template in full, weights by samples.

    A full digest reads a file once more, in pieces. Times of modification are left out: they differ
    between copies of a file, and two files of an archive may share one. InputError for a file that
    cannot be read.
    """
    data, directory = config.data, config.tokenizer_directory
    try:
        eval_path = data.eval_path
        evaluated = data.location if eval_path is None else location(eval_path)
        inputs = {"eval_data": Input(evaluated, {})}
        if (prepared := prepared_directory(data)) is not None:
            # The manifest has the digests of all shards.
            manifest = digests_of_files({MANIFEST_FILE: prepared / MANIFEST_FILE})
            inputs["data"] = Input(data.location, manifest)
        elif not data.generated:
            inputs["data"] = Input(data.location, digests_of_training_data(data))
        if eval_path is not None:
            inputs["eval_data"].parts.update(digests_of_data(evaluation_source(data), eval_path))
        inputs["eval_data"].parts[_HELD_OUT] = _of_rows(held_out)
        names = (TOKENIZER_FILE, SETTINGS_FILE, *LEGACY_FILES)
        inputs["tokenizer"] = Input(
            str(directory), digests_of_files({name: directory / name for name in names})
        )
        if (template := template_text(data, tokenizer)) is not None:
            where = directory if data.template == "tokenizer" else data.template
            digest = hashlib.sha256(template.encode()).hexdigest()
            inputs["template"] = Input(str(data.template_file or where), {WHOLE: digest})
        if config.model.path is not None:
            inputs["model"] = Input(str(config.model.path), _of_model(config.model.path))
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return RunInputs(inputs)


def _of_model(directory: Path) -> dict[str, str]:
    names = (CONFIG_FILE, GENERATION_FILE)
    weights = [*directory.glob("*.safetensors"), *(directory / PARAMS).rglob("*")]
    samples = {
        file.relative_to(directory).as_posix(): _sampled(file)
        for file in sorted(weights)
        if file.is_file()
    }
    return digests_of_files({name: directory / name for name in names}) | samples


def _sampled(path: Path) -> str:
    """Digest of a file's size and of blocks spread evenly over it, the first and the last too."""
    size = path.stat().st_size
    with path.open("rb") as file:
        return hashlib.sha256(b"%d " % size + b"".join(_blocks(file, size))).hexdigest()


def _blocks(file: BinaryIO, size: int) -> list[bytes]:
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return [file.read()]
    blocks = []
    for i in range(_SAMPLES):
        file.seek(i * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
        blocks.append(file.read(_SAMPLE_BYTES))
    return blocks


def _of_rows(rows: Sequence[TokenizedExample]) -> str:
    return _of_json([(row.example.question, row.example.answer) for row in rows])


def _of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _compare(name: str, saved: RunInputs, now: RunInputs) -> Change | None:
    before, after = saved.inputs.get(name), now.inputs.get(name)
    if before is None and after is None:
        return None
    then, have = before.parts if before else {}, after.parts if after else {}
    parts = [part for part in {**then, **have} if then.get(part) != have.get(part)]
    if name == "model":
        parts = [part for part in parts if not _ignored(part, then, have)]
    # An input that appears or goes has changed, also one without a part.
    return Change(name, before, after, parts) if parts or not (before and after) else None


def _ignored(part: str, then: Mapping[str, str], have: Mapping[str, str]) -> bool:
    """Whether a difference of a model's weights means nothing.

    Files need not differ because weights do: another split into files, or another import. Where the
    weights themselves are known they alone count. A run that does not read its weights again can
    do without the files.
    """
    if part in (CONFIG_FILE, GENERATION_FILE):
        return False
    if part == _WEIGHTS:
        return part not in then or part not in have
    return (_WEIGHTS in then and _WEIGHTS in have) or part not in have


def _follows(changes: Sequence[Change], allowed: Collection[str]) -> set[str]:
    """Other held-out rows follow from other training data or tokens, and are allowed with them."""
    own = {change.name for change in changes if change.parts == [_HELD_OUT]}
    return own if {"data", "tokenizer", "template"} & set(allowed) else set()


def _described(change: Change) -> str:
    """Name, path and parts, such as "tokenizer=tok (tokenizer.json)"."""
    before, after = change.before, change.after
    if after is None or before is None:
        there = before or after
        assert there is not None
        return f"{change.name}={there.path} is {'new' if before is None else 'left out'}"
    moved = "" if before.path == after.path else f", before {before.path}"
    parts = [part for part in change.parts if part != WHOLE]
    held_out = "; evaluations before and after cannot be compared" if _HELD_OUT in parts else ""
    listed = f" ({', '.join(parts)})" if parts else ""
    return f"{change.name}={after.path}{moved} has changed{listed}{held_out}"


def _record(change: Change, step: int) -> dict[str, Any]:
    before, after = change.before, change.after
    return {
        "step": step,
        "input": change.name,
        "before": before._asdict() if before else None,
        "after": after._asdict() if after else None,
    }
