"""Weights in another form than the safetensors of a Hugging Face directory: what they are."""

from collections.abc import Collection
from pathlib import Path

from nrt_jax.config.run import CONFIG_FILE as RUN_FILE
from nrt_jax.file_kinds import why_missing

_MERGE = (
    "merge it into its base with peft: AutoPeftModelForCausalLM.from_pretrained(ADAPTER)"
    ".merge_and_unload().save_pretrained(OUT)"
)
_PICKLED = (
    "pickled weights are refused, since loading a pickle runs the code in it; convert with "
    "transformers: save_pretrained(..., safe_serialization=True)"
)
_GGUF = "GGUF weights are not read; name the safetensors that they were made from"
_FRAMEWORK = "weights of another framework are not read; convert with transformers: save_pretrained"
_FILES = {
    "adapter_config.json": f"a LoRA adapter is no model; {_MERGE}",
    "adapter_model.*": f"a LoRA adapter is no model; {_MERGE}",
    "*.gguf": _GGUF,
    "*.bin": _PICKLED,
    "*.pt": _PICKLED,
    "*.pth": _PICKLED,
    "*.ckpt": _PICKLED,
    "*.h5": _FRAMEWORK,
    "*.msgpack": _FRAMEWORK,
    "*.onnx": _FRAMEWORK,
    "*.npz": _FRAMEWORK,
}
_STATE_OF_TRAINING = {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
_WRAPPERS = {
    "_orig_mod.": "torch.compile; save the module inside, model._orig_mod",
    "_fsdp_wrapped_module.": "FSDP; save a full state dict of the module inside",
    "_checkpoint_wrapped_module.": "activation checkpointing; save the module inside",
    "base_model.model.": "peft; merge with merge_and_unload() and save the result",
    "module.": "DataParallel and DistributedDataParallel; save the module inside, model.module",
}


def other_weights(directory: Path) -> str | None:
    """A message about what a directory without a model's files has instead, or None."""
    if directory.is_file():
        return f"{directory}: is a file; name its directory"
    files = [file for file in sorted(directory.glob("*")) if file.name not in _STATE_OF_TRAINING]
    for file in (directory, *files):
        if file.is_symlink() and not file.exists():
            return f"{file}: {why_missing(file)}"
    for pattern, told in _FILES.items():
        for file in files:
            if file.match(pattern):
                return f"{file}: {told}"
    if (directory / RUN_FILE).is_file():
        return f"{directory}: is a run, not a model's directory; write one: nrt-jax export RUN OUT"
    return None


def other_name(name: str, expected: Collection[str]) -> str | None:
    """Why a tensor has a name that no weight has, and what to do; None where that is not known.

    `expected` are the names of the model's weights.
    """
    if ".lora_" in name or name.startswith("lora_"):
        return f"a LoRA adapter is no weight; {_MERGE}"
    if name.startswith(("tok_embeddings.", "layers.0.attention.w")):
        return "is a name of the model's original format; name a directory in Hugging Face's format"
    for wrapper, told in _WRAPPERS.items():
        if wrapper in name and name.replace(wrapper, "") in expected:
            return f"the {wrapper!r} in it comes from {told}"
    for known in expected:
        if name.endswith(f".{known}"):
            prefix = name.removesuffix(known)
            return f"the weight must be named {known}; remove {prefix!r} from the names"
        if known.endswith(f".{name}"):
            return f"the weight must be named {known}; save the whole model, with its head"
    return None
