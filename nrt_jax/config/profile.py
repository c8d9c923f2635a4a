"""The `profile` section: which steps are traced."""

from typing import Annotated

from pydantic import Field

from nrt_jax.config.load import Section


class ProfileConfig(Section):
    """Traces of the devices and of the host, for xprof."""

    steps: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Steps of which a trace is written to profile/ in the run directory, such as [20, 100]. The
    first steps compile, so that later ones say more."""
