"""The reward schemes: the names that a config accepts, and what reports and model cards call them.

Their formulas are in `nrt_jax/objective/schemes.py`.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple


class Scheme(NamedTuple):
    """What is known of a scheme without computing it."""

    title: str
    """The method's name in the paper (Table 3), or in its own."""
    reward: str
    """What the reward of a trace is, in a few words."""
    weighted: bool = False
    """Whether the empty trace's probabilities weight the answer tokens (Table 2)."""
    spread: bool = False
    """Whether the spread of a token's log-probability over the traces of its prompt weights it."""
    positive: bool = True
    """Whether R > 0, so that traces can be compared by log R, which does not underflow."""


SCHEMES = {
    "logp": Scheme("JLB", "sum of log-probabilities", positive=False),
    "p": Scheme("VeriFree", "product of probabilities"),
    "am": Scheme("RLPR", "arithmetic mean of probabilities"),
    "gm": Scheme("NRT-GM", "geometric mean of probabilities"),
    "ws_inv_p": Scheme("NRT-WS(1/p)", "weighted sum of probabilities", weighted=True),
    "ws_neg_log_p": Scheme("NRT-WS(−log p)", "weighted sum of probabilities", weighted=True),
    "r3": Scheme("DRO-R3", "weighted mean of log-probabilities", spread=True, positive=False),
}
"""Every scheme by its name in `objective.scheme`."""

# A type checker cannot read names from a table; pydantic can.
if TYPE_CHECKING:
    SchemeName = str
else:
    SchemeName = Literal[tuple(SCHEMES)]
