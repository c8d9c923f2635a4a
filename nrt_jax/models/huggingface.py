"""Hugging Face directories of Llama and Mistral, read and written: config.json and safetensors.

Letters: V vocabulary, D model dim, F feed-forward, N query heads, H key/value heads, d head dim.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nrt_jax.errors import InputError
from nrt_jax.models.variants import Architecture

StoredDtype = Literal["float32", "bfloat16", "float16"]

_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

# --- config.json ---------------------------------------------------------------------------------

_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

# What the two transformers classes take for a field that config.json leaves out.
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

# Fields that change the computation, with the values under which they change nothing of ours.
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
}
_REMEDIES = {
    "quantization_config": "quantised weights are not read; store them as bfloat16 or float32",
    "compression_config": "compressed weights are not read; store them as bfloat16 or float32",
    "auto_map": "code from a checkpoint (trust_remote_code) is never run; use a plain checkpoint",
}


def read_architecture(directory: Path) -> Architecture:
    """The architecture that `config.json` describes.

    Reads both spellings of rope (`rope_theta` + `rope_scaling`, `rope_parameters`). Raises
    InputError on a file that cannot be read and on any field that asks for a computation that the
    decoder does not do.
    """
    file = Path(directory) / _CONFIG
    config = _read_json(file)
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
    """(field as it is called in the file, key, value) of all that config.json says about rope."""
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


def _config_json(a: Architecture, dtype: str, bos: int | None, eos: int | None) -> dict[str, Any]:
    """`config.json` in the spelling that transformers 4 and 5 both read."""
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
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": dtype,
        "use_cache": True,
    }


# --- the table of weights ------------------------------------------------------------------------


class _Weight(NamedTuple):
    """One row of the table: a name in the files, and where and how the params hold that weight.

    The files hold a matrix as [out, in]; the params hold it as [in dims, out dims], each of which
    may be several. `in_dims` is how many of the dims of `shape` are the input; 0 for a weight that
    both hold alike. A name with {} stands for one weight a layer, stacked in the params.
    """

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    in_dims: int

    def file_shape(self) -> tuple[int, ...]:
        if not self.in_dims:
            return self.shape
        return math.prod(self.shape[self.in_dims :]), math.prod(self.shape[: self.in_dims])

    def from_file(self, tensor: np.ndarray) -> np.ndarray:
        return (tensor.T if self.in_dims else tensor).reshape(self.shape)

    def to_file(self, weight: np.ndarray) -> np.ndarray:
        return weight.reshape(self.file_shape()[::-1]).T if self.in_dims else weight

    def names(self, layers: int) -> list[str]:
        stacked = "{}" in self.name
        return [self.name.format(n) for n in range(layers)] if stacked else [self.name]

    def params_shape(self, layers: int) -> tuple[int, ...]:
        return (layers, *self.shape) if "{}" in self.name else self.shape


def _weights(a: Architecture) -> list[_Weight]:
    V, D, F = a.vocab_size, a.hidden_size, a.intermediate_size
    N, H, d = a.num_attention_heads, a.num_key_value_heads, a.head_dim
    layer = "model.layers.{}."
    rows = [
        ("model.embed_tokens.weight", "embedding", (V, D), 0),
        (layer + "input_layernorm.weight", "layers.attention_norm.scale", (D,), 0),
        (layer + "self_attn.q_proj.weight", "layers.attention.query", (D, N, d), 1),
        (layer + "self_attn.k_proj.weight", "layers.attention.key", (D, H, d), 1),
        (layer + "self_attn.v_proj.weight", "layers.attention.value", (D, H, d), 1),
        (layer + "self_attn.o_proj.weight", "layers.attention.output", (N, d, D), 2),
        (layer + "post_attention_layernorm.weight", "layers.mlp_norm.scale", (D,), 0),
        (layer + "mlp.gate_proj.weight", "layers.mlp.gate", (D, F), 1),
        (layer + "mlp.up_proj.weight", "layers.mlp.up", (D, F), 1),
        (layer + "mlp.down_proj.weight", "layers.mlp.down", (F, D), 1),
        ("model.norm.weight", "final_norm.scale", (D,), 0),
    ]
    if not a.tie_word_embeddings:
        rows.append((_HEAD, "head", (D, V), 1))
    return [_Weight(name, tuple(path.split(".")), *rest) for name, path, *rest in rows]


_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
# Old Llama exports store these constants of the architecture, which are no weights.
_CONSTANT = ".rotary_emb.inv_freq"


# --- reading -------------------------------------------------------------------------------------


def read_weights(directory: Path, architecture: Architecture) -> dict:
    """The params of `Decoder(architecture)` as a nested dict of float32 arrays, layers stacked.

    Reads float32, bfloat16 and float16 safetensors exactly, one file or several with an index,
    tensor by tensor. Raises InputError on pickled weights, on a name that is missing, unknown or
    stored twice, and on a shape or dtype that does not fit the architecture.
    """
    directory = Path(directory)
    tensors = _open_tensors(directory)
    table = _weights(architecture)
    _check(directory, architecture, table, tensors)
    params: dict = {}
    for row in table:
        *parents, leaf = row.path
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = jnp.array(_stack(row, architecture.num_hidden_layers, tensors))
    return params


def _stack(row: _Weight, layers: int, tensors: "dict[str, _Tensor]") -> np.ndarray:
    names = row.names(layers)
    stacked = np.empty((len(names), *row.shape), np.float32)
    for n, name in enumerate(names):
        stacked[n] = row.from_file(tensors[name].read())
    return stacked.reshape(row.params_shape(layers))


class _Tensor(NamedTuple):
    """A tensor in an open file, not read yet."""

    file: Path
    name: str
    handle: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.handle.get_slice(self.name).get_shape())

    @property
    def dtype(self) -> str:
        return self.handle.get_slice(self.name).get_dtype()

    def read(self) -> np.ndarray:
        return self.handle.get_tensor(self.name)


def _open_tensors(directory: Path) -> dict[str, _Tensor]:
    """Every tensor of the directory by name; the files are mapped, not read."""
    files, weight_map = _weight_files(directory)
    tensors: dict[str, _Tensor] = {}
    for file in files:
        try:
            handle = safe_open(file, framework="np")
        except FileNotFoundError:
            raise InputError(f"{file}: no such file, but {_INDEX} names it; copy it too") from None
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file}: cannot be read as safetensors: {_line(error)}") from None
        for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
            if name in tensors:
                raise InputError(f"{file}: {name}: stored also in {tensors[name].file.name}")
            tensors[name] = _Tensor(file, name, handle)
    if weight_map is not None:
        _check_index(directory / _INDEX, weight_map, tensors)
    return tensors


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that hold the weights, and what the index says where there is one.

    Files beside the index that it does not name are another copy (`consolidated.safetensors`).
    """
    index, single = directory / _INDEX, directory / _SINGLE
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index}: weight_map: must map names of weights to files")
        names = sorted({str(name) for name in weight_map.values()})
        if single.exists() and _SINGLE not in names:
            raise InputError(f"{directory}: {_SINGLE} and {_INDEX}: two models; remove one of them")
        return [directory / name for name in names], weight_map
    files = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
    if files:
        return files, None
    pickled = sorted(f for end in ("bin", "pt", "pth") for f in directory.glob(f"*.{end}"))
    if pickled:
        raise InputError(
            f"{pickled[0]}: pickled weights are refused, since loading a pickle runs the code in "
            "it; convert with transformers: save_pretrained(..., safe_serialization=True)"
        )
    raise InputError(f"{directory}: holds no *.safetensors; give a Hugging Face model directory")


def _check_index(index: Path, weight_map: dict[str, str], tensors: "dict[str, _Tensor]") -> None:
    for name in sorted(weight_map.keys() | tensors.keys()):
        said = weight_map.get(name)
        found = tensors[name].file.name if name in tensors else None
        if said != found:
            raise InputError(
                f"{index}: {name}: the index says {said}, the files say {found}; "
                "index and files are of different models"
            )


def _check(directory: Path, a: Architecture, table: list[_Weight], tensors: dict) -> None:
    """Every weight is there once, with its shape, in a float dtype, and nothing else is."""
    expected = {name: row for row in table for name in row.names(a.num_hidden_layers)}
    if a.tie_word_embeddings and _HEAD in tensors:
        expected[_HEAD] = expected[_EMBEDDING]
        if not np.array_equal(tensors[_HEAD].read(), tensors[_EMBEDDING].read()):
            raise InputError(
                f"{tensors[_HEAD].file}: {_HEAD}: differs from {_EMBEDDING}, but config.json says "
                "tie_word_embeddings=true; set it to false"
            )
    missing = [name for name in expected if name not in tensors]
    if missing:
        hint = "; or tie_word_embeddings must be true" if missing[0] == _HEAD else ""
        raise InputError(
            f"{directory}: {missing[0]}: missing ({len(missing)} of {len(expected)} weights are); "
            f"complete the copy{hint}"
        )
    for name, tensor in tensors.items():
        if name.endswith(_CONSTANT):
            continue
        if name not in expected:
            raise InputError(f"{tensor.file}: {name}: no weight of a {a.family} of this config")
        shape = expected[name].file_shape()
        if tensor.shape != shape:
            raise InputError(
                f"{tensor.file}: {name}: shape {tensor.shape}, but {_CONFIG} makes it {shape}"
            )
        if tensor.dtype not in ("F32", "BF16", "F16"):
            raise InputError(f"{tensor.file}: {name}: dtype {tensor.dtype}; store F32, BF16 or F16")


# --- writing -------------------------------------------------------------------------------------


def write_directory(
    directory: Path,
    architecture: Architecture,
    params: dict,
    *,
    dtype: StoredDtype = "float32",
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    copy_tokenizer: Callable[[Path], object] | None = None,
) -> None:
    """Write a directory that transformers loads: config, generation config and weights in `dtype`.

    `copy_tokenizer(folder)` may add files of its own. Everything goes to a new folder that is
    renamed at the end, so that `directory` holds all of it or does not exist. Raises InputError
    when it exists and is not empty, when it cannot be written, and on params that do not fit.
    """
    directory = Path(os.path.abspath(directory))
    config = _config_json(architecture, dtype, bos_token_id, eos_token_id)
    generation = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    temporary = directory.parent / f".{directory.name}.{os.getpid()}.partial"
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise InputError(f"{directory}: exists and is not empty; give a new folder")
        tensors = _to_tensors(architecture, params, dtype)
        temporary.mkdir(parents=True)
        _write_json(temporary / _CONFIG, config)
        _write_json(temporary / "generation_config.json", generation)
        save_file(tensors, temporary / _SINGLE, metadata={"format": "pt"})
        if copy_tokenizer is not None:
            copy_tokenizer(temporary)
        temporary.rename(directory)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{directory}: cannot be written: {_line(error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _to_tensors(a: Architecture, params: dict, dtype: StoredDtype) -> dict[str, np.ndarray]:
    """Contiguous tensors by their names in the file."""
    found = dict(_leaves(params))
    table = _weights(a)
    for path in sorted(found.keys() ^ {row.path for row in table}):
        state = "no weight" if path in found else "missing, though a weight"
        raise InputError(f"params: {'.'.join(path)}: {state} of a {a.family} of this architecture")
    tensors = {}
    for row in table:
        shape = row.params_shape(a.num_hidden_layers)
        weight = np.asarray(found[row.path])
        if weight.shape != shape:
            name = ".".join(row.path)
            raise InputError(f"params: {name}: shape {weight.shape}; the architecture: {shape}")
        names = row.names(a.num_hidden_layers)
        layers = weight.reshape(len(names), *row.shape)
        for name, layer in zip(names, layers, strict=True):
            tensors[name] = _convert(name, row.to_file(layer), dtype)
    return tensors


def _convert(name: str, tensor: np.ndarray, dtype: StoredDtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(tensor.astype(jnp.dtype(dtype)))
    if np.any(np.isinf(stored) & np.isfinite(tensor)):
        raise InputError(f"{name}: holds values too large for {dtype}; write bfloat16 or float32")
    return stored


def _leaves(tree: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        here = (*path, str(key))
        if isinstance(value, dict):
            yield from _leaves(value, here)
        else:
            yield here, value


# --- files and errors ----------------------------------------------------------------------------


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; give a Hugging Face model directory") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {_line(error)}") from None
    except ValueError as error:
        raise InputError(f"{file}: must be JSON: {_line(error)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: must be a JSON object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return result


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


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


def _line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())
