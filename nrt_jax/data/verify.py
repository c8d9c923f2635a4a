"""`nrt-jax data verify`: whether prepared data is what was written, to the byte."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from nrt_jax.data.manifest import RESTORE, Manifest, Shard, read_manifest
from nrt_jax.errors import InputError

_BLOCK_BYTES = 2**22


def verify(directory: Path) -> Manifest:
    """Read all shards; InputError, which names every damaged one, unless each has its digest."""
    manifest = read_manifest(directory)
    shards = [shard for of_split in manifest.splits.values() for shard in of_split]
    total = sum(shard.nbytes for shard in shards)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        found = [(shard.path, _damage(directory, shard, bar)) for shard in shards]
    damaged = [f"{path} ({damage})" for path, damage in found if damage]
    if damaged:
        raise InputError(
            f"{directory}: {len(damaged)} of {len(shards)} shards are damaged: "
            f"{', '.join(damaged)}; {RESTORE}"
        )
    return manifest


def _damage(directory: Path, shard: Shard, bar: tqdm) -> str | None:
    """What is wrong with a shard."""
    path = directory / shard.path
    digest = hashlib.sha256()
    try:
        for block in _blocks(path):
            digest.update(block)
            bar.update(len(block))
    except OSError as error:
        return error.strerror
    if (size := path.stat().st_size) != shard.nbytes:
        return f"{size} bytes of {shard.nbytes}"
    return None if digest.hexdigest() == shard.sha256 else "another content"


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block
