"""The command line: help without jax, one line for an error, configs shown and merged."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import nrt_jax
from nrt_jax import cli, verbs
from nrt_jax.config.load import load_config
from nrt_jax.config.presets import presets
from nrt_jax.config.run import RunConfig
from nrt_jax.errors import InputError, RunFailed
from nrt_jax.stop import StopRequest

REPOSITORY = Path(__file__).resolve().parent.parent
VERBS = (
    "train",
    "diagnose",
    "generate",
    "serve",
    "export",
    "report",
    "config",
    "config show",
    "config schema",
)


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=REPOSITORY
    )


@pytest.fixture
def config(tmp_path) -> Path:
    """A config whose model and data are not there."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {path: no/model}\n"
        "data: {source: jsonl, path: no/rows.jsonl, tokenizer: no/tokenizer}\n"
        "optimizer: {learning_rate: 3e-4}\n"
    )
    return path


def fails(capsys, *words: str) -> str:
    """The one line of an error that ends with status 2."""
    try:
        status = cli.main(list(words))
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    (line,) = captured.err.splitlines()
    assert line.startswith("nrt-jax: error: ")
    return line.removeprefix("nrt-jax: error: ")


# --- help -----------------------------------------------------------------------------------------

SAYS_WITHOUT_JAX = """
import contextlib, io, sys
from nrt_jax.cli import main
for words in [["--help"], ["--version"], *([*v.split(), "--help"] for v in sys.argv[1:])]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(words)
    print(len(out.getvalue()) > 10, *words)
print(sorted({m.split(".")[0] for m in sys.modules} & {"jax", "numpy", "pydantic", "yaml"}))
"""


def test_help_and_version_import_no_jax():
    lines = run_python(SAYS_WITHOUT_JAX, *VERBS).stdout.splitlines()
    assert lines[-1] == "[]"
    assert len(lines) == len(VERBS) + 3
    assert all(line.startswith("True ") for line in lines[:-1])


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"nrt-jax {nrt_jax.__version__}\n"


def test_runs_as_a_module_and_as_a_script():
    script = Path(sys.executable).with_name("nrt-jax")
    for command in ([sys.executable, "-m", "nrt_jax"], [str(script)]):
        if not Path(command[0]).exists():
            pytest.skip(f"{command[0]} is not installed")
        result = subprocess.run([*command, "--version"], capture_output=True, text=True)
        assert result.stdout == f"nrt-jax {nrt_jax.__version__}\n"


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "the following arguments are required: VERB; see nrt-jax --help"),
        (("trian", "x"), "argument VERB: invalid choice: 'trian'"),
        (("train",), "the following arguments are required: CONFIG; see nrt-jax train --help"),
        (("train", "train.steps=1"), "train.steps=1: no config file; name one before"),
        (("train", "--steps", "3"), "unrecognized arguments: --steps"),
        (("train", "none.yaml"), "none.yaml: no such config file"),
        (("config", "show", "none.yaml"), "none.yaml: no such config file"),
        (("generate", "run"), "the following arguments are required: --prompt"),
        (("generate", "run", "--prompt", "1", "--temperature", "-1"), "-1 is no temperature"),
        (("generate", "run", "--prompt", "1", "--temperature", "nan"), "nan is no temperature"),
        (("generate", "run", "--prompt", "1", "--temperature", "x"), "argument --temperature"),
        (("generate", "run", "--prompt", "1", "--seed", "-1"), "-1 is no seed"),
        (("export", "run", "out", "--dtype", "int8"), "int8 is no dtype of weights; give bf16"),
        (("data", "show", "c.yaml", "--rows", "0"), "0 is no number of rows; give 1 or more"),
        (("data", "show", "c.yaml", "--rows", "9" * 30), "is no number of rows; give 1 or more"),
        (("export", "gs://b/run", "out"), "argument MODEL: gs://b/run: must be a path of this"),
        (("report", "runs", "--out", "s3://b/x"), "argument --out: s3://b/x: must be a path of"),
        (("report", "runs"), "the following arguments are required: --out"),
        (("report", "runs", "--out", "x", "more"), "unrecognized arguments: more"),
        (("config", "schema", "x=1"), "unrecognized arguments: x=1"),
        (("train", "c.yaml", "--train.steps=3"), "an override has no dashes: train.steps=3"),
        (("train", "c.yaml", "train.steps", "3"), "c.yaml: no such config file"),
        (
            ("generate", "a", "b", "--prompt", "1"),
            "one MODEL is required, and 2 are named: a b; an override",
        ),
        (
            ("generate", "x.y=1", "--prompt", "1"),
            "one MODEL is required, and 0 are named: x.y=1; an",
        ),
        (("train", "run_dir=\udcff"), r"the argument 'run_dir=\udcff' is not UTF-8 text"),
        (("train", "a\nb", "--x"), "unrecognized arguments: --x"),
    ],
)
def test_words(words, said, capsys):
    assert said in fails(capsys, *words)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stepps=3", "override train.stepps=3: unknown key; did you mean 'steps'?"),
        ("trian.steps=3", "override trian: unknown key; did you mean 'train'?"),
        ("train.steps=many", "override train.steps=many: must be a valid integer"),
        ("train.steps=", "override train.steps=null: must be a valid integer"),
        ("optimizer.learning_rate=-1", "override optimizer.learning_rate=-1: must be greater"),
    ],
)
def test_overrides(override, said, config, capsys):
    assert fails(capsys, "config", "show", str(config), override).startswith(said)


@pytest.mark.parametrize(
    "words",
    [
        ("data", "show", "{config}", "--rows", "1", "{override}"),
        ("data", "show", "{config}", "{override}", "--rows", "1", "--color", "never"),
        ("data", "show", "{override}", "--rows=1", "{config}"),
        ("data", "show", "--rows", "1", "{config}", "--color", "never", "{override}"),
        ("data", "show", "--rows", "1", "{config}", "--", "{override}"),
    ],
)
def test_overrides_stand_anywhere_in_data_show(words, config, capsys):
    override = "data.tokenizer=elsewhere"
    line = fails(capsys, *(word.format(config=config, override=override) for word in words))
    assert "elsewhere: no such tokenizer directory" in line


@pytest.mark.parametrize("verb", ["generate", "serve"])
@pytest.mark.parametrize(
    "words",
    [
        ("MODEL", "O"),
        ("O", "MODEL"),
        ("MODEL", "--prompt", "a=b", "O"),
        ("O", "--prompt", "a=b", "MODEL"),
        ("--prompt", "a=b", "MODEL", "O", "P"),
        ("O", "--prompt", "a=b", "P", "MODEL"),
    ],
)
def test_overrides_stand_anywhere_around_a_model(verb, words, monkeypatch):
    seen = []
    monkeypatch.setattr(verbs, verb, seen.append)
    if verb == "serve":
        words = [word for word in words if word not in ("--prompt", "a=b")]
    elif "--prompt" not in words:
        words = [*words, "--prompt", "a=b"]
    names = {"O": "data.template=[x]", "P": "rollout.slots=3", "MODEL": "runs/x"}
    assert cli.main([verb, *(names.get(word, word) for word in words)]) == 0
    (args,) = seen
    assert args.model == Path("runs/x")
    assert args.overrides == [names[word] for word in words if word in ("O", "P")]


def test_a_model_with_an_equals_sign_in_its_name(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(verbs, "serve", seen.append)
    model = tmp_path / "lr=1"
    model.mkdir()
    assert cli.main(["serve", "port=0", str(model)]) == 0
    assert (seen[0].model, seen[0].overrides) == (model, ["port=0"])


def test_a_long_override_is_no_name_of_a_file(config, capsys):
    assert cli.main(["config", "show", str(config), f"data.think_start={'x' * 5000}"]) == 0
    assert "x" * 5000 in capsys.readouterr().out


# --- config ---------------------------------------------------------------------------------------


def test_shows_a_config_that_reads_back(config, tmp_path, capsys):
    words = [str(config), "train.steps=7", "checkpoint.best_metric=eval/exact_match"]
    assert cli.main(["config", "show", *words]) == 0
    shown = tmp_path / "elsewhere" / "shown.yaml"
    shown.parent.mkdir()
    shown.write_text(capsys.readouterr().out)
    read = load_config(RunConfig, [shown])
    assert read == load_config(RunConfig, [config], words[1:])
    assert (read.train.steps, read.optimizer.learning_rate) == (7, 3e-4)
    assert read.data.tokenizer == tmp_path / "no" / "tokenizer"


def test_presets_merge_from_left_to_right(config, tmp_path, capsys):
    preset = tmp_path / "lr=1.yaml"
    preset.write_text("optimizer: {learning_rate: 1.0}\ntrain: {steps: 5}\n")
    words = [str(config), "train.steps=6", str(preset)]
    assert cli.main(["config", "show", *words]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["optimizer"]["learning_rate"] == 1.0
    # Overrides come last, wherever they stand; the preset's name is a file in spite of its sign.
    assert shown["train"]["steps"] == 6


@pytest.mark.parametrize("preset", presets().values(), ids=str)
def test_every_config_of_the_project_is_shown(preset, config, capsys):
    whole = "model" in yaml.safe_load(preset.read_text()) and preset.parent.name != "hardware"
    whole |= preset.parent.name == "quickstart"
    files = [str(preset)] if whole and preset.name != "task.yaml" else [str(config), str(preset)]
    # What a config leaves to the command line.
    left = ["data.tokenizer=no", "data.path=no"]
    left += ["model.path=no"] if preset.stem == "smollm2_gsm8k" else []
    status = cli.main(["config", "show", *files, *left])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert yaml.safe_load(captured.out)["method"] in ("nrt", "sft")


def test_schema(capsys):
    assert cli.main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(RunConfig.model_fields) < set(schema["properties"])


# --- how errors end -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (InputError("field: value:\n remedy"), 2, "field: value: remedy"),
        (RunFailed("it failed"), 1, "it failed"),
        (
            OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl"),
            1,
            "run/metrics.jsonl: No space left on device; make room or allow access there, then run "
            "the same command again: a run continues from its newest checkpoint",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "run"),
            1,
            "run: Permission denied; make room or allow access there, then run the same command "
            "again: a run continues from its newest checkpoint",
        ),
        *(
            (
                OSError(number, os.strerror(number), "x"),
                1,
                f"x: {os.strerror(number)}; check the path",
            )
            for number in (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_end_in_one_line(error, status, said, config, monkeypatch, capsys):
    def verb(_):
        raise error

    monkeypatch.setattr(verbs, "config_show", verb)
    assert cli.main(["config", "show", str(config)]) == status
    assert capsys.readouterr().err == f"nrt-jax: error: {said}\n"


def test_mistakes_of_ours_keep_their_traceback(config, monkeypatch):
    def verb(_):
        raise AssertionError("ours")

    monkeypatch.setattr(verbs, "config_show", verb)
    with pytest.raises(AssertionError, match="ours"):
        cli.main(["config", "show", str(config)])


def test_nobody_reads_the_output(config):
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "nrt_jax", "config", "show", str(config)],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    os.close(writer)
    assert result.returncode == 1
    assert result.stderr == "nrt-jax: error: standard output was closed before the end\n"


def test_a_full_disk_behind_the_output(config):
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "nrt_jax", "config", "show", str(config)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("nrt-jax: error: a file or the output: No space left on device; make")


def test_a_home_is_expanded(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fails(capsys, "export", "~/run", "out").startswith(f"{tmp_path}/run: no such directory")


# --- SIGTERM --------------------------------------------------------------------------------------


def test_sigterm_ends_at_once_while_there_is_nothing_to_save():
    with pytest.raises(SystemExit) as stop, StopRequest():
        signal.raise_signal(signal.SIGTERM)
    assert stop.value.code == 0
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_sigterm_ends_with_the_status_that_a_launcher_asks_for():
    with pytest.raises(SystemExit) as stop, StopRequest(75):
        signal.raise_signal(signal.SIGTERM)
    assert stop.value.code == 75
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize(("complete", "status"), [(True, 0), (False, 75)])
def test_a_launcher_can_tell_a_stopped_run_from_a_complete_one(monkeypatch, complete, status):
    monkeypatch.setattr("nrt_jax.training.loop.train", lambda *_, **__: complete)
    assert cli.main(["train", "quickstart/nrt", "--stopped-status", "75"]) == status
    assert cli.main(["train", "quickstart/nrt"]) == 0


def test_sigterm_waits_for_the_step():
    with StopRequest() as stop:
        stop.wait_for_the_step()
        assert not stop.requested
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert stop.requested
    # What remains to be done is done: another signal does not cut it off.
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_without_sigterm_the_handler_is_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        pass
    assert signal.getsignal(signal.SIGTERM) == before
