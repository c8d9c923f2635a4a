"""What the user did wrong, as `nrt-jax train` says it: one line, and nothing saved is harmed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nrt_jax.cli import main
from tests.training.runs import REPOSITORY, TinyRun, assert_same, write_model

# The tests' process has eight devices.
SIZES = ("train.batch_prompts=8", "train.mini_batch_prompts=8", "train.micro_batch_prompts=8")
SFT = ("method=sft",)


@pytest.fixture
def refused(tiny_config, tmp_path, capsys):
    """Run `train` with overrides in this process; the one line that it prints."""

    def run(*words: object, config: Path = tiny_config) -> str:
        run_dir = f"run_dir={tmp_path / 'run'}"
        assert main(["train", str(config), run_dir, *SIZES, *map(str, words)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        prefix = "nrt-jax: error: "
        assert line.startswith(prefix)
        return line.removeprefix(prefix)

    return run


@pytest.fixture
def folder(tiny_config, tmp_path) -> Path:
    """A copy of the model and its config, to be broken."""
    shutil.copytree(tiny_config.parent / "model", tmp_path / "model")
    shutil.copy(tiny_config, tmp_path / "tiny.yaml")
    return tmp_path


# --- config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {steps: 0}", "train.steps=0: must be greater than or equal to 1"),
        ("train: {stepps: 3}", "train.stepps: unknown key; did you mean 'steps'?"),
        ("train: [", "line 1: must be YAML"),
        ("- 1", "must be a mapping of keys to values"),
        ("method: ppo", "method=ppo: must be 'nrt' or 'sft'"),
    ],
)
def test_config_file(text, said, refused, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    line = refused(path)
    assert line.startswith(f"{path}: ")
    assert said in line


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "train.stepps=3",
            "override train.stepps=3: unknown key; did you mean 'steps'?",
        ),
        (
            "objective.scheme=wsp",
            "override objective.scheme=wsp: must be '",
        ),
        ("train.mini_batch_prompts=3", "mini_batch_prompts 3 must divide batch_prompts 8"),
        ("train.micro_batch_prompts=3", "micro_batch_prompts 3 must divide mini_batch_prompts 8"),
        ("rollout.slots=0", "override rollout.slots=0: must be greater than or equal to 1"),
        (
            "rollout.slots=12",
            "rollout.slots=12 does not divide over mesh data*fsdp=8; use a multiple of 8",
        ),
        (
            "mesh.data=3",
            "mesh: data=3, fsdp=1, tensor=1, context=1 does not cover 8 devices; the sizes must",
        ),
        (
            "rollout.mesh.data=3",
            "rollout.mesh: data=3, fsdp=1, tensor=1, context=1 does not cover 8 devices; the sizes",
        ),
        (
            "rollout.mesh={data: 4, tensor: 2}",
            "rollout.mesh: tensor=2 does not divide layers.attention.key of size 1",
        ),
        (
            "rollout.devices=8",
            "rollout.devices=8: there are 8 devices, and training needs one or more of its own; "
            "give fewer, or null to share all",
        ),
        (
            "rollout.stop_tokens=[nonesuch]",
            "rollout.stop_tokens: 'nonesuch' is no token of ",
        ),
        (
            "rollout.stop_tokens=eos",
            "rollout.stop_tokens=eos: must be 'special' or 'think_end' or a list, such as [a, b]",
        ),
        (
            "rollout.staleness=1",
            "rollout.staleness 1 without an importance ratio: the traces are of older weights; set "
            "objective.old_logprobs=recompute and objective.importance_cap=2",
        ),
        ("rollout.staleness=2", "rollout.staleness=2: must be less than or equal to 1"),
        *(
            (
                f"rollout.{name}={value}",
                f"rollout.{name} {value} with objective.old_logprobs sampler: the trainer's "
                "logprobs are those of the plain softmax; set objective.old_logprobs=recompute",
            )
            for name, value in (
                ("top_p", 0.9),
                ("top_k", 5),
                ("min_p", 0.1),
                ("repetition_penalty", 1.2),
            )
        ),
        ("rollout.min_p=1.5", "rollout.min_p=1.5: must be less than or equal to 1"),
        ("rollout.cache_dtype=fp8", "rollout.cache_dtype=fp8: must be 'float32', 'bfloat16' or"),
        (
            "rollout={traces_per_prompt: 1, drop_zero_std_groups: true}",
            "rollout.drop_zero_std_groups with rollout.traces_per_prompt 1: the rewards "
            "of one trace have no standard deviation, so nothing is left to train on; sample 2 or "
            "more",
        ),
        (
            "checkpoint.best_metric=loss/total",
            "checkpoint.best_metric loss/total: the metrics of a step are those of the weights "
            "before its update, and the checkpoint has those after it; use a metric of the "
            "evaluation: eval/exact_match, ",
        ),
        (
            "checkpoint.best_metric=eval/exact_match",
            "checkpoint.every_steps 2 must be a multiple of evaluation.every_steps 3",
        ),
    ],
)
def test_settings(override, said, refused, tmp_path):
    assert said in refused(override)
    assert not (tmp_path / "run").exists()


def test_a_ratio_of_t_end_without_the_other_special_tokens(refused):
    line = refused("rollout.stop_tokens=think_end", "objective.trace_covers=z_and_end")
    assert line.endswith(
        "rollout.stop_tokens think_end with objective.trace_covers z_and_end: t_end is scored "
        "among all tokens; set objective.trace_covers=z"
    )


def test_no_config_file(refused, tmp_path):
    assert refused(config=tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: no such config file"


# --- model, tokenizer, data -----------------------------------------------------------------------


def test_no_model(refused, tmp_path):
    line = refused(f"model.path={tmp_path}/none")
    assert line == f"{tmp_path}/none/config.json: no such file; give a Hugging Face model directory"


def test_half_a_model(refused, folder):
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    line = refused(config=folder / "tiny.yaml")
    assert line.startswith(f"{weights}: cannot be read as safetensors: ")
    # The run has not begun, so the directory is free for a run with the model mended.
    assert not (folder / "run").exists()


def test_no_tokenizer(refused, tmp_path):
    line = refused(f"data.tokenizer={tmp_path}/none")
    assert line.startswith(f"{tmp_path}/none: no such tokenizer directory; set data.tokenizer")


def test_a_think_token_with_another_role(refused):
    line = refused("data.think_start=<|eos|>")
    assert "data.think_start='<|eos|>' is the eos_token of this tokenizer; choose a name" in line


def test_no_tokenizer_is_named(refused):
    line = refused("data.tokenizer=null", "model.path=null", "model.architecture.vocab_size=25")
    assert "data.tokenizer is null and model.path too; name a directory with a tokenizer" in line


def test_tokenizer_of_another_model(refused, tmp_path):
    write_model(tmp_path / "small", vocab_size=20)
    line = refused(f"model.path={tmp_path}/small")
    assert "has 25 tokens, the model's vocab_size is 20; use the tokenizer of the model" in line


def data_file(path: Path, *lines: str) -> tuple[str, ...]:
    path.write_text("\n".join(lines) + "\n")
    return (
        "data.source=jsonl",
        f"data.path={path}",
        "data.eval_rows=1",
        "data.max_bad_share=0.1",
    )


GOOD = [json.dumps({"question": f"{i % 10}+{i // 10}", "answer": "=3"}) for i in range(16)]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "2 of 18 rows are unusable (2 bad JSON), more than data.max_bad_share=0.1; first"),
        (
            '{"question": "1"}',
            "first line 3: field 'answer' is missing (it has 'question'); add it",
        ),
        ('{"question": "1", "answer": " "}', "first line 3: 'answer' is ' '; fill it in or drop"),
        ('{"question": "1", "answer": true}', "first line 3: 'answer' is True; write it as a"),
        (
            '{"question": "1", "answer": "=12345"}',
            "first line 3: the answer '=12345' has 7 tokens, more than data.max_answer_tokens=4; "
            "raise it or shorten the row",
        ),
    ],
)
def test_rows(bad, said, refused, tmp_path):
    path = tmp_path / "rows.jsonl"
    line = refused(*data_file(path, *GOOD[:2], bad, bad, *GOOD[2:]))
    assert line.startswith(f"{path}: 2 of 18 rows are unusable")
    assert said in line


def test_no_data(refused, tmp_path):
    line = refused("data.source=jsonl", f"data.path={tmp_path}/none.jsonl")
    assert line == (
        f"{tmp_path}/none.jsonl: No such file or directory; set data.path or data.eval_path to a "
        "file"
    )


def test_too_little_data(refused, tmp_path):
    line = refused(*data_file(tmp_path / "rows.jsonl", *GOOD[:5]))
    assert "a batch of 8 prompts needs as many training rows, and the data has 4" in line


# --- the run directory ----------------------------------------------------------------------------


def test_a_file_in_its_place(refused, tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        line = refused(f"run_dir={tmp_path}/{name}")
        assert line.startswith(f"run_dir {tmp_path}/{name}: ")
        assert line.endswith("; choose a directory that you may write to")


def test_other_files_in_it(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert "holds notes.txt but no config.yaml, so it is no run" in refused()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_read_only_file_system(tiny_config):
    line = run_in_namespace(tiny_config, "mount -t tmpfs -o ro none {run}")
    assert line.endswith("Read-only file system; choose a directory that you may write to")


def run_in_namespace(config: Path, mount: str) -> str:
    """Train with a file system mounted over run_dir; the error's line."""
    run = config.parent / "mounted"
    run.mkdir(exist_ok=True)
    train = f"{sys.executable} -m nrt_jax train {config} run_dir={run} method=sft mesh.data=1"
    unshare = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if subprocess.run([*unshare, mount.format(run=run)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin:/sbin"}
    result = subprocess.run(
        [*unshare, f"{mount.format(run=run)} && exec {train}"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment,
    )
    assert result.returncode in (1, 2), result
    (line,) = result.stderr.splitlines()
    return line


# --- a run that is there --------------------------------------------------------------------------


@pytest.fixture
def copied(reference, tmp_path) -> TinyRun:
    """A complete sft run, to be broken."""
    whole = reference(*SFT)
    shutil.copytree(whole.directory, tmp_path / "run")
    return TinyRun(whole.config, tmp_path / "run", SFT)


def truncate_arrays(step: Path) -> None:
    path = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:100])


def test_a_changed_setting(copied):
    outcome = copied.train("optimizer.learning_rate=0.5")
    assert outcome.status == 2
    assert outcome.error == (
        f"{copied.directory}/config.yaml: optimizer.learning_rate is 0.01 in this run and 0.5 now; "
        "set it back to continue the run, or choose another run_dir"
    )


def test_an_unreadable_checkpoint(copied, reference):
    truncate_arrays(copied.checkpoints / "8")
    outcome = copied.trained()
    warning, info = outcome.told
    assert warning.startswith("nrt-jax: WARNING: checkpoint 8 cannot be read, using 6: ")
    assert info == f"nrt-jax: INFO: continuing {copied.directory} from step 6"
    assert_same(copied, reference(*SFT))


def test_no_readable_checkpoint(copied):
    for step in (6, 8):
        truncate_arrays(copied.checkpoints / str(step))
    outcome = copied.train()
    assert outcome.status == 2
    assert "none of the checkpoints [6, 8] can be read" in outcome.error
    assert copied.steps == [6, 8]
    assert len(copied.metrics()) == 12


def test_a_model_of_another_shape(folder):
    run = TinyRun(folder / "tiny.yaml", folder / "run", (*SFT, "train.steps=2"))
    run.trained()
    shutil.rmtree(folder / "model")
    write_model(folder / "model", intermediate_size=64)
    outcome = run.train()
    assert outcome.status == 2
    assert outcome.error == (
        f"{run.checkpoints}/2: params.layers.mlp.down: has shape (2, 48, 32) in the checkpoint, "
        "has shape (2, 64, 32) in this model and optimizer; continue with those of that run, or "
        "choose another run_dir"
    )
    assert run.steps == [2]


def test_a_best_metric_that_is_never_measured(new_run):
    run = new_run(*SFT, "evaluation.every_steps=2")
    outcome = run.train("checkpoint.best_metric=eval/exact")
    assert outcome.status == 2
    assert outcome.error == (
        "checkpoint.best_metric='eval/exact' is no metric of this run's evaluation; use one of "
        "eval/exact_match"
    )
    # The mistake is mended in the same directory.
    run.trained("checkpoint.best_metric=eval/exact_match")


def test_gradients_that_are_not_finite(new_run):
    run = new_run(*SFT, "optimizer.learning_rate=1e30", "optimizer.clip_norm=null")
    overrides = ("optimizer.schedule=constant", "optimizer.warmup_ratio=0", "train.steps=30")
    outcome = run.train(*overrides, "evaluation.examples=0")
    assert outcome.status == 1
    assert "gradients in a row were not finite, so no update was made; lower opt" in outcome.error
    first, *_, before, last = run.metrics()
    # Two updates a step.
    assert first["update/skipped_in_row"] < 2
    assert before["update/skipped_in_row"] < 10 <= last["update/skipped_in_row"] < 12
    assert last["update/skipped"] == before["update/skipped"] + 2
    assert all(np.isfinite(array).all() for array in run.arrays(max(run.steps)).values())


# --- full disks -----------------------------------------------------------------------------------


def test_no_room_for_metrics(new_run, reference):
    whole = reference(*SFT)
    metrics = whole.directory / "metrics.jsonl"
    run = new_run(*SFT, "checkpoint.every_steps=8", "logging.tensorboard=false")
    room = metrics.stat().st_size - 100
    outcome = run.train(file_bytes=room)
    assert outcome.status == 1
    assert outcome.error.startswith(f"{run.directory / metrics.name}: File too large; make room or")
    # Full to the last byte, most likely in the midst of a line.
    assert (run.directory / metrics.name).stat().st_size == room
    run.trained()
    assert run.metrics() == whole.metrics()


@pytest.mark.slow
def test_no_room_for_a_checkpoint(new_run, reference):
    whole = reference(*SFT)
    run = new_run(*SFT)
    assert run.kill_at(lambda: run.saved(4))
    kept = run.steps[-2:]  # the kill may have come before an older one was removed
    whole_files = (run.checkpoints / str(kept[0])).rglob("*")
    largest = max(path.stat().st_size for path in whole_files if path.is_file())
    outcome = run.train(file_bytes=largest // 2)
    assert outcome.status == 1
    last = outcome.err.splitlines()[-1]
    assert last.startswith(f"nrt-jax: error: {run.checkpoints}: a checkpoint could not be written")
    assert set(run.steps) >= set(kept)
    run.trained()
    assert_same(run, whole)
