"""The `data.hard_tokens` section: long answers in which few tokens are hard."""

import math

from pydantic import Field, model_validator

from nrt_jax.config.load import Section

FEWEST_VALUES, MOST_VALUES = 3, 8


class HardTokensConfig(Section):
    """The built-in task of the paper's regime: fixed sentences, each with one computed word."""

    answer_tokens: int = Field(default=60, ge=60, le=200)
    """Length of an answer in tokens, eos aside. Sentences of equal length make the sum that is
    nearest to it."""
    hard_share: float = Field(default=0.05, gt=0, le=0.14)
    """Share of the answer's tokens that are computed, a digit or a name, one per sentence. With
    answer_tokens it must make 3 to 8 of them."""
    hops: int = Field(default=3, ge=1, le=8)
    """Additions modulo 10 from the question to each computed word."""
    rows: int = Field(default=100_000, ge=1, le=2**31 - 1)
    """Training rows of an epoch; each is generated when it is read."""
    worked_rows: int = Field(default=0, ge=0)
    """hard_documents: number of first rows that all show the worked steps (a curriculum)."""
    worked_share: float = Field(default=0.3, ge=0, le=1)
    """hard_documents: share of documents that show the worked steps."""
    nothing_share: float = Field(default=0.3, ge=0, le=1)
    """hard_documents: share with nothing between question and answer."""
    noise_share: float = Field(default=0.2, ge=0, le=1)
    """hard_documents: share with random filler words."""
    copy_share: float = Field(default=0.2, ge=0, le=1)
    """hard_documents: share with a copied part of the question."""

    @property
    def values(self) -> int:
        """How many computed words, and so sentences, an answer has."""
        return round(self.answer_tokens * self.hard_share)

    @model_validator(mode="after")
    def _three_to_eight_values(self) -> "HardTokensConfig":
        if not FEWEST_VALUES <= self.values <= MOST_VALUES:
            nearest = min(max(self.values, FEWEST_VALUES), MOST_VALUES)
            raise ValueError(
                f"answer_tokens={self.answer_tokens} and hard_share={self.hard_share:g} make "
                f"{self.values} computed words, which must be {FEWEST_VALUES} to {MOST_VALUES}; "
                f"hard_share={nearest / self.answer_tokens:.3f} makes {nearest}"
            )
        return self

    @model_validator(mode="after")
    def _shares_sum_to_one(self) -> "HardTokensConfig":
        shares = (self.worked_share, self.nothing_share, self.noise_share, self.copy_share)
        if not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise ValueError(
                f"worked_share, nothing_share, noise_share and copy_share sum to {sum(shares):g}; "
                "they must sum to 1"
            )
        return self
