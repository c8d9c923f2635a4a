"""The lock of a run directory where the system has none."""

import errno
import fcntl
import json
import os
import time

import pytest

from nrt_jax.checkpoints import lease, run_dir
from nrt_jax.errors import InputError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    monkeypatch.setattr(lease, "EXPIRE_S", 0.5)


def test_a_second_holder_is_refused(tmp_path):
    path = tmp_path / "lease.json"
    held = "here: another process trains in it, on .*; wait until it ends, or choose another"
    with lease.leased(path, "here"):
        with pytest.raises(InputError, match=held), lease.leased(path, "here"):
            pass
        assert path.exists()
    assert not path.exists()
    with lease.leased(path, "here"):
        pass


@pytest.mark.parametrize("left", [b'{"owner": "x", "host": "far", "changes": 7}\n', b"{"])
def test_what_a_killed_process_left_is_taken(tmp_path, left):
    path = tmp_path / "lease.json"
    path.write_bytes(left)
    with lease.leased(path, "here"):
        assert json.loads(path.read_bytes())["owner"] != "x"


def test_a_process_whose_lease_was_taken_ends(tmp_path, monkeypatch, capsys):
    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    path = tmp_path / "lease.json"
    with lease.leased(path, "here"):
        path.write_text('{"owner": "x", "host": "far", "changes": 1}')
        deadline = time.monotonic() + 10
        while not ends and time.monotonic() < deadline:
            time.sleep(0.05)
    assert ends[0] == 1
    assert (
        "here: its lease was taken by far while this process stood still" in capsys.readouterr().err
    )


def test_a_run_directory_without_locks_has_a_lease(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    again = run_dir.locked(tmp_path / "run")
    with run_dir.locked(tmp_path / "run"):
        assert (tmp_path / "run" / "lease.json").exists()
        with pytest.raises(InputError, match="another process trains in it"), again:
            pass
    assert not (tmp_path / "run" / "lease.json").exists()
