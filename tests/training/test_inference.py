"""A trained run put to use: prompts answered, and models that others load."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM, AutoTokenizer

from nrt_jax.cli import main
from nrt_jax.models import huggingface
from nrt_jax.models.decoder import Decoder
from tests.training.runs import TinyRun

NRT, SFT = ("method=nrt",), ("method=sft",)
ANSWERED = re.compile(
    r"prompt  (?P<prompt>.*)\n"
    r"trace   (?P<trace>.*)   \[(?P<tokens>\d+) tokens, ended by (?P<end>.*)\]\n"
    r"answer  (?P<answer>.*)\n"
)


@pytest.fixture(scope="module")
def run(reference) -> TinyRun:
    return reference(*NRT)


def weights(run: TinyRun, step: int) -> dict[str, np.ndarray]:
    """The weights of a checkpoint as Orbax stores them, by path."""
    arrays = run.arrays(step)
    return {
        name.removeprefix("['params']"): array
        for name, array in arrays.items()
        if name.startswith("['params']")
    }


def exported(out: Path) -> dict[str, np.ndarray]:
    params = huggingface.read_weights(out, huggingface.read_architecture(out))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


# --- generate -------------------------------------------------------------------------------------


def generate(path: Path, capsys, *words: str) -> list[re.Match[str]]:
    assert main(["generate", str(path), *words]) == 0
    said = capsys.readouterr().out
    found = list(ANSWERED.finditer(said))
    assert "".join(match[0] for match in found) == said
    return found


def test_prints_trace_and_answer_of_every_prompt(run, capsys):
    first, second = generate(run.directory, capsys, "--prompt", "1+2+3", "--prompt", "4+0+1")
    assert (first["prompt"], second["prompt"]) == ("1+2+3", "4+0+1")
    for answered in (first, second):
        assert 0 <= int(answered["tokens"]) <= 4
        assert answered["end"]


def test_a_run_stands_for_its_newest_checkpoint(run, capsys):
    words = ("--prompt", "1+2+3", "--temperature", "1", "--seed", "3")
    of_run, of_step = (
        [match[0] for match in generate(path, capsys, *words)]
        for path in (run.directory, run.checkpoints / "8")
    )
    assert of_run == of_step


def test_the_answer_is_that_of_the_evaluation(run, capsys):
    """The last evaluation wrote what greedy traces give for the last weights."""
    sample = [row for row in run.lines("samples.jsonl") if row["step"] == 8][0]
    (answered,) = generate(run.directory, capsys, "--prompt", sample["question"])
    assert answered["trace"] == sample["trace"]
    assert answered["answer"] == sample["answer"]


def test_a_seed_decides_the_samples(run, capsys):
    def sampled(seed: int) -> list[str]:
        words = [word for digit in "01234" for word in ("--prompt", f"1+2+{digit}")]
        words += ["--temperature", "5", "--seed", str(seed)]
        return [match["trace"] for match in generate(run.directory, capsys, *words)]

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_sft_answers_without_a_trace(reference, capsys):
    assert main(["generate", str(reference(*SFT).directory), "--prompt", "1+2+3"]) == 0
    assert re.fullmatch(r"prompt  1\+2\+3\nanswer  .*\n", capsys.readouterr().out)


# --- export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [6, 8])
def test_export_reloads_bit_for_bit(run, step, tmp_path, capsys):
    out = tmp_path / "model"
    assert main(["export", str(run.checkpoints / str(step)), str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    read, saved = exported(out), weights(run, step)
    assert read.keys() == saved.keys()
    for name, array in saved.items():
        assert read[name].dtype == array.dtype == np.float32
        assert read[name].tobytes() == array.tobytes(), name


def test_export_in_bfloat16_rounds(run, tmp_path):
    out = tmp_path / "model"
    assert main(["export", str(run.directory), str(out), "--dtype", "bfloat16"]) == 0
    for name, array in weights(run, 8).items():
        rounded = np.asarray(jnp.asarray(array).astype(jnp.bfloat16).astype(jnp.float32))
        np.testing.assert_array_equal(exported(out)[name].astype(np.float32), rounded)


def test_copy_row(run, tmp_path):
    out = tmp_path / "model"
    pairs = [r"<|think_start|>=\n", "<|think_end|>=<|eos|>"]
    words = [word for pair in pairs for word in ("--copy-row", pair)]
    assert main(["export", str(run.directory), str(out), *words]) == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    start, end, eos = tokenizer.convert_tokens_to_ids(
        ["<|think_start|>", "<|think_end|>", "<|eos|>"]
    )
    (newline,) = tokenizer.encode("\n", add_special_tokens=False)
    expected = weights(run, 8)
    embedding_VD, head_DV = expected["['embedding']"].copy(), expected["['head']"].copy()
    embedding_VD[[start, end]] = embedding_VD[[newline, eos]]
    head_DV[:, [start, end]] = head_DV[:, [newline, eos]]
    read = exported(out)
    np.testing.assert_array_equal(read["['embedding']"], embedding_VD)
    np.testing.assert_array_equal(read["['head']"], head_DV)
    others = expected.keys() - {"['embedding']", "['head']"}
    assert all(np.array_equal(read[name], expected[name]) for name in others)


def test_transformers_computes_the_same(run, tmp_path):
    out = tmp_path / "model"
    assert main(["export", str(run.directory), str(out)]) == 0
    tokens = AutoTokenizer.from_pretrained(out).encode("1+2+3\n=4")
    tokens_BT = np.array([tokens, tokens[::-1]])
    with torch.no_grad():
        theirs_BTV = AutoModelForCausalLM.from_pretrained(out)(torch.tensor(tokens_BT)).logits
    architecture = huggingface.read_architecture(out)
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(architecture, nnx.Rngs(0))))
    params = huggingface.read_weights(out, architecture)
    ours_BTV = nnx.merge(graph, nnx.State(params))(jnp.asarray(tokens_BT))
    np.testing.assert_allclose(ours_BTV, theirs_BTV.numpy(), rtol=0, atol=1e-4)
