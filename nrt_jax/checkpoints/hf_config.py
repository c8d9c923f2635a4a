"""`config.json` of a Hugging Face directory, read into an Architecture and written from one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from nrt_jax.checkpoints.json_files import read_json
from nrt_jax.checkpoints.other_weights import other_weights
from nrt_jax.config.architecture import Architecture
from nrt_jax.errors import InputError

StoredDtype = Literal["float32", "bfloat16", "float16"]
CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"

_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

# The defaults of the two transformers classes for fields that config.json leaves out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "num_key_value_heads": None},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}
_COMMON_DEFAULTS = {
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}

# Fields that change the computation, with the values that leave the decoder's as it is.
_NO_CHANGE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "quantization_config": (),
    "compression_config": (),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "auto_map": ({},),
    "is_causal": (True,),
}
# Fields of the base class about storage, execution and the defaults of generation.
# fmt: off
_CHANGE_NOTHING = {
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "tokenizer_class", "id2label", "label2id", "num_labels",
    "problem_type", "finetuning_task", "task_specific_params", "prefix", "output_hidden_states",
    "output_attentions", "output_scores", "return_dict", "return_dict_in_generate", "torchscript",
    "use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward", "is_decoder",
    "attn_implementation", "base_model_tp_plan", "base_model_pp_plan", "unsloth_fixed",
    "unsloth_version", "max_length", "min_length", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "remove_invalid_values", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
    "begin_suppress_tokens", "exponential_decay_length_penalty", "_name_or_path", "_commit_hash",
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "_flash_attn_2_enabled", "_from_model_config",
}
# fmt: on
_ROPE = {
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "original_max_position_embeddings",
}
_REMEDIES = {
    "quantization_config": "quantised weights are not read; store them as bfloat16 or float32",
    "compression_config": "compressed weights are not read; store them as bfloat16 or float32",
    "auto_map": "code from a checkpoint (trust_remote_code) is never run; use a plain checkpoint",
}


def directory_name(directory: Path) -> str:
    """The name of a model: its repository's for a snapshot in a Hugging Face cache."""
    snapshots = directory.absolute().parent
    repository = snapshots.parent.name
    if snapshots.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return directory.resolve().name


def read_architecture(directory: Path) -> Architecture:
    """The architecture that `config.json` describes.

    Reads both spellings of rope (`rope_theta` + `rope_scaling`, `rope_parameters`). Raises
    InputError on a file that cannot be read and on any field that asks for a computation that the
    decoder does not do.
    """
    file = Path(directory) / CONFIG_FILE
    told = None if file.exists() else other_weights(Path(directory))
    if told is not None:
        raise InputError(told)
    config = read_json(file)
    family = _family(file, config)
    for field, allowed in _NO_CHANGE.items():
        value = config.get(field)
        if value is not None and value not in allowed:
            only = f"not implemented; only {' or '.join(map(_show, allowed))} is" if allowed else ""
            raise _refusal(file, field, value, _REMEDIES.get(field, only))
    values = _COMMON_DEFAULTS | _DEFAULTS[family] | {"family": family}
    for field in _REQUIRED:
        if config.get(field) is None:
            raise InputError(f"{file}: {field}: required; {_CLASSES[family]} has no default for it")
    fields = Architecture.model_fields.keys() - {"family", "rope_theta", "rope_scaling"}
    values |= {field: config[field] for field in fields if field in config}
    _check_known(file, config)
    _check_layer_types(file, config, values.get("sliding_window"))
    values = _derive_heads(file, values) | _read_rope(file, config)
    try:
        return Architecture.model_validate(values)
    except ValidationError as error:
        raise _invalid(file, error) from None


def _family(file: Path, config: dict[str, Any]) -> str:
    family = config.get("model_type")
    if family not in list(_CLASSES):
        raise _refusal(file, "model_type", family, f"must be {' or '.join(_CLASSES)}")
    names = config.get("architectures")
    if names is not None and names != [_CLASSES[family]]:
        raise _refusal(file, "architectures", names, f'must be ["{_CLASSES[family]}"]')
    return family


def _check_known(file: Path, config: dict[str, Any]) -> None:
    """Refuse unknown fields, which may change the computation, unless they are off or empty."""
    known = Architecture.model_fields.keys() | _NO_CHANGE.keys() | _ROPE | _CHANGE_NOTHING
    for field, value in config.items():
        off = value is None or value is False or value in ("", [], {})
        if not off and field not in known and field != "layer_types":
            raise _refusal(
                file,
                field,
                value,
                "not implemented; if it changes nothing in the model, take it out of the file",
            )


def _derive_heads(file: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Fill in num_key_value_heads and head_dim where they are null."""
    heads, width = values["num_attention_heads"], values["hidden_size"]
    derived = dict(values)
    if derived["num_key_value_heads"] is None:
        derived["num_key_value_heads"] = heads
    if derived["head_dim"] is None and isinstance(heads, int) and isinstance(width, int):
        if heads < 1 or width % heads:
            remedy = f"must divide hidden_size={width}, or head_dim must be given"
            raise _refusal(file, "num_attention_heads", heads, remedy)
        derived["head_dim"] = width // heads
    return derived


def _check_layer_types(file: Path, config: dict[str, Any], window: Any) -> None:
    kind = "full_attention" if window is None else "sliding_attention"
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or any(other != kind for other in kinds):
        remedy = f"layers of different kinds are not implemented; each must be {kind}"
        raise _refusal(file, "layer_types", kinds, remedy)


def _read_rope(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling, from either spelling of rope or from both if they agree."""
    rope: dict[str, tuple[str, Any]] = {}
    for field, key, value in _rope_fields(file, config):
        where, earlier = rope.setdefault(key, (field, value))
        if earlier != value:
            raise _refusal(file, field, value, f"must agree with {where}={_show(earlier)}")
    field, kind = rope.pop("rope_type", ("", "default"))
    if kind not in ("default", "llama3"):
        raise _refusal(file, field, kind, "not implemented; only default and llama3 are")
    _, theta = rope.pop("rope_theta", ("", 10000.0))
    field, fraction = rope.pop("partial_rotary_factor", ("", 1))
    if fraction != 1:
        raise _refusal(file, field, fraction, "not implemented; only 1.0 is")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    expected = keys if kind == "llama3" else ()
    for key, (field, value) in rope.items():
        if key not in expected and field != key:
            raise _refusal(file, field, value, f"not implemented with rope_type {kind}")
    for key in expected:
        if key not in rope:
            raise InputError(f"{file}: {key}: required by rope_type llama3")
    scaling = {key: rope[key][1] for key in expected}
    return {"rope_theta": theta, "rope_scaling": scaling or None}


def _rope_fields(file: Path, config: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(name in the file, key, value) of every field of config.json about rope."""
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if config.get(key) is not None:
            yield key, key, config[key]
    for name in ("rope_scaling", "rope_parameters"):
        group = config.get(name)
        if not isinstance(group, dict | None):
            raise _refusal(file, name, group, "must be an object or null")
        for key, value in (group or {}).items():
            if value is not None:
                yield f"{name}.{key}", "rope_type" if key == "type" else key, value


def config_json(a: Architecture, dtype: str, token_ids: dict[str, Any]) -> dict[str, Any]:
    """`config.json` in the spelling that transformers 4 and 5 both read.

    `token_ids` may hold more than the token ids, as the content of `generation_config.json` does.
    """
    config = a.model_dump(exclude={"family"})
    if a.family == "llama":
        del config["sliding_window"]
        config |= {"attention_bias": False, "mlp_bias": False}
    if a.rope_scaling is not None:
        config["rope_scaling"] = {"rope_type": "llama3", **config["rope_scaling"]}
    return {
        "architectures": [_CLASSES[a.family]],
        "model_type": a.family,
        **config,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        # Without these fields the class has ids of its own.
        **{key: token_ids.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _refusal(file: Path, field: str, value: Any, remedy: str) -> InputError:
    return InputError(f"{file}: {field}={_show(value)}: {remedy}")


def _invalid(file: Path, error: ValidationError) -> InputError:
    detail = error.errors()[0]
    cause = detail.get("ctx", {}).get("error")
    message = detail["msg"].replace("Input should ", "must ") if cause is None else str(cause)
    field = ".".join(str(part) for part in detail["loc"])
    return (
        _refusal(file, field, detail["input"], message)
        if field
        else InputError(f"{file}: {message}")
    )


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
