"""Inputs that once broke something, through the command line: read, or refused in one line."""

import re
from pathlib import Path

import pytest

from nrt_jax.cli import main
from tests.training.runs import write_config_for_any_text

REFUSED = {
    "arr.json": "is a JSON array, not one object per line; convert it: jq -c '.[]'",
    "csv.csv": "is no JSON Lines but looks like CSV (its first line is 'question,answer')",
    "utf16.jsonl": "is text in UTF-16; save it as UTF-8",
    "dup.parquet": "has 2 columns named 'answer', and which one is meant is not known",
    "dupkey.jsonl": "the key 'question' occurs twice in one object; keep one",
    "msgparts.jsonl": "'messages[0].content' is [{'type': 'text', 'text': 'hi'}]; write it as a",
    "tool.jsonl": "'messages[1].content' is null; fill it in or drop the row",
    "sharegpt.jsonl": "field 'question' is missing (it has 'conversations'); add it",
}
READ = {
    "large.parquet": ["2", "Berlin"],
    "list.parquet": ["2", "Berlin"],
    "ns.parquet": ["2", "Berlin"],
    "tz.parquet": ["2", "Berlin"],
    "num.jsonl": ["42"],
    "gz.jsonl.gz": ["2", "Berlin"],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config_for_any_text(tmp_path_factory.mktemp("faults"))


def words(config: Path, path: Path) -> list[str]:
    source = "parquet" if path.suffix == ".parquet" else "jsonl"
    tokenizer = config.parent / "tokenizer"
    return [
        str(config),
        *(f"data.source={source}", f"data.path={path}", f"data.tokenizer={tokenizer}"),
        *("data.template=tulu", "data.max_prompt_tokens=64", "data.eval_rows=0"),
        *("data.max_answer_tokens=16", "rollout.max_response_tokens=24"),
    ]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_training(name, config, shared_faults, tmp_path, capsys):
    path = shared_faults / name
    run = f"run_dir={tmp_path / 'run'}"
    sizes = (f"train.{name}_prompts=8" for name in ("batch", "mini_batch", "micro_batch"))
    assert main(["train", *words(config, path), *sizes, run, "method=sft"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"nrt-jax: error: {path}: ")
    assert REFUSED[name] in line
    assert captured.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [*REFUSED, *READ])
def test_shown(name, config, shared_faults, capsys):
    status = main(["data", "show", *words(config, shared_faults / name), "--rows", "9"])
    captured = capsys.readouterr()
    if name in READ:
        assert re.findall(r"  y\* .*\[(.*)\]", captured.out) == READ[name]
        assert "left out" not in captured.out
    else:
        # A bad file ends the command; a bad row is shown as one that training leaves out.
        assert status == (0 if "left out" in captured.out else 2)
        assert REFUSED[name] in captured.out + captured.err
