"""What a run reads by path: a change of it is seen, a copy of it is none."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nrt_jax import distributed
from nrt_jax.arguments import INPUTS
from nrt_jax.checkpoints.abstract_model import load_tokenizer
from nrt_jax.checkpoints.inputs import INPUT_NAMES, RunInputs, read_inputs
from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.errors import InputError
from nrt_jax.types import Example, TokenizedExample
from tests.training.runs import write_model

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
RUN = Path("run")
NO_TOKENS = np.zeros(0, np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("written") / "model")


@pytest.fixture
def folder(tmp_path, model) -> Path:
    """Every input that a config can name."""
    folder = tmp_path / "inputs"
    for name in ("model", "tokenizer"):
        shutil.copytree(model, folder / name)
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text('{"question": "1+2", "answer": "=3"}\n')
    (folder / "chat.jinja").write_text(TEMPLATE)
    return folder


def held_out(*questions: str) -> list[TokenizedExample]:
    return [
        TokenizedExample(Example(i, q, "=3"), NO_TOKENS, NO_TOKENS) for i, q in enumerate(questions)
    ]


@pytest.fixture
def read(folder) -> Callable[..., RunInputs]:
    def read(
        where: Path = folder, held_out_question: str = "1+1", data: tuple[str, ...] = ()
    ) -> RunInputs:
        config = load_config(
            RunConfig,
            [],
            [
                f"model.path={where / 'model'}",
                f"data.tokenizer={where / 'tokenizer'}",
                "data.source=jsonl",
                f"data.path={where / 'train.jsonl'}",
                f"data.eval_path={where / 'eval.jsonl'}",
                "data.template=tokenizer",
                f"data.template_file={where / 'chat.jinja'}",
                *data,
            ],
        )
        rows = held_out(held_out_question)
        return read_inputs(config, load_tokenizer(config), rows)

    return read


def append(text: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(path.read_text() + text)

    return change


def change_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


CHANGES = {
    "train.jsonl": ("data", append(" ")),
    "eval.jsonl": ("eval_data", append(" ")),
    "tokenizer/tokenizer.json": ("tokenizer", append("\n")),
    "tokenizer/tokenizer_config.json": ("tokenizer", append("\n")),
    "chat.jinja": ("template", append("!")),
    "model/config.json": ("model", append("\n")),
    "model/generation_config.json": ("model", append("\n")),
    "model/model.safetensors": ("model", change_last_byte),
}


def test_the_command_line_names_the_inputs():
    assert INPUTS == INPUT_NAMES


@pytest.mark.parametrize("file", CHANGES)
def test_a_changed_file_is_refused_by_name_and_can_be_allowed(file, folder, read):
    name, change = CHANGES[file]
    saved = RunInputs.from_json(json.loads(json.dumps(read().to_json())))
    change(folder / file)
    now = read()
    with pytest.raises(InputError) as error:
        now.continued(saved, set(INPUT_NAMES) - {name}, run=RUN, step=3)
    place = file.partition("/")
    of_directory = f"{name}={folder / place[0]} has changed"
    said = f"{of_directory} ({place[2]})" if place[2] else of_directory
    assert str(error.value) == (
        f"run: the run was trained on other inputs: {said}; restore them, or continue on purpose "
        f"with --allow-changed {name}, or choose another run_dir"
    )
    continued, changed = now.continued(saved, [name], run=RUN, step=3)
    assert changed == {name}
    assert [(c["step"], c["input"]) for c in continued.allowed_changes] == [(3, name)]
    # From here on this is what the run reads.
    assert now.continued(continued, [], run=RUN, step=4)[0].allowed_changes == (
        continued.allowed_changes
    )


def test_a_copy_elsewhere_is_no_change(folder, read, tmp_path):
    saved = read()
    # Another place, and another time of modification.
    shutil.copytree(folder, tmp_path / "moved", copy_function=shutil.copyfile)
    os.utime(tmp_path / "moved" / "model" / "model.safetensors", (1, 1))
    moved, changed = read(tmp_path / "moved").continued(saved, [], run=RUN, step=3)
    assert (changed, moved.allowed_changes) == (frozenset(), ())
    assert moved.inputs["data"].path == str(tmp_path / "moved" / "train.jsonl")


def more_data(where: Path) -> dict[str, str]:
    """Several files of training data, named in every way."""
    (where / "shards").mkdir(exist_ok=True)
    for name in ("train.jsonl", "shards/a.jsonl", "shards/b.jsonl"):
        (where / name).write_text(f'{{"question": "{name}", "answer": "=3"}}\n')
    listed = [where / "train.jsonl", where / "shards" / "b.jsonl"]
    parts = [f"{{name: s, path: {where}/shards}}", f"{{name: t, path: {where}/train.jsonl}}"]
    return {
        "list": f"data.path=[{', '.join(map(str, listed))}]",
        "glob": f"data.path={where}/shards/*.jsonl",
        "folder": f"data.path={where}/shards",
        "mixture": f"data.mixture=[{', '.join(parts)}]",
    }


@pytest.mark.parametrize(
    ("way", "changed"),
    [
        ("list", "shards/b.jsonl"),
        ("glob", "a.jsonl"),
        ("folder", "b.jsonl"),
        ("mixture", "s/b.jsonl"),
        ("mixture", "t"),
    ],
)
def test_a_change_of_any_file_is_seen(way, changed, folder, read, tmp_path):
    def given(where: Path) -> tuple[str, ...]:
        rest = ("data.path=null", "data.source=null") if way == "mixture" else ()
        return (*rest, more_data(where)[way])

    saved = read(data=given(folder))
    shutil.copytree(folder, tmp_path / "moved")
    moved = read(tmp_path / "moved", data=given(tmp_path / "moved"))
    assert moved.continued(saved, [], run=RUN, step=3)[1] == frozenset()
    data = given(folder)
    file = {"s/b.jsonl": "shards/b.jsonl", "t": "train.jsonl"}.get(changed, f"shards/{changed}")
    append(" ")(folder / file.replace("shards/shards", "shards"))
    with pytest.raises(InputError, match=rf"data=\S+.* has changed \({changed}\); restore"):
        read(data=data).continued(saved, [], run=RUN, step=3)


@pytest.mark.parametrize(
    ("setting", "part"),
    [("leave_out", "data.leave_out"), ("contamination", r"data.contamination\[0\]")],
)
def test_a_change_of_what_leaves_rows_out_is_seen(setting, part, folder, read):
    data = (f"data.{setting}={folder / 'eval.jsonl'}", "data.eval_path=null")
    saved = read(data=data)
    assert read(data=data).continued(saved, [], run=RUN, step=3)[1] == frozenset()
    append(" ")(folder / "eval.jsonl")
    with pytest.raises(InputError, match=rf"data=\S+train.jsonl has changed \({part}\); restore"):
        read(data=data).continued(saved, [], run=RUN, step=3)


def test_every_change_is_named_at_once(folder, read):
    saved = read()
    for file, (_, change) in CHANGES.items():
        change(folder / file)
    with pytest.raises(InputError, match="--allow-changed data,eval_data,tokenizer,template,model"):
        read().continued(saved, ["data"], run=RUN, step=3)


def test_held_out_rows_follow_from_the_data(folder, read, caplog):
    saved = read()
    other_rows = read(held_out_question="2+2")
    with pytest.raises(InputError, match=r"eval_data=\S+ has changed \(held-out rows\); evaluati"):
        other_rows.continued(saved, [], run=RUN, step=3)
    append(" ")(folder / "train.jsonl")
    now = read(held_out_question="2+2")
    with pytest.raises(InputError, match=r"--allow-changed data, or choose"):
        now.continued(saved, [], run=RUN, step=3)
    assert now.continued(saved, ["data"], run=RUN, step=3)[1] == {"data", "eval_data"}
    assert "evaluations before and after cannot be compared" in caplog.text


def test_an_input_that_is_new_or_gone(read):
    saved = read()
    without = RunInputs({name: saved.inputs[name] for name in saved.inputs if name != "template"})
    with pytest.raises(InputError, match=r"template=\S+/chat\.jinja is new; restore"):
        saved.continued(without, [], run=RUN, step=3)
    with pytest.raises(InputError, match=r"template=\S+/chat\.jinja is left out; restore"):
        without.continued(saved, [], run=RUN, step=3)


# --- weights -------------------------------------------------------------------------------------


def test_other_inputs_of_another_process_are_named(folder, read, monkeypatch):
    here = read()
    append(" ")(folder / "train.jsonl")
    there, told = read(), []
    monkeypatch.setattr(distributed, "check_same", lambda what, parts, _: told.append(parts))
    here.check_alike()
    there.check_alike()
    assert [name for name in told[0] if told[0][name] != told[1].get(name)] == ["data"]
    assert "model (config.json)" in told[0]


def test_weights_that_are_gone_are_no_change(folder, read):
    """A run needs those of its checkpoint alone; one that reads them again reports it then."""
    saved = read()
    (folder / "model" / "model.safetensors").unlink()
    assert not read().continued(saved, [], run=RUN, step=3)[1]


def test_weights_that_are_read_again_count_by_their_values(folder, read):
    saved = read().with_weights({"embedding": 1})
    # Split into other files: the same weights.
    file = folder / "model" / "model.safetensors"
    file.rename(file.with_name("model-00001-of-00001.safetensors"))
    assert not read().with_weights({"embedding": 1}).continued(saved, [], run=RUN, step=3)[1]
    with pytest.raises(InputError, match=r"model=\S+/model has changed \(weights as read\)"):
        read().with_weights({"embedding": 2}).continued(saved, [], run=RUN, step=3)


@pytest.mark.parametrize("place", [0, 512_000, -1])
def test_a_large_file_is_read_in_samples(place, folder, read, monkeypatch):
    monkeypatch.setattr("nrt_jax.checkpoints.inputs._SAMPLE_BYTES", 2**13)
    file = folder / "model" / "model.safetensors"
    content = bytearray(2**20)
    file.write_bytes(content)
    saved = read()
    content[place] = 1
    file.write_bytes(content)
    assert read() != saved
    file.write_bytes(bytes(2**20 + 1))
    assert read() != saved


def test_a_file_that_cannot_be_read(folder, read, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(folder / "train.jsonl"))

    monkeypatch.setattr("hashlib.file_digest", refuse)
    with pytest.raises(InputError, match=r"/train\.jsonl: cannot be read: Permission denied"):
        read()
