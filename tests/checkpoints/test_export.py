"""`nrt-jax import` and `nrt-jax export`, and think tokens that a checkpoint did not have."""

import json
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.numpy import load_file

from nrt_jax.checkpoints.hf_config import read_architecture
from nrt_jax.checkpoints.import_format import read_params
from nrt_jax.checkpoints.open import open_model
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.models.decoder import abstract_decoder
from nrt_jax.models.sharding import abstract_params
from tests.models.tiny import mesh, read
from tests.training.runs import Process, TinyRun

NEW_NAMES = ("data.think_start=<think>", "data.think_end=</think>")


@pytest.fixture(scope="module")
def imported(tmp_path_factory, tiny_config) -> Path:
    """The tiny model, imported by the command."""
    from nrt_jax.cli import main

    out = tmp_path_factory.mktemp("imported") / "model"
    assert main(["import", str(tiny_config.parent / "model"), str(out)]) == 0
    return out


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_import_says_what_it_wrote(tiny_config, tmp_path, words):
    source, out = tiny_config.parent / "model", tmp_path / "out"
    status, printed, errors = words("import", source, out, "--mesh", "fsdp=4,tensor=1,data=2")
    assert (status, errors) == (0, "")
    assert printed.startswith(f"wrote {out}: ")
    assert printed.endswith(" GB\n")
    assert json.loads((out / "import.json").read_text())["source"] == str(source)
    again = words("import", source, out)
    assert again == (
        2,
        "",
        f"nrt-jax: error: {out}: exists and is not empty; give a new folder\n",
    )


@pytest.mark.parametrize(
    ("mesh_text", "said"),
    [
        ("model=4", "'model=4' must be one of data, fsdp, tensor"),
        ("fsdp", "'fsdp' must be one of"),
        ("fsdp=0", "'fsdp=0' must be"),
        ("fsdp=3", "mesh: data=1, fsdp=3, tensor=1, context=1 does not cover 8"),
        ("tensor=-1", "tensor=8 does not divide"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(mesh_text, said, tiny_config, tmp_path, words):
    out = tmp_path / "out"
    status, printed, error = words("import", tiny_config.parent / "model", out, "--mesh", mesh_text)
    assert (status, printed) == (2, "")
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_from_the_import_is_the_run_from_its_source(reference, imported, new_run):
    """Metrics and weights, to the bit."""
    run = new_run("method=sft", f"model.path={imported}", f"data.tokenizer={imported}")
    run.trained()
    source = reference("method=sft")
    assert run.metrics() == source.metrics()
    mine, theirs = run.arrays(max(run.steps)), source.arrays(max(source.steps))
    assert all(mine[name].tobytes() == theirs[name].tobytes() for name in theirs)


def test_there_and_back_is_exact(tiny_config, imported, tmp_path, words):
    out = tmp_path / "back"
    assert words("export", imported, out) == (0, f"wrote {out}\n", "")
    before, after = tensors(tiny_config.parent / "model"), tensors(out)
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert before[name].tobytes() == after[name].tobytes(), name
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (tiny_config.parent / "model" / name).read_bytes()
    card = (out / "README.md").read_text()
    assert 'base_model: "model"' in card
    assert "nothing was trained" in card


def test_a_tokenizer_that_no_run_would_take_is_not_imported(tiny_config, tmp_path, words):
    source = shutil.copytree(tiny_config.parent / "model", tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    status, _, error = words("import", source, tmp_path / "out")
    assert status == 2
    assert "tokenizer.json: not a tokenizer" in error
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(b"")
    assert words("import", source, tmp_path / "out")[0] == 0


def test_sigterm_leaves_nothing_half_written(tiny_config, tmp_path):
    source = tiny_config.parent / "model"
    log = Path(tempfile.mkdtemp(dir=tmp_path))
    process = Process(["import", str(source), str(tmp_path / "out")], log)
    assert process.wait_until(lambda: (tmp_path / ".out.partial").exists())
    process.signal(signal.SIGTERM)
    status = process.end().status
    # The rename may have come first.
    assert (status, (tmp_path / "out").exists()) in ((128 + signal.SIGTERM, False), (0, True))
    assert not (tmp_path / ".out.partial").exists()


def test_rows_of_an_import_are_not_copied(imported, tmp_path, words):
    status, _, error = words("export", imported, tmp_path / "out", "--copy-row", "a=b")
    assert status == 2
    assert "--copy-row a=b: only for runs" in error


# --- think tokens that the vocabulary lacks ------------------------------------------------------


@pytest.fixture(scope="module")
def run_with_new_tokens(tmp_path_factory, tiny_config) -> TinyRun:
    folder = tmp_path_factory.mktemp("new_tokens")
    words = ("method=nrt", "train.steps=2", "model.new_rows_from=<|eos|>", *NEW_NAMES)
    run = TinyRun(tiny_config, folder / "run", words)
    outcome = run.trained()
    assert "<think> (id 25) starts as a copy of <|eos|>" in outcome.err
    assert "</think> (id 26) starts as a copy of <|eos|>" in outcome.err
    return run


def initial_params(run: TinyRun, *overrides: str) -> dict:
    from nrt_jax.checkpoints.abstract_model import abstract_model, init_params, load_tokenizer
    from nrt_jax.config.load import load_config
    from nrt_jax.config.run import RunConfig

    config = load_config(
        RunConfig, [run.config], [*NEW_NAMES, "mesh.fsdp=8", "mesh.data=1", *overrides]
    )
    tokenizer = load_tokenizer(config)
    return init_params(config, abstract_model(config, tokenizer), tokenizer)


def test_new_rows_start_as_copies(run_with_new_tokens):
    source = run_with_new_tokens.config.parent / "model"
    before = read(source, read_architecture(source))
    for overrides, row in (((), 2), (("model.new_rows_from=+",), 16)):
        params = initial_params(run_with_new_tokens, *overrides)
        embedding, head = np.asarray(params["embedding"]), np.asarray(params["head"])
        assert (embedding.shape[0], head.shape[1]) == (128, 128)
        for new in (25, 26):
            np.testing.assert_array_equal(embedding[new], before["embedding"][row])
            np.testing.assert_array_equal(head[:, new], before["head"][:, row])
        np.testing.assert_array_equal(embedding[:25], before["embedding"])
        np.testing.assert_array_equal(head[:, :25], before["head"])
        assert not embedding[27:].any()
        assert not head[:, 27:].any()


def test_an_unknown_row_is_refused(run_with_new_tokens):
    from nrt_jax.errors import InputError

    with pytest.raises(InputError, match=r"model.new_rows_from: 'none' is no token of"):
        initial_params(run_with_new_tokens, "model.new_rows_from=none")


def test_the_export_has_the_new_tokens(run_with_new_tokens, tmp_path, words):
    """transformers builds the prompt of the training, and computes what the run computes."""
    out = tmp_path / "model"
    assert words("export", run_with_new_tokens.directory, out)[0] == 0
    trained = open_model(run_with_new_tokens.directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == 27
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+2+3"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert tokenizer.convert_ids_to_tokens(ids["input_ids"][0])[-1] == "<think>"
    assert ids["input_ids"][0, -1] == 25
    assert Tokenizer.load(out, "<think>", "</think>").new_ids == ()
    shown = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert shown.shape[1] > ids["input_ids"].shape[1]
    target = abstract_params(
        mesh(), abstract_decoder(trained.model.architecture, vocab_multiple=128)
    )
    again = read_params(out, target)
    for name in ("embedding", "head"):
        np.testing.assert_array_equal(again[name], trained.params[name])
    assert torch.isfinite(model(**ids).logits).all()


def test_the_model_card_says_what_the_model_is(run_with_new_tokens, tmp_path, words):
    out = tmp_path / "model"
    assert words("export", run_with_new_tokens.directory, out)[0] == 0
    _, front, body = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "model"
    for said in (
        "NRT-WS(−log p): weighted sum of probabilities",
        "chain_addition",
        "| step | 2 of 2, 4 prompts each |",
        "`<think>` trace `</think>` answer `<|eos|>`",
    ):
        assert said in body
    assert str(tmp_path) not in body
