"""config.json: published ones, both spellings of rope, what changes nothing, there and back."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig, MistralConfig

from nrt_jax.checkpoints.generation_config import read_generation
from nrt_jax.checkpoints.hf_config import CONFIG_FILE, config_json, read_architecture
from nrt_jax.config.architecture import Architecture, Llama3Scaling
from tests.models.references import edit_config, llama3_rope

LLAMA3 = llama3_rope(8.0)


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


# --- published -----------------------------------------------------------------------------------

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
_MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


def _scaling(factor: float) -> dict[str, Any]:
    return {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


# The files as published: fields, and what they must be read as.
PUBLISHED = {
    "Meta-Llama-3-8B": (
        _LLAMA
        | {"eos_token_id": 128001, "max_position_embeddings": 8192, "rope_scaling": None}
        | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "tie_word_embeddings": False, "mlp_bias": ...}
        | {"transformers_version": "4.40.0.dev0"},
        {"head_dim": 128, "rope_scaling": None, "rope_theta": 5e5, "hidden_size": 4096},
    ),
    "Llama-3.1-8B-Instruct": (
        _LLAMA
        | {"eos_token_id": [128001, 128008, 128009], "rope_scaling": _scaling(8.0)}
        | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "tie_word_embeddings": False}
        | {"transformers_version": "4.42.3"},
        {"head_dim": 128, "rope_scaling": Llama3Scaling(factor=8.0), "num_hidden_layers": 32},
    ),
    "Llama-3.2-3B": (
        _LLAMA
        | {"eos_token_id": 128001, "rope_scaling": _scaling(32.0), "head_dim": 128}
        | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}
        | {"num_attention_heads": 24, "tie_word_embeddings": True}
        | {"transformers_version": "4.45.0.dev0"},
        {
            "head_dim": 128,
            "rope_scaling": Llama3Scaling(factor=32.0),
            "tie_word_embeddings": True,
            "num_attention_heads": 24,
            "hidden_size": 3072,
        },
    ),
    "Mistral-7B-v0.1": (
        _MISTRAL
        | {"rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000}
        | {"transformers_version": "4.34.0.dev0"},
        {"sliding_window": 4096, "rope_theta": 1e4, "vocab_size": 32000, "head_dim": 128},
    ),
    "Mistral-7B-v0.3": (
        _MISTRAL
        | {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768}
        | {"attention_dropout": 0.0, "transformers_version": "4.42.0.dev0"},
        {"sliding_window": None, "rope_theta": 1e6, "vocab_size": 32768, "head_dim": 128},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(tmp_path, name):
    """As written down here, and as transformers reads the same file."""
    fields, expected = PUBLISHED[name]
    fields = {key: value for key, value in fields.items() if value is not ...}
    a = read_architecture(write_config(tmp_path / name, fields))
    for field, value in expected.items():
        assert getattr(a, field) == value, field
    assert a.family == fields["model_type"]
    assert a.num_key_value_heads == 8
    assert a.rms_norm_eps == 1e-5
    assert_read_as_transformers(a, tmp_path / name)
    ids = {key: fields[key] for key in ("bos_token_id", "eos_token_id")}
    assert read_generation(tmp_path / name) == ids


SAME_NAME = sorted(Architecture.model_fields.keys() - {"family", "rope_theta", "rope_scaling"})


def assert_read_as_transformers(a: Architecture, folder: Path) -> None:
    """Every field of the architecture is what transformers takes from the file."""
    config = AutoConfig.from_pretrained(folder)
    for field in SAME_NAME:
        if not (field == "sliding_window" and a.family == "llama"):
            assert getattr(a, field) == getattr(config, field), field
    rope = dict(config.rope_parameters)
    assert a.rope_theta == rope.pop("rope_theta")
    if a.rope_scaling is None:
        assert rope.pop("rope_type") == "default"
    else:
        assert rope == {"rope_type": "llama3", **a.rope_scaling.model_dump()}


# --- fields --------------------------------------------------------------------------------------


def test_both_spellings_of_rope_mean_the_same(copy):
    rope = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    new = read_architecture(edit_config(copy, rope_parameters=LLAMA3))
    old = {"rope_theta": 500000.0, "rope_scaling": rope}
    both = read_architecture(edit_config(copy, rope_parameters=LLAMA3, **old))
    assert new == both == read_architecture(edit_config(copy, rope_parameters=..., **old))
    legacy = {"type": "llama3"} | {k: v for k, v in rope.items() if k != "rope_type"}
    assert new == read_architecture(edit_config(copy, rope_scaling=legacy))
    assert new.rope_theta == 500000.0
    assert new.rope_scaling is not None
    assert {"rope_type": "llama3", **new.rope_scaling.model_dump()} == rope
    plain = read_architecture(edit_config(copy, rope_scaling=None))
    assert (plain.rope_theta, plain.rope_scaling) == (500000.0, None)


REMOVED = [
    "head_dim",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "initializer_range",
    "max_position_embeddings",
]


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig])
def test_absent_fields_are_what_transformers_takes(copy, config_class):
    family = config_class.model_type
    edit_config(
        copy,
        **dict.fromkeys(REMOVED, ...),
        model_type=family,
        architectures=[f"{family.capitalize()}ForCausalLM"],
        num_attention_heads=8,
    )
    assert_read_as_transformers(read_architecture(copy), copy)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_null_heads_are_derived(copy, family):
    edit_config(
        copy,
        num_key_value_heads=None,
        head_dim=None,
        model_type=family,
        architectures=[f"{family.capitalize()}ForCausalLM"],
    )
    a = read_architecture(copy)
    assert (a.num_key_value_heads, a.head_dim) == (4, 8)
    # transformers 5 takes no null for the kv heads of a Mistral.
    if family == "llama":
        assert_read_as_transformers(a, copy)


IGNORED = {
    "bos_token_id": 5,
    "eos_token_id": [1, 2],
    "pad_token_id": None,
    "torch_dtype": "float16",
    "use_cache": False,
    "pretraining_tp": 8,
    "_name_or_path": "somewhere",
    "_attn_implementation_autoset": True,
    "transformers_version": "4.0.0",
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "attention_bias": None,
    "unknown_and_off": False,
    "unknown_and_null": None,
    "unknown_and_empty": {},
    "unknown_and_none": [],
    "unknown_and_no_text": "",
    "quantization_config": None,
    "sliding_window": None,
    "layer_types": ["full_attention", "full_attention"],
}


@pytest.mark.parametrize("field", IGNORED)
def test_fields_that_change_nothing(copy, field):
    expected = read_architecture(copy)
    assert read_architecture(edit_config(copy, **{field: IGNORED[field]})) == expected


# --- generation ----------------------------------------------------------------------------------


def test_generation_of_its_own_file_comes_first(copy):
    edit_config(copy, bos_token_id=1, eos_token_id=[2, 3], pad_token_id=None)
    (copy / "generation_config.json").unlink()
    assert read_generation(copy) == {"bos_token_id": 1, "eos_token_id": [2, 3]}
    (copy / "generation_config.json").write_text('{"eos_token_id": 7, "temperature": 0.6}')
    assert read_generation(copy) == {"eos_token_id": 7, "temperature": 0.6}


# --- there and back ------------------------------------------------------------------------------

positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
counts = st.integers(1, 10**6)


@st.composite
def scalings(draw: st.DrawFn) -> Llama3Scaling:
    low, high = sorted(draw(st.tuples(positive, positive).filter(lambda pair: pair[0] != pair[1])))
    return Llama3Scaling(
        factor=draw(positive),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=draw(counts),
    )


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    family, kv_heads = draw(st.sampled_from(["llama", "mistral"])), draw(st.integers(1, 64))
    window = draw(st.none() | counts) if family == "mistral" else None
    return Architecture(
        family=family,
        vocab_size=draw(counts),
        hidden_size=draw(counts),
        intermediate_size=draw(counts),
        num_hidden_layers=draw(counts),
        num_attention_heads=kv_heads * draw(st.integers(1, 16)),
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 128)),
        rms_norm_eps=draw(positive),
        rope_theta=draw(positive),
        rope_scaling=draw(st.none() | scalings()),
        sliding_window=window,
        tie_word_embeddings=draw(st.booleans()),
        initializer_range=draw(positive),
        max_position_embeddings=draw(counts),
    )


@given(a=architectures(), dtype=st.sampled_from(["float32", "bfloat16", "float16"]))
def test_there_and_back_is_the_identity(tmp_path_factory, a, dtype):
    folder = tmp_path_factory.getbasetemp() / "there_and_back"
    generation = {"bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.6}
    written = config_json(a, dtype, generation)
    write_config(folder, written)
    assert read_architecture(folder) == a
    assert written["torch_dtype"] == dtype
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, [2, 3])
    assert "temperature" not in written


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_what_is_written(tmp_path, name):
    fields = {k: v for k, v in PUBLISHED[name][0].items() if v is not ...}
    a = read_architecture(write_config(tmp_path / "in", fields))
    generation = {"bos_token_id": fields["bos_token_id"], "eos_token_id": fields["eos_token_id"]}
    write_config(tmp_path / "out", config_json(a, "bfloat16", generation))
    assert_read_as_transformers(a, tmp_path / "out")
    found, original = (
        AutoConfig.from_pretrained(tmp_path / end).to_dict() for end in ("out", "in")
    )
    # Version and padding id say nothing of the model; the dtype is the same.
    for field in original.keys() - {"transformers_version", "_name_or_path", "pad_token_id"}:
        assert found[field] == original[field], field
