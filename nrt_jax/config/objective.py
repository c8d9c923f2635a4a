"""The `objective` section: the reward, the advantages and the loss terms."""

from typing import Literal

from pydantic import Field, model_validator

from nrt_jax.config.load import Section
from nrt_jax.config.schemes import SchemeName

WsNormalisation = Literal["mean", "sum", "normalised"]
Estimator = Literal["grpo", "grpo_unclipped", "rloo", "clip01", "dr_grpo"]
PolicyLoss = Literal["ppo_clip", "cispo"]
FormatWhere = Literal["all", "not_emitted", "natural_end"]


class ObjectiveConfig(Section):
    """What is maximised: the reward of a trace, how traces are compared, and the loss terms."""

    scheme: SchemeName = "ws_neg_log_p"
    """How the probabilities c_1..c_T of the reference answer become the reward R (Table 1)."""
    ws_normalisation: WsNormalisation = "sum"
    """Scale of the weights of the weighted schemes: unchanged (Table 2), divided by T, or summing
    to 1."""
    weight_cap: float | None = Field(default=1e4, gt=0)
    """Largest raw weight of the weighted schemes, before normalisation; null for no cap."""
    estimator: Estimator = "grpo"
    """How the rewards of the K traces of one prompt become advantages (Eq. 9 and 10)."""
    policy_loss: PolicyLoss = "ppo_clip"
    """The trace term: clipped surrogate of PPO and GRPO, or CISPO."""
    clip_low: float = Field(default=0.2, ge=0, le=1)
    """Token ratios below 1 - clip_low are clipped."""
    clip_high: float = Field(default=0.28, ge=0)
    """Token ratios above 1 + clip_high are clipped."""
    token_signal: Literal["derived", "fixed"] = "derived"
    """Weight S_i of each answer token: (df/dc_i) c_i, or 1 (cross-entropy after the trace)."""
    trace_covers: Literal["z", "z_and_end"] = "z"
    """Tokens of the trace term: the trace alone, or also the token that ends it."""
    format_where: FormatWhere = "all"
    """all: both think tokens of every trace are in the format loss; not_emitted: only the end of
    traces that did not emit it; natural_end: the start of every trace, and the end of those that
    the limit did not cut."""
    format_coefficient: float = Field(default=0.3, ge=0)
    """Weight of the format loss (Eq. 11)."""
    length_constant: float = Field(default=4096.0, gt=0)
    """Divides the token sums of the trace, answer-token and format terms."""
    kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the reference policy."""
    entropy_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus on the tokens of the trace."""
    token_ratio: Literal["none", "trace"] = "none"
    """Importance ratio on the token term: none (Algorithm 1) or the trace's r_k (Eq. 23)."""
    token_ratio_cap: float = Field(default=2.0, ge=1)
    """r_k on the token term is truncated at this value."""
    importance_cap: float | None = Field(default=None, gt=0)
    """Largest importance weight between recomputed and sampler logprobs; null for no weight."""
    reward_policy: Literal["current", "sampling"] = "current"
    """Whose probabilities give R: the current weights, or those that sampled the traces."""
    old_logprobs: Literal["sampler", "recompute"] = "sampler"
    """Source of the ratio's old logprobs: the engine, or another forward pass of the trainer."""

    @model_validator(mode="after")
    def _importance_needs_two_logprobs(self) -> "ObjectiveConfig":
        """The weight compares the trainer's old logprobs with the sampler's, so it needs both."""
        if self.importance_cap is not None and self.old_logprobs != "recompute":
            raise ValueError(
                f"importance_cap={self.importance_cap:g} needs old_logprobs=recompute; "
                "set that, or importance_cap=null"
            )
        return self
