"""The place of a process by options, environment and cluster, and what processes agree on."""

import os
import subprocess
import sys

import pytest

from nrt_jax import distributed
from nrt_jax.cli import main
from nrt_jax.distributed import Place, check_same, find_place
from nrt_jax.errors import InputError, RunFailed
from nrt_jax.local import _environment, _free_port
from tests.conftest import REPOSITORY


def test_one_process_has_no_place():
    assert find_place() is None
    assert find_place(None, None, 1) is None
    assert distributed.gather("numbers", 3) == [3]
    assert not distributed.any_of("a stop", False)
    check_same("config", {"seed": 0}, "nothing to mend")
    assert distributed.is_first()


def test_options_win_over_the_environment(monkeypatch):
    monkeypatch.setenv("NRT_JAX_COORDINATOR", "far:1")
    monkeypatch.setenv("NRT_JAX_PROCESS_ID", "1")
    monkeypatch.setenv("NRT_JAX_PROCESSES", "3")
    assert find_place() == Place("far:1", 1, 3)
    assert find_place("[::1]:80", 2, 4) == Place("[::1]:80", 2, 4)


@pytest.mark.parametrize(
    ("told", "line"),
    [
        (
            ("h:1", None, 2),
            "--coordinator h:1, --processes 2: --process-id is missing; give all three, or none",
        ),
        ((None, 1, 1), "--process-id 1, --processes 1: --coordinator is missing; give all"),
        (("h:1", 2, 2), "--process-id 2: must be from 0 to 1"),
        (("h", 0, 2), "--coordinator h: must look like HOST:PORT, such as 10.0.0.1:8476"),
        (("h:99999", 0, 2), "--coordinator h:99999: must look like HOST:PORT"),
    ],
)
def test_mistakes_in_the_options(told, line):
    with pytest.raises(InputError) as error:
        find_place(*told)
    assert str(error.value).startswith(line)


def test_mistakes_in_the_environment(monkeypatch):
    monkeypatch.setenv("NRT_JAX_PROCESS_ID", "-1")
    with pytest.raises(InputError, match="NRT_JAX_PROCESS_ID=-1: must be a number, as for --proc"):
        find_place()


SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def test_slurm_is_detected(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert find_place() == Place("node07:61441", 3, 4, [1])
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert find_place() is None


def test_one_gpu_per_slurm_task_is_refused(monkeypatch):
    shows_one = {"CUDA_VISIBLE_DEVICES": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    for name, value in (SLURM | shows_one).items():
        monkeypatch.setenv(name, value)
    line = r"SLURM runs 2 tasks on this host and shows this one the GPUs 0 alone .*launch slurm"
    with pytest.raises(InputError, match=line):
        find_place()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert find_place() is not None


def test_a_cluster_that_does_not_say(monkeypatch):
    for name, value in (SLURM | {"SLURM_NTASKS": "four"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"cluster does not say which process .*PROCESSES=1"):
        find_place()
    monkeypatch.setenv("NRT_JAX_PROCESSES", "1")
    assert find_place() is None


def test_a_server_is_one_process(monkeypatch, capsys):
    monkeypatch.setenv("NRT_JAX_COORDINATOR", "far:1")
    monkeypatch.setenv("NRT_JAX_PROCESS_ID", "1")
    monkeypatch.setenv("NRT_JAX_PROCESSES", "2")
    assert main(["serve", "model"]) == 2
    assert capsys.readouterr().err == (
        "nrt-jax: error: serve: this is process 1 of 2, and a server is one process; start it on "
        "one host alone, without NRT_JAX_PROCESSES or a cluster's task\n"
    )


def test_the_first_difference_is_named(monkeypatch):
    """Two processes, of which this is one; what the other exchanges is made up."""
    theirs = {"a": 1, "b": 2, "c": 3}
    monkeypatch.setattr(distributed._State, "place", Place("h:1", 0, 2))
    exchanged = []

    def gather(what: str, value: object) -> list[object]:
        exchanged.append(value)
        return [value, "another digest" if isinstance(value, str) else theirs]

    monkeypatch.setattr(distributed, "gather", gather)
    line = "step 3: b is 5 on process 0 and 2 on process 1; start anew"
    with pytest.raises(RunFailed, match=line):
        check_same("step 3", {"a": 1, "b": 5, "c": 4}, "start anew", RunFailed)
    assert len(exchanged) == 2
    monkeypatch.setattr(distributed, "gather", lambda what, value: [value, value])
    check_same("step 3", theirs, "start anew")


SECOND_IS_LATE = """
import sys, time
from nrt_jax import distributed
distributed.initialise(distributed.find_place())
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from nrt_jax.config.mesh import MeshConfig
from nrt_jax.models.sharding import make_mesh, place, replicated
mesh = make_mesh(MeshConfig(data=2, fsdp=2))
rows = place(np.arange(8.0), NamedSharding(mesh, PartitionSpec("data")))
time.sleep(35 * distributed.process_index())
total = jax.jit(lambda x: x.sum(), out_shardings=replicated(mesh))(rows)
print(float(total), file=sys.stderr)
distributed.leave()
"""


@pytest.mark.slow
def test_a_process_may_come_late_to_a_sum():
    """Gloo connects processes within 30 s or gives up; they are connected when the mesh is made."""
    address = f"localhost:{_free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SECOND_IS_LATE],
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | _environment(address, process, 2, 2),
        )
        for process in range(2)
    ]
    said = [process.communicate(timeout=300)[1].split() for process in processes]
    assert [words[-1:] for words in said] == [["28.0"], ["28.0"]], said
