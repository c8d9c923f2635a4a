"""The `compilation` section: compiled programs that outlive a process."""

from typing import Any, Literal

from pydantic import Field, field_validator

from nrt_jax.config.load import ConfigPath, Section


class CompilationConfig(Section):
    """Compiled programs that outlive a process, also of `generate` and `serve`."""

    cache: Literal["auto", "off"] | ConfigPath = Field(default="auto", union_mode="left_to_right")
    """Folder of compiled programs, which the next start reads instead of compiling; auto for
    nrt_jax/compiled in the user's cache folder (XDG_CACHE_HOME, else ~/.cache), off for none. A
    setting of jax itself, such as JAX_COMPILATION_CACHE_DIR, wins."""
    cache_gb: float = Field(default=2.0, gt=0, le=1e6)
    """Gigabytes that the folder may hold; programs that were not used for longest make room."""

    @field_validator("cache", mode="before")
    @classmethod
    def _no_switch(cls, value: Any) -> Any:
        """An override is text, and a folder with the name of a switch is hardly meant."""
        if str(value).lower() in ("false", "true", "no", "yes", "on", "none", "null", "0", "1"):
            raise ValueError("must be 'auto' or 'off' or a folder")
        return value
