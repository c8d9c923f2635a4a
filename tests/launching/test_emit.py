"""`sweep --emit`: a job per run of a sweep, each with the config of its cell."""

from pathlib import Path

import pytest
import yaml

from nrt_jax import cli
from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.experiments.cells import read_sweep
from tests.launching import schemas
from tests.launching.test_launch import POD, check, container_of

OUT = "/mnt/nrt/runs/mine"
OVERRIDE = 'data.question_jinja={{ q }}: "it\'s"'


@pytest.fixture
def sweep(tmp_path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text("base: [quickstart/nrt, methods/rlpr]\nseeds: [0, 7]\n")
    return file


@pytest.fixture
def emitted(capsys, sweep):
    """What `sweep --emit` prints for the cells of the sweep."""

    def run(kind: str, *words: str) -> str:
        command = ["sweep", str(sweep), OVERRIDE, "--out", OUT, "--emit", kind, *words]
        assert cli.main(command) == 0
        return capsys.readouterr().out

    return run


def trained(words: list[str]) -> RunConfig:
    """The config that `nrt-jax train` makes of words."""
    configs = [Path(word) for word in words if "=" not in word]
    return load_config(RunConfig, configs, [word for word in words if "=" in word])


def test_a_jobset_per_cell_trains_its_config(emitted, sweep):
    text = emitted("jobset", *POD, "--topology", "v6e:2x2", "--name", "n" * 40)
    jobsets = list(yaml.safe_load_all(text))
    cells = read_sweep(sweep, [OVERRIDE], Path(OUT)).cells
    for jobset, cell, end in zip(jobsets, cells, ("-0", "-1"), strict=True):
        check(schemas.JOBSET, jobset)
        assert jobset["metadata"]["name"] == "n" * 38 + end
        verb, *words, status, code = container_of(jobset)["args"]
        assert (verb, status, code) == ("train", "--stopped-status", "75")
        assert trained(words) == cell.config


def test_a_config_beside_the_sweep_travels_resolved(emitted, sweep):
    (sweep.parent / "own.yaml").write_text(
        "model: {path: /mnt/nrt/m}\ndata: {source: hard_tokens, tokenizer: /mnt/nrt/m}\n"
    )
    sweep.write_text("base: own.yaml\n")
    config_map, jobset = yaml.safe_load_all(emitted("jobset", *POD, "--topology", "v6e:2x2"))
    assert container_of(jobset)["args"][:2] == ["train", "/etc/nrt_jax/run.yaml"]
    there = sweep.parent / "run.yaml"
    there.write_text(config_map["data"]["run.yaml"])
    (cell,) = read_sweep(sweep, [OVERRIDE], Path(OUT)).cells
    assert load_config(RunConfig, [there]) == cell.config


def test_a_script_submits_a_task_per_cell_to_skypilot(emitted, sweep, fakes, tmp_path):
    script = tmp_path / "sweep.sh"
    script.write_text(emitted("sky", "--bucket", "runs", "--topology", "h100x1"))
    fakes.add("sky", f'cat "${{@: -1}}" >>{tmp_path}/tasks; echo --- >>{tmp_path}/tasks')
    assert fakes.run(script).returncode == 0
    assert len(fakes.calls) == 2
    assert all(call.startswith("sky jobs launch --yes --detach-run /") for call in fakes.calls)
    tasks = [task for task in yaml.safe_load_all((tmp_path / "tasks").read_text()) if task]
    assert [task["name"] for task in tasks] == ["runs-mine-0", "runs-mine-1"]
    for task, cell in zip(tasks, read_sweep(sweep, [OVERRIDE], Path(OUT)).cells, strict=True):
        check(schemas.SKY, task)
        assert str(cell.config.run_dir) in task["run"]


def test_slurm_has_one_job_array(emitted, sweep):
    text = emitted("slurm", "--topology", "h100x1")
    assert "#SBATCH --array=0-1" in text
    assert f'--out {OUT} --cell "$SLURM_ARRAY_TASK_ID" --retry' in text


def test_what_a_launcher_lacks_is_told(sweep, capsys):
    assert cli.main(["sweep", str(sweep), "--emit", "jobset", "--topology", "v6e:2x2"]) == 2
    assert "--image is missing" in capsys.readouterr().err
