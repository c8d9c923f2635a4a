"""The `compilation` section: compiled programs that outlive a process."""

from pydantic import Field

from nrt_jax.config.load import CacheFolder, Section


class CompilationConfig(Section):
    """Compiled programs that outlive a process, also of `generate` and `serve`."""

    cache: CacheFolder = "auto"
    """Folder of compiled programs, which the next start reads instead of compiling; auto for
    nrt_jax/compiled in the user's cache folder (XDG_CACHE_HOME, else ~/.cache), off for none. A
    setting of jax itself, such as JAX_COMPILATION_CACHE_DIR, wins."""
    cache_gb: float = Field(default=2.0, gt=0, le=1e6)
    """Gigabytes that the folder may hold; programs that were not used for longest make room."""
