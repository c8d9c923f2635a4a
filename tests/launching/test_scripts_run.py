"""The scripts of launch/, with programs in place of SLURM's and Google's."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

QUICKSTART = ("quickstart/nrt", "run_dir=/mnt/nrt/runs/q")
CLOUD = ("--zone", "us-east5-a", "--bucket", "runs")
WAITS = 'trap "exit 75" TERM; touch ready; for _ in $(seq 100); do sleep 0.1; done; exit 9'


@pytest.fixture
def job(printed, fakes) -> Path:
    script = fakes.folder / "job.sh"
    script.write_text(printed("slurm", *QUICKSTART, "--topology", "h100x8:2", "--restarts", "3"))
    fakes.add("scontrol")
    return script


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, 0, False), (1, 0, True), (75, 2, True), (1, 3, False), (2, 0, False), (130, 0, False)],
)
def test_a_job_that_failed_is_queued_again(fakes, job, status, restarts, requeued):
    fakes.add("srun", f"exit {status}")
    result = fakes.run(job, SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restarts))
    assert result.returncode == status
    assert ("scontrol requeue 7" in fakes.calls) == requeued
    assert fakes.calls[0].startswith("srun --kill-on-bad-exit=1 .venv/bin/nrt-jax train")


def stop(fakes, script: Path, **environment: str) -> int:
    """SIGTERM to the script once its program runs; the script's status."""
    process = subprocess.Popen(
        ["bash", str(script)], env=fakes.environment(**environment), cwd=fakes.folder
    )
    for _ in range(200):
        if (fakes.folder / "ready").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    return process.wait(20)


def test_a_job_passes_sigterm_on_and_is_queued_again(fakes, job):
    fakes.add("srun", WAITS)
    assert stop(fakes, job, SLURM_JOB_ID="7") == 75
    assert fakes.calls[1:] == ["scontrol requeue 7"]


def test_a_stopped_run_of_a_sweep_is_queued_again(fakes, printed):
    script = fakes.folder / "sweep.sh"
    words = ("slurm-sweep", "sweeps/quickstart_methods", "--topology", "h100x8")
    script.write_text(printed(*words).replace(".venv/bin/nrt-jax", "nrt-jax"))
    fakes.add("scontrol")
    # A sweep that was stopped ends with 0.
    fakes.add("nrt-jax", WAITS.replace("exit 75", "exit 0"))
    ids = {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_JOB_ID": "7"}
    assert stop(fakes, script, **ids) == 0
    assert fakes.calls == [
        "nrt-jax sweep sweeps/quickstart_methods --cell 4 --retry",
        "scontrol requeue 7_4",
    ]


def test_a_task_prepares_its_share(fakes, printed):
    script = fakes.folder / "prepare.sh"
    text = printed("slurm-prepare", *QUICKSTART, "--out", "/data", "--tasks", "8")
    script.write_text(text.replace(".venv/bin/nrt-jax", "nrt-jax"))
    fakes.add("nrt-jax")
    fakes.run(script, SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_TASK_COUNT="8")
    words = "data prepare quickstart/nrt run_dir=/mnt/nrt/runs/q /data --shard 3/8 --workers 1"
    assert fakes.calls == [f"nrt-jax {words}"]


def test_a_slice_of_compute_engine(fakes, printed):
    fakes.add(
        "gcloud",
        '[[ "$*" == *list-instances* ]] && printf "q-a\\nq-b\\n"; '
        '[[ "$*" == *get-value* ]] && echo project; exit 0',
    )
    fakes.add("git")
    script = fakes.folder / "gce.sh"
    script.write_text(printed("gce", *QUICKSTART, *CLOUD, "--topology", "v5p:2x2x2", "--spot"))
    result = fakes.run(script)
    assert result.returncode == 0, result.stderr
    calls = " | ".join(fakes.calls)
    for part in (
        "workload-policy runs-q --region=us-east5 --type=HIGH_THROUGHPUT",
        "--accelerator-topology=2x2x2",
        "--machine-type=ct5p-hightpu-4t",
        "--provisioning-model=SPOT",
        "--size=2 --template=projects/project/regions/us-east5/instanceTemplates/runs-q",
        "compute ssh q-a",
        "compute ssh q-b",
        "tpu_host.sh runs /mnt/nrt",
    ):
        assert part in calls, part
    assert "delete with" in result.stdout


def test_a_slice_of_the_legacy_api(fakes, printed):
    fakes.add("gcloud")
    fakes.add("git")
    script = fakes.folder / "tpu_vm.sh"
    script.write_text(printed("tpu-vm", *QUICKSTART, *CLOUD, "--topology", "v5e:4x4"))
    result = fakes.run(script)
    assert result.returncode == 0, result.stderr
    created = next(call for call in fakes.calls if "create" in call)
    assert "--accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite" in created


def test_a_tpu_host_runs_a_service_that_starts_again(fakes):
    folder = fakes.folder / "checkout" / "launch"
    folder.mkdir(parents=True)
    for name in ("tpu_host.sh", "python312.sh"):
        shutil.copy(REPOSITORY / "launch" / name, folder)
    script = folder / "tpu_host.sh"
    unit = fakes.folder / "unit"
    for program in ("gcsfuse", "make", "python3.12"):
        fakes.add(program)
    fakes.add("sudo", f'[ "$1" = tee ] && cat >{unit}; exit 0')
    result = fakes.run(script, "runs", "/mnt/nrt")
    assert result.returncode == 0, result.stderr
    lines = unit.read_text().splitlines()
    assert {"Restart=on-failure", "RestartPreventExitStatus=2", "KillMode=mixed"} <= set(lines)
    assert f"WorkingDirectory={folder.parent}" in lines
    assert any("gcsfuse --implicit-dirs runs /mnt/nrt" in line for line in lines)
    python = fakes.folder / "python3.12"
    assert f"make venv PYTHON={python} REQUIREMENTS=requirements-tpu.txt" in fakes.calls
    assert fakes.calls[-3:] == [
        "sudo systemctl daemon-reload",
        "sudo systemctl enable nrt-jax",
        "sudo systemctl restart nrt-jax",
    ]


def test_uv_installs_python_where_there_is_none_with_venv(fakes):
    fakes.add("python3.12", "exit 1")
    fakes.add("uv", '[ "$2" = find ] && echo /uv/python3.12; exit 0')
    result = fakes.run(REPOSITORY / "launch" / "python312.sh")
    assert result.stdout == "/uv/python3.12\n", result.stderr
    assert fakes.calls[1:] == ["uv python install 3.12", "uv python find 3.12"]
