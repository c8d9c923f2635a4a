"""Digests of files: of what is in them now, read once where they are large."""

import hashlib
import os

import pytest

from nrt_jax.data import digests
from nrt_jax.data.digests import digests_of_files


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def reads(monkeypatch):
    """The files that are read, where any that is not empty counts as large."""
    found = []
    read = digests._read
    monkeypatch.setattr(digests, "LARGE_BYTES", 0)
    monkeypatch.setattr(digests, "_read", lambda path: found.append(path) or read(path))
    return found


def test_a_large_file_is_read_once(tmp_path, reads):
    (tmp_path / "rows").write_bytes(b"one")
    for _ in range(3):
        assert digests_of_files({"a": tmp_path / "rows"}) == {"a": sha256(b"one")}
    assert len(reads) == 1


def test_a_file_that_changed_is_read_again(tmp_path, reads):
    file = tmp_path / "rows"
    file.write_bytes(b"one")
    digests_of_files({"a": file})
    file.write_bytes(b"two")
    os.utime(file, ns=(0, 0))
    assert digests_of_files({"a": file}) == {"a": sha256(b"two")}
    # The same size and the same time, in another file of the same name.
    other = tmp_path / "other"
    other.write_bytes(b"six")
    os.utime(other, ns=(0, 0))
    other.rename(file)
    assert digests_of_files({"a": file}) == {"a": sha256(b"six")}
    assert len(reads) == 3


def test_missing_files_have_no_digest(tmp_path):
    assert digests_of_files({"a": tmp_path / "none"}) == {}
