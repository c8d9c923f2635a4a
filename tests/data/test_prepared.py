"""Prepared data as TFDS and a run read it: refusals, damage, and rows rendered anew."""

import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nrt_jax.cli import main
from nrt_jax.config.data import DataConfig
from nrt_jax.data import merge
from nrt_jax.data.instruction import instructed_prompts
from nrt_jax.data.manifest import read_manifest
from nrt_jax.data.pipeline import load_dataset
from nrt_jax.data.prepare import prepare
from nrt_jax.data.prepared import PreparedExamples, prepared_directory
from nrt_jax.data.show import show_rows
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.data.verify import verify
from nrt_jax.errors import InputError
from nrt_jax.types import TokenizedExample
from tests.data.test_instruction import NUMBERS

ROWS = [{"question": f"{i}+1", "answer": f"={i + 1}"} for i in range(20)]


def make(config: DataConfig, tokenizer: Tokenizer, out: Path) -> DataConfig:
    """Prepare the config's data; the config of a run on it."""
    merge.merge(prepare(config, tokenizer, out, workers=1, share=(0, 1)), 1)
    return config.model_copy(update={"path": out, "source": None, "eval_path": None})


@pytest.fixture
def config(make_config, write_rows) -> DataConfig:
    return make_config(path=write_rows(ROWS), eval_rows=3)


@pytest.fixture
def prepared(config, tokenizer, tmp_path, monkeypatch) -> DataConfig:
    monkeypatch.setattr(merge, "SHARD_BYTES", 1000)
    return make(config, tokenizer, tmp_path / "out")


def train_shards(config: DataConfig) -> list[Path]:
    assert isinstance(config.path, Path)
    return [config.path / shard.path for shard in read_manifest(config.path).splits["train"]]


def test_tfds_reads_it_without_tensorflow(prepared, tokenizer):
    script = """if True:
        import pickle, sys
        import importlib.util
        assert importlib.util.find_spec("tensorflow") is None, "TensorFlow is installed"
        import tensorflow_datasets as tfds
        out = sys.argv[1]
        splits = tfds.data_source("prepared", data_dir=out)
        again = tfds.builder_from_directory(out + "/prepared/1.0.0").as_data_source("eval")
        assert "tensorflow" not in sys.modules and "nrt_jax" not in sys.modules
        rows = [[dict(row) for row in rows] for rows in (splits["train"], splits["eval"], again)]
        sys.stdout.buffer.write(pickle.dumps(rows))
    """
    command = [sys.executable, "-c", script, str(prepared.path)]
    train, held_out, again = pickle.loads(
        subprocess.run(command, check=True, capture_output=True).stdout
    )
    dataset = load_dataset(prepared, tokenizer)
    assert list(map(as_values, dataset.train)) == list(map(as_read, train))
    assert (
        list(map(as_values, dataset.eval))
        == list(map(as_read, held_out))
        == list(map(as_read, again))
    )
    assert (len(train), len(held_out)) == (17, 3)


def as_values(example: TokenizedExample) -> tuple:
    of = example.example
    tokens = example.prompt_tokens.tolist(), example.answer_tokens.tolist()
    return of.index, of.question, of.answer, *tokens


def as_read(row: dict) -> tuple:
    texts = row["question"].decode(), row["answer"].decode()
    tokens = (np.frombuffer(row[name], "<i4") for name in ("prompt_tokens", "answer_tokens"))
    return row["index"], *texts, *(ids.tolist() for ids in tokens)


def test_a_run_takes_the_first_rows_of_the_evaluation(prepared, tokenizer):
    few = load_dataset(prepared.model_copy(update={"eval_rows": 2}), tokenizer)
    every = load_dataset(prepared, tokenizer)
    assert [e.example for e in few.eval] == [e.example for e in every.eval][:2]


def test_another_process_opens_the_shards_itself(prepared, tokenizer):
    train = load_dataset(prepared, tokenizer).train
    copied = pickle.loads(pickle.dumps(train))
    assert copied[5].example == train[5].example
    with pytest.raises(IndexError):
        train[17]


def test_rows_are_shown(prepared, tokenizer):
    shown = list(show_rows(prepared, tokenizer, reasons=True, rows=2, color=False))
    assert len(shown) == 4
    assert "+1]" in shown[2]
    assert shown[2].startswith("row ")


# --- other tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"add_bos": False}, "data.add_bos=True, and this run has data.add_bos=False; "),
        (
            {"max_prompt_tokens": 50},
            "data.max_prompt_tokens=4096, and this run has data.max_prompt_tokens=50; "
            "set data.max_prompt_tokens as it was, or prepare the data again",
        ),
        ({"max_answer_tokens": 9}, "data.max_answer_tokens=4093, and this run has "),
        ({"template": "tulu"}, "data.template=plain (sha256 e3b0c44298fc), and this run has "),
    ],
)
def test_other_settings_of_tokens_are_refused(changes, said, prepared, tokenizer):
    with pytest.raises(InputError) as caught:
        load_dataset(prepared.model_copy(update=changes), tokenizer)
    assert str(caught.value).startswith(f"{prepared.path}: was prepared with ")
    assert said in str(caught.value)


def test_another_tokenizer_is_refused_and_a_copy_is_not(
    made_directory, made, make_config, write_rows, tmp_path
):
    config = make_config(path=write_rows(ROWS), eval_rows=3)
    run = make(config, made("llama3"), tmp_path / "out")
    other = made("first")
    with pytest.raises(InputError) as caught:
        load_dataset(run, other)
    assert f"data.tokenizer={made('llama3').directory} (sha256 " in str(caught.value)
    assert f"this run has data.tokenizer={other.directory} (sha256 " in str(caught.value)

    made("llama3").fast.save_pretrained(tmp_path / "saved")
    load_dataset(run, Tokenizer.load(tmp_path / "saved"))
    renamed = Tokenizer.load(made_directory("llama3"), "<|a|>", "<|b|>")
    with pytest.raises(InputError, match=r"data\.think_start=<\|think_start\|>, and this run has"):
        load_dataset(run.model_copy(update={"think_start": "<|a|>"}), renamed)


# --- where it cannot stand -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"source": "jsonl"},
            "data.source=jsonl: {out} is prepared data; set data.source=prepared",
        ),
        ({"eval_path": Path("e.jsonl")}, "data.eval_path=e.jsonl: {out} has its own evaluation"),
        ({"path": ("{out}", "{out}")}, "{out}: is prepared data, which can only be the one source"),
        ({"source": "prepared", "path": Path("none")}, "none: has no manifest.json of prepared"),
    ],
)
def test_prepared_data_stands_alone(changes, said, prepared, tokenizer):
    if isinstance(changes.get("path"), tuple):
        changes = changes | {"path": (prepared.path,) * 2}
    with pytest.raises(InputError) as caught:
        load_dataset(prepared.model_copy(update=changes), tokenizer)
    assert said.format(out=prepared.path) in str(caught.value)


def test_a_mixture_has_no_prepared_part(prepared, tokenizer):
    part = {"name": "a", "path": prepared.path}
    mixed = DataConfig.model_validate({"mixture": [part, part | {"name": "b"}]})
    with pytest.raises(InputError, match="is prepared data, which can only be the one source"):
        prepared_directory(mixed)
    with pytest.raises(ValueError, match="is no part of a mixture; prepare the mixture"):
        DataConfig.model_validate({"mixture": [part | {"source": "prepared"}]})


def test_an_unfinished_preparation_is_no_data(config, tokenizer, tmp_path):
    out = tmp_path / "out"
    prepare(config, tokenizer, out, workers=1, share=(0, 2))
    run = config.model_copy(update={"path": out, "source": None})
    with pytest.raises(InputError, match=f"{out}: its preparation has not finished; run "):
        load_dataset(run, tokenizer)


# --- damage --------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove, "a shard of prepared data is missing (No such file or directory); restore it"),
        (
            cut,
            "has 131071 bytes, and was written with 131072; restore it or prepare the data again",
        ),
    ],
)
def test_a_shard_that_is_not_whole_is_refused_at_the_start(damage, said, prepared, tokenizer):
    shards = train_shards(prepared)
    assert len(shards) > 2
    damage(shards[1])
    with pytest.raises(InputError) as caught:
        load_dataset(prepared, tokenizer)
    assert str(caught.value).startswith(f"{shards[1]}: {said}")


def test_a_flipped_bit_is_refused_or_harmless(prepared, tokenizer):
    """Every byte that means something has a checksum; the rest is padding."""
    shard = train_shards(prepared)[0]
    expected = list(map(as_values, load_dataset(prepared, tokenizer).train))
    content, refused = shard.read_bytes(), []
    for place in range(0, 4000, 53):
        shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            train = PreparedExamples(read_manifest(prepared.path), "train")
            assert [as_values(train[i]) for i in range(4)] == expected[:4]
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all(re.fullmatch(rf"{shard}: is damaged \(.+; restore .+", line) for line in refused)


def test_verify_names_every_damaged_shard(prepared, capsys):
    shards = train_shards(prepared)
    assert main(["data", "verify", str(prepared.path)]) == 0
    count = len(shards) + 1
    assert (
        capsys.readouterr().out == f"{prepared.path}: all {count} shards are as they were written\n"
    )
    shards[0].unlink()
    cut(shards[1])
    content = bytearray(shards[2].read_bytes())
    content[len(content) // 2] ^= 1
    shards[2].write_bytes(content)
    names = [shard.relative_to(prepared.path) for shard in shards]
    with pytest.raises(InputError) as caught:
        verify(prepared.path)
    assert str(caught.value) == (
        f"{prepared.path}: 3 of {count} shards are damaged: {names[0]} (No such file or "
        f"directory), {names[1]} (131071 bytes of 131072), {names[2]} (another content); restore "
        "it or prepare the data again"
    )


def test_a_damaged_manifest_is_refused(prepared, tokenizer):
    path = prepared.path / "manifest.json"
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(InputError, match=r"manifest\.json: not JSON \("):
        load_dataset(prepared, tokenizer)
    path.write_bytes(content.replace(b"data 1", b"data 7"))
    with pytest.raises(InputError, match=r"its format is 'nrt-jax prepared data 7'"):
        load_dataset(prepared, tokenizer)


# --- rendered anew -------------------------------------------------------------------------------


def test_the_warm_up_asks_prepared_rows_to_think(write_rows, make_config, tokenizer, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(NUMBERS)
    turns = [("system", "1"), ("user", "2"), ("assistant", "3"), ("user", "4"), ("assistant", "=5")]
    talk = {"messages": [{"role": role, "content": content} for role, content in turns]}
    path = write_rows([*ROWS[:2], {"broken": 1}, talk, *ROWS[2:5]])
    chat = {"template": "tokenizer", "template_file": template, "max_bad_share": 0.5}
    config = make_config(path=path, eval_rows=1, **chat)
    run = make(config, tokenizer, tmp_path / "out")
    numbers = [example.example.index for example in load_dataset(run, tokenizer).train]
    assert 3 in numbers
    found, expected = (instructed_prompts(c, tokenizer, "0", numbers) for c in (run, config))
    assert {n: ids.tolist() for n, ids in found.items()} == {
        n: ids.tolist() for n, ids in expected.items()
    }
    assert len(found) == 5
