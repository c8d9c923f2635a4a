"""Every file that holds a model, read and written."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nrt_jax.checkpoints.open import load_pretrained

__all__ = ["load_pretrained"]


def __getattr__(name: str) -> Any:
    # Found on first use: Orbax takes a second to import, which verbs without weights need not pay.
    if name == "load_pretrained":
        from nrt_jax.checkpoints.open import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
