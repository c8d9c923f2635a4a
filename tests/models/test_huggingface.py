"""Directories of random tiny models: parity with transformers, files written, input refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from nrt_jax.errors import InputError
from nrt_jax.models.decoder import Decoder
from nrt_jax.models.huggingface import read_architecture, read_weights, write_directory
from nrt_jax.models.variants import Architecture
from tests.models.tiny import close

T = 512
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "max_position_embeddings": 1024,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=4),
    "llama3_tied": LlamaConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters=LLAMA3,
        tie_word_embeddings=True,
    ),
    "mistral": MistralConfig(
        **SIZES, num_key_value_heads=1, rope_parameters=PLAIN, sliding_window=None
    ),
    "mistral_window": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=100),
}
CLASSES = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM}


class Reference(NamedTuple):
    """A transformers model, the directory it saved, and its logits and gradients on IDS."""

    model: Any
    directory: Path
    logits: np.ndarray
    gradients: Path


IDS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (1, T))


def make_model(config: Any) -> Any:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = CLASSES[config.model_type](config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1.0, 0.2)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def reference(request, tmp_path_factory) -> Reference:
    model = make_model(CONFIGS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "model")
    ids = torch.tensor(IDS)
    logits = model(ids).logits
    log_pi = torch.log_softmax(logits[:, :-1], dim=-1)
    log_pi.gather(-1, ids[:, 1:, None]).mean().backward()
    # The gradients as a directory of their own: the table of weights maps them as well.
    gradients = make_model(CONFIGS[request.param])
    with torch.no_grad():
        for weight, source in zip(gradients.parameters(), model.parameters(), strict=True):
            weight.copy_(source.grad)
    gradients.save_pretrained(folder / "gradients")
    return Reference(model, folder / "model", logits.detach().numpy(), folder / "gradients")


def graph_of(a: Architecture) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Decoder(a, nnx.Rngs(0))))


def ours(a: Architecture, params: dict) -> np.ndarray:
    graph = graph_of(a)
    return np.asarray(jax.jit(lambda p: nnx.merge(graph, nnx.State(p))(jnp.asarray(IDS)))(params))


def files_equal(one: Path, other: Path) -> None:
    """Same names, dtypes, shapes and bits."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape)
        assert a[name].tobytes() == b[name].tobytes(), name


# --- parity --------------------------------------------------------------------------------------


def test_logits_and_gradients_equal_transformers(reference):
    a = read_architecture(reference.directory)
    params = read_weights(reference.directory, a)
    graph, ids = graph_of(a), jnp.asarray(IDS)

    def log_likelihood(params):
        logits = nnx.merge(graph, nnx.State(params))(ids)
        log_pi = jax.nn.log_softmax(logits[:, :-1])
        return jnp.mean(jnp.take_along_axis(log_pi, ids[:, 1:, None], axis=-1)), logits

    step = jax.jit(jax.value_and_grad(log_likelihood, has_aux=True))
    (_, logits), gradients = step(params)
    np.testing.assert_allclose(logits, reference.logits, rtol=0, atol=1e-4)
    close(gradients, read_weights(reference.gradients, a), 1e-4)


def test_params_are_those_of_the_decoder(reference):
    a = read_architecture(reference.directory)
    expected = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(Decoder(a, nnx.Rngs(0)))))
    actual = read_weights(reference.directory, a)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), actual) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )


def swap_gate_and_up(params: dict) -> None:
    mlp = params["layers"]["mlp"]
    mlp["gate"], mlp["up"] = mlp["up"], mlp["gate"]


def interleave_rotary(params: dict) -> None:
    """Heads as Meta stores them: pairs (0, 1), (2, 3) ... instead of (i, i + d/2)."""
    attention = params["layers"]["attention"]
    for name in ("query", "key"):
        halves = attention[name].reshape(*attention[name].shape[:-1], 2, -1)
        attention[name] = jnp.swapaxes(halves, -1, -2).reshape(attention[name].shape)


MISTAKES = {
    "theta": ("llama3_tied", {"rope_theta": 10000.0}, None),
    "scaling": ("llama3_tied", {"rope_scaling": None}, None),
    "window_short": ("mistral_window", {"sliding_window": 99}, None),
    "window_long": ("mistral_window", {"sliding_window": 101}, None),
    "gate_up": ("llama3_tied", {}, swap_gate_and_up),
    "rotary": ("llama3_tied", {}, interleave_rotary),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_parity_would_notice(mistake, tmp_path):
    """Each mistake moves the logits by far more than the tolerance of the parity test."""
    name, changes, edit = MISTAKES[mistake]
    model = make_model(CONFIGS[name])
    model.save_pretrained(tmp_path)
    a = read_architecture(tmp_path)
    params = read_weights(tmp_path, a)
    if edit is not None:
        edit(params)
    with torch.no_grad():
        expected = model(torch.tensor(IDS)).logits.numpy()
    assert np.abs(ours(a.model_copy(update=changes), params) - expected).max() > 1e-2


# --- export --------------------------------------------------------------------------------------


def test_export_reloads_in_transformers_with_identical_logits(reference, tmp_path):
    a = read_architecture(reference.directory)
    out = tmp_path / "runs" / "export"
    write_directory(out, a, read_weights(reference.directory, a), bos_token_id=None, eos_token_id=3)
    files_equal(out / "model.safetensors", reference.directory / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model) is type(reference.model)
    with torch.no_grad():
        assert np.array_equal(model(torch.tensor(IDS)).logits.numpy(), reference.logits)
    assert read_architecture(out) == a
    assert (model.config.bos_token_id, model.config.eos_token_id) == (None, 3)
    assert model.generation_config.eos_token_id == 3
    shown = model.generate(torch.tensor(IDS[:, :4]), max_new_tokens=2, do_sample=False)
    assert shown.shape[1] in (5, 6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_there_and_back_is_exact(dtype, tmp_path):
    model = make_model(CONFIGS["llama3_tied"]).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "in")
    a = read_architecture(tmp_path / "in")
    params = read_weights(tmp_path / "in", a)
    expected = model.model.embed_tokens.weight.float().detach().numpy()
    np.testing.assert_array_equal(params["embedding"], expected)
    write_directory(tmp_path / "out", a, params, dtype=dtype)
    files_equal(tmp_path / "in" / "model.safetensors", tmp_path / "out" / "model.safetensors")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    make_model(CONFIGS["llama"]).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_the_tokenizer_comes_along_and_a_failure_leaves_nothing(saved, tmp_path):
    a = read_architecture(saved)
    params = read_weights(saved, a)

    def copy_tokenizer(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")

    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"out: cannot be written: No space left on device"):
        write_directory(tmp_path / "out", a, params, copy_tokenizer=fail)
    assert list(tmp_path.iterdir()) == []
    write_directory(tmp_path / "out", a, params, copy_tokenizer=copy_tokenizer)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(InputError, match=r"out: exists and is not empty"):
        write_directory(tmp_path / "out", a, params)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_params_that_do_not_fit_are_not_written(saved, tmp_path):
    a = read_architecture(saved)
    params = read_weights(saved, a)
    tied = a.model_copy(update={"tie_word_embeddings": True})
    deeper = a.model_copy(update={"num_hidden_layers": 3})
    cases = [
        (tied, params, "float32", "params: head: no weight of a llama"),
        (a, {k: v for k, v in params.items() if k != "head"}, "float32", "params: head: missing"),
        (deeper, params, "float32", r"layers.attention_norm.scale: shape \(2, 32\)"),
        (a, params | {"head": params["head"] + 1e5}, "float16", "lm_head.weight: .* too large"),
    ]
    for architecture, weights, dtype, message in cases:
        with pytest.raises(InputError, match=message):
            write_directory(tmp_path / "out", architecture, weights, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


# --- config.json ---------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: Any) -> Path:
    """Set fields; `...` removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


def test_both_spellings_of_rope_mean_the_same(copy):
    rope = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    new = read_architecture(edit_config(copy, rope_parameters=LLAMA3))
    old = {"rope_theta": 500000.0, "rope_scaling": rope}
    both = read_architecture(edit_config(copy, rope_parameters=LLAMA3, **old))
    assert new == both == read_architecture(edit_config(copy, rope_parameters=..., **old))
    assert new.rope_theta == 500000.0
    assert new.rope_scaling is not None
    assert {"rope_type": "llama3", **new.rope_scaling.model_dump()} == rope
    plain = read_architecture(edit_config(copy, rope_scaling=None))
    assert (plain.rope_theta, plain.rope_scaling) == (500000.0, None)


def test_absent_fields_are_what_transformers_takes(copy):
    removed = ["head_dim", "num_key_value_heads", "rms_norm_eps", "rope_parameters"]
    removed += ["tie_word_embeddings", "initializer_range", "max_position_embeddings"]
    edit_config(copy, **dict.fromkeys(removed, ...))
    a, config = read_architecture(copy), LlamaConfig.from_pretrained(copy)
    for field in removed:
        if field != "rope_parameters":
            assert getattr(a, field) == getattr(config, field), field
    assert a.rope_theta == config.to_dict()["rope_parameters"]["rope_theta"]
    edit_config(
        copy, model_type="mistral", architectures=["MistralForCausalLM"], num_attention_heads=8
    )
    a, config = read_architecture(copy), MistralConfig.from_pretrained(copy)
    for field in [*removed, "sliding_window"]:
        if field != "rope_parameters":
            assert getattr(a, field) == getattr(config, field), field


REFUSED = [
    ({"model_type": "qwen2"}, 'model_type="qwen2": must be llama or mistral'),
    ({"architectures": ["LlamaModel"]}, 'architectures=["LlamaModel"]: must be'),
    ({"attention_bias": True}, "attention_bias=true: not implemented; only false is"),
    ({"mlp_bias": True}, "mlp_bias=true: not implemented; only false is"),
    ({"hidden_act": "gelu"}, 'hidden_act="gelu": not implemented; only "silu"'),
    ({"attention_dropout": 0.1}, "attention_dropout=0.1: not implemented"),
    ({"quantization_config": {"bits": 4}}, 'quantization_config={"bits": 4}: quantised'),
    ({"auto_map": {"AutoModel": "x.Y"}}, "trust_remote_code"),
    ({"sliding_window": 8}, "sliding_window 8 must be null, or family must be mistral"),
    ({"layer_types": ["sliding_attention"]}, "layer_types="),
    (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        'rope_parameters.rope_type="yarn": not',
    ),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type="),
    ({"rope_parameters": {"factor": 2.0}}, "rope_parameters.factor=2.0: not implemented with"),
    ({"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ({"rope_parameters": LLAMA3 | {"attention_factor": 2.0}}, "attention_factor=2.0"),
    ({"rope_parameters": LLAMA3 | {"factor": None}}, "factor: required by rope_type llama3"),
    ({"rope_parameters": LLAMA3 | {"factor": -1}}, "rope_scaling.factor=-1: must be greater"),
    ({"rope_parameters": PLAIN, "rope_theta": 5.0}, "must agree with rope_theta=5.0"),
    ({"rope_parameters": [1]}, "rope_parameters=[1]: must be an object or null"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3 must divide num_attention_heads 4"),
    ({"num_attention_heads": 5, "head_dim": None}, "num_attention_heads=5: must divide"),
    ({"vocab_size": ...}, "vocab_size: required"),
    ({"hidden_size": "wide"}, 'hidden_size="wide": must be a valid integer'),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_config_is_refused_by_name(copy, changes, message):
    edit_config(copy, **changes)
    with pytest.raises(InputError) as error:
        read_architecture(copy)
    text = str(error.value)
    assert text.startswith(f"{copy / 'config.json'}: ")
    assert message in text
    assert "\n" not in text


def test_config_that_is_no_json_object(tmp_path):
    with pytest.raises(InputError, match=r"config.json: no such file; give a Hugging Face"):
        read_architecture(tmp_path)
    for text, message in (
        ("{", "must be JSON"),
        ("[]", "must be a JSON object"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=message):
            read_architecture(tmp_path)


# --- weights -------------------------------------------------------------------------------------


def edit_weights(folder: Path, **changes: np.ndarray | None) -> Path:
    """Set tensors by name with `__` for a dot; None removes one."""
    file = folder / "model.safetensors"
    tensors = load_file(file) | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, file)
    return folder


def test_many_shards_read_as_one_file(saved, tmp_path):
    make_model(CONFIGS["llama"]).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    save_file({"other": np.zeros(1, np.float32)}, tmp_path / "consolidated.safetensors")
    a = read_architecture(saved)
    jax.tree.map(np.testing.assert_array_equal, read_weights(tmp_path, a), read_weights(saved, a))

    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"model.norm.weight: the index says None, the files say"):
        read_weights(tmp_path, a)
    content["weight_map"]["model.norm.weight"] = "model-00009-of-00009.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"model-00009-of-00009.safetensors: no such file"):
        read_weights(tmp_path, a)
    shutil.copy(tmp_path / shard, tmp_path / "model-00009-of-00009.safetensors")
    with pytest.raises(InputError, match=r"stored also in"):
        read_weights(tmp_path, a)


NORM = "model__norm__weight"
REFUSED_WEIGHTS = [
    ({NORM: None}, "model.norm.weight: missing (1 of 21 weights are)"),
    ({"lm_head__weight": None}, "lm_head.weight: missing"),
    ({"model__layers__2__mlp__up_proj__weight": np.zeros(1, np.float32)}, "no weight of a llama"),
    ({"model__layers__0__self_attn__q_proj__bias": np.zeros(32, np.float32)}, "q_proj.bias: no"),
    ({NORM: np.zeros(31, np.float32)}, "shape (31,), but config.json makes it (32,)"),
    ({"lm_head__weight": np.zeros((32, 97), np.float32)}, "shape (32, 97), but"),
    ({NORM: np.zeros(32, np.float64)}, "model.norm.weight: dtype F64; store F32, BF16 or F16"),
    ({NORM: np.zeros(32, np.int8)}, "model.norm.weight: dtype I8"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED_WEIGHTS)
def test_weights_are_refused_by_name(copy, changes, message):
    edit_weights(copy, **changes)
    with pytest.raises(InputError) as error:
        read_weights(copy, read_architecture(copy))
    assert message in str(error.value)
    assert str(copy) in str(error.value)


def test_rotary_constants_of_old_exports_are_no_weights(copy):
    edit_weights(copy, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(4, np.float32))
    read_weights(copy, read_architecture(copy))


def test_tied_head_in_the_file_must_be_the_embedding(copy):
    a = read_architecture(copy).model_copy(update={"tie_word_embeddings": True})
    with pytest.raises(InputError, match=r"lm_head.weight: differs from model.embed_tokens"):
        read_weights(copy, a)
    with safe_open(copy / "model.safetensors", "np") as file:
        embedding = file.get_tensor("model.embed_tokens.weight")
    edit_weights(copy, lm_head__weight=embedding)
    assert "head" not in read_weights(copy, a)


def test_files_that_are_no_safetensors(copy):
    a = read_architecture(copy)
    (copy / "model.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match=r"model.safetensors: cannot be read as safetensors"):
        read_weights(copy, a)
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no \*.safetensors"):
        read_weights(copy, a)
    (copy / "pytorch_model.bin").write_bytes(b"no")
    with pytest.raises(InputError, match=r"pytorch_model.bin: pickled weights are refused"):
        read_weights(copy, a)


def test_needs_neither_torch_nor_transformers():
    code = (
        "import sys, nrt_jax.models.huggingface\n"
        "print({'torch', 'transformers'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout.strip() == b"set()"
