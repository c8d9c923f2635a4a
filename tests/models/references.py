"""Tiny Llamas and Mistrals of transformers, and the directories that they save.

The reference of a directory is what transformers reads from it, so that the reading of files and of
config.json is compared as well as the computation.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

T = 640
VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.15,
    "max_position_embeddings": 1024,
}
IDS = np.random.default_rng(0).integers(0, VOCAB, (1, T), dtype=np.int32)


def llama3_rope(factor: float) -> dict[str, Any]:
    """The scaling of Llama 3.1 (factor 8) and 3.2 (32), which acts far below T."""
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }


def plain_rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


class Variant(NamedTuple):
    """A config, and how its model is stored."""

    config: Any
    dtype: str = "float32"
    norms: str | None = None
    """Dtype of the norms where it is another."""
    old_spelling: bool = False
    """rope_theta and rope_scaling, as transformers 4 wrote them, for rope_parameters."""
    max_shard_size: str = "5GB"


def _llama(rope: dict[str, Any], **changes: Any) -> LlamaConfig:
    return LlamaConfig(**(SIZES | {"num_key_value_heads": 2} | changes), rope_parameters=rope)


def _mistral(rope: dict[str, Any], **changes: Any) -> MistralConfig:
    return MistralConfig(**(SIZES | {"num_key_value_heads": 2} | changes), rope_parameters=rope)


_LLAMA31 = _llama(llama3_rope(8.0), num_attention_heads=8, head_dim=16)
VARIANTS = {
    "llama_mha": Variant(_llama(plain_rope(1e4), num_key_value_heads=4)),
    "llama3": Variant(_llama(plain_rope(5e5))),
    "llama3.1": Variant(_LLAMA31),
    "llama3.1_old_spelling": Variant(_LLAMA31, old_spelling=True),
    "llama3.1_bf16": Variant(_LLAMA31, "bfloat16"),
    "llama3.1_mixed": Variant(_LLAMA31, "bfloat16", norms="float32"),
    "llama3.1_shards": Variant(_LLAMA31, max_shard_size="20KB"),
    "llama3.2_tied": Variant(_llama(llama3_rope(32.0), tie_word_embeddings=True)),
    "smollm2": Variant(
        _llama(
            plain_rope(1e5),
            hidden_size=72,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=8,
            tie_word_embeddings=True,
        ),
        "bfloat16",
    ),
    "llama_one_kv_head": Variant(_llama(llama3_rope(8.0), num_key_value_heads=1)),
    "mistral_v0.1": Variant(_mistral(plain_rope(1e4), sliding_window=100)),
    "mistral_v0.1_old_spelling": Variant(
        _mistral(plain_rope(1e4), sliding_window=100), old_spelling=True
    ),
    "mistral_v0.3": Variant(_mistral(plain_rope(1e6), sliding_window=None, head_dim=16)),
}
_CLASSES = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM}


def make_model(config: Any) -> Any:
    """A model with drawn weights, norms included."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = _CLASSES[config.model_type](config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1.0, 0.2)
    return model


def save_variant(variant: Variant, directory: Path) -> Path:
    """Write the directory of a variant."""
    model = make_model(variant.config).to(getattr(torch, variant.dtype))
    if variant.norms is not None:
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.data = weight.data.to(getattr(torch, variant.norms))
    model.save_pretrained(directory, max_shard_size=variant.max_shard_size)
    if variant.old_spelling:
        _spell_rope_as_before(directory / "config.json")
    return directory


def _spell_rope_as_before(file: Path) -> None:
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    file.write_text(json.dumps(config))


def edit_config(folder: Path, **changes: Any) -> Path:
    """Set fields of a directory's config.json; `...` removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


def load_model(directory: Path) -> Any:
    """What transformers reads, in float32; attention as plain products and a softmax."""
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )


class Reference(NamedTuple):
    """A directory, and what transformers computes from it for `ids`, in float32."""

    directory: Path
    logits: np.ndarray
    gradients: Path
    """Of the mean log-likelihood, as a directory: the table of weights maps them as well."""
    ids: np.ndarray = IDS


@cache
def make_reference(name: str, folder: Path) -> Reference:
    """The reference of a variant; `folder` is the one for all of them."""
    directory = save_variant(VARIANTS[name], folder / name)
    return compute_reference(directory, IDS, folder / f"{name}_gradients")


def compute_reference(directory: Path, ids_BT: np.ndarray, gradients: Path) -> Reference:
    """The reference of a directory for these ids; the gradients are written to `gradients`.

    torch computes in float64: its own float32 gradient of SmolLM2 is up to 3e-4 away from that.
    """
    model, ids = load_model(directory).double(), torch.tensor(ids_BT, dtype=torch.long)
    logits = model(ids).logits
    log_pi = torch.log_softmax(logits[:, :-1], dim=-1)
    log_pi.gather(-1, ids[:, 1:, None]).mean().backward()
    save_gradients(model, gradients)
    return Reference(directory, logits.detach().float().numpy(), gradients, ids_BT)


def save_gradients(model: Any, directory: Path) -> Path:
    """Write the gradients of a model in place of its weights, which are lost."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.grad)
    model.float().save_pretrained(directory)
    return directory
