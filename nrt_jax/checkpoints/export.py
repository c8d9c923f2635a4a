"""Checkpoints in and out: `nrt-jax import` and `nrt-jax export`."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax

from nrt_jax.checkpoints import hf_weights, import_format
from nrt_jax.checkpoints.directory_config import write_settings
from nrt_jax.checkpoints.generation_config import (
    read_generation,
    read_token_ids,
    trained_generation,
)
from nrt_jax.checkpoints.hf_config import StoredDtype, read_architecture
from nrt_jax.checkpoints.model_card import converted_card, trained_card
from nrt_jax.checkpoints.new_directory import check_new
from nrt_jax.checkpoints.open import find_model, open_model
from nrt_jax.checkpoints.token_rows import copy_token_rows, row_pairs
from nrt_jax.config.mesh import MeshConfig
from nrt_jax.config.run import RunConfig
from nrt_jax.data.chat_export import chat_template_text
from nrt_jax.data.tokenizer_check import check_tokenizer
from nrt_jax.data.tokenizer_files import SENTENCEPIECE_FILE, TOKENIZER_FILE, read_backend
from nrt_jax.errors import InputError
from nrt_jax.models.sharding import make_mesh, spread_mesh

log = logging.getLogger(__name__)

CARD = "README.md"


@dataclass(frozen=True)
class Imported:
    """Size of what an import wrote."""

    weights: int
    nbytes: int


def import_checkpoint(
    source: Path, out: Path, mesh: MeshConfig, dtype: StoredDtype | None
) -> Imported:
    """Write a Hugging Face directory in the format of which each process reads and writes a part.

    Raises InputError for a directory, or a tokenizer in it, that cannot be used.
    """
    _check_tokenizer(source)
    params = import_format.import_directory(source, out, make_mesh(mesh), dtype)
    leaves = jax.tree.leaves(params)
    return Imported(sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves))


def export(path: Path, out: Path, *, dtype: StoredDtype | None, copy_rows: list[str]) -> None:
    """Write any model that `open_model` takes as a Hugging Face directory.

    Without a dtype it is that of the checkpoint that a run started from, and that of each weight
    of a directory. `copy_rows` holds TOKEN=FROM, each token a vocabulary entry (escapes such as
    \\n are read).
    """
    check_new(out)
    found = find_model(path)
    if found.kind == "run":
        _export_run(path, out, dtype, copy_rows)
    elif copy_rows:
        raise InputError(f"--copy-row {copy_rows[0]}: only for runs; {path} is none ({found.kind})")
    else:
        _export_directory(path, out, dtype)


def _export_run(path: Path, out: Path, dtype: StoredDtype | None, copy_rows: list[str]) -> None:
    opened = open_model(path, mesh_of=lambda _, architecture: spread_mesh(architecture))
    config, tokenizer = opened.config, opened.tokenizer
    rows = row_pairs(tokenizer, copy_rows)
    template = chat_template_text(config.data, tokenizer, opens_trace=opened.reasons)
    card = trained_card(opened)
    generation = trained_generation(config.model.path, tokenizer)

    def add_files(folder: Path) -> None:
        tokenizer.copy_to(folder, chat_template=template)
        write_settings(folder, config, tokenizer)
        (folder / CARD).write_text(card, encoding="utf-8")

    hf_weights.write_directory(
        out,
        opened.model.architecture,
        copy_token_rows(opened.params, rows),
        dtype=dtype or _dtype_of_base(config),
        generation=generation,
        add_files=add_files,
    )


def _export_directory(path: Path, out: Path, dtype: StoredDtype | None) -> None:
    architecture = read_architecture(path)
    params = import_format.read_params(
        path, import_format.saved_target(path, spread_mesh(architecture))
    )

    def add_files(folder: Path) -> None:
        for file in import_format.tokenizer_files(path):
            target = folder / file.relative_to(path)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
        (folder / CARD).write_text(converted_card(path), encoding="utf-8")

    hf_weights.write_directory(
        out,
        architecture,
        params,
        dtype=dtype,
        generation=read_generation(path),
        token_ids=read_token_ids(path),
        add_files=add_files,
    )


def _check_tokenizer(source: Path) -> None:
    """InputError for a tokenizer that no run would take; a run looks for its tokens too."""
    if (source / TOKENIZER_FILE).exists():
        check_tokenizer(source, read_backend(source), None)
    elif (source / SENTENCEPIECE_FILE).exists():
        log.warning("%s: has no %s, so a run needs another data.tokenizer", source, TOKENIZER_FILE)


def _dtype_of_base(config: RunConfig) -> StoredDtype:
    return "float32" if config.model.path is None else import_format.stored_dtype(config.model.path)
