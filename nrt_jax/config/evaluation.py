"""The `evaluation` section: exact match on held-out examples."""

from pydantic import Field

from nrt_jax.config.load import Section


class EvaluationConfig(Section):
    """Exact match on held-out examples while training."""

    every_steps: int = Field(default=100, ge=1)
    """Steps between evaluations; the first is before training and the last after the last step."""
    examples: int = Field(default=512, ge=0)
    """Held-out examples to answer; 0 for no evaluation."""
    max_answer_tokens: int = Field(default=64, ge=1)
    """Longest answer to generate, in tokens."""
    trace_temperature: float = Field(default=0.0, ge=0)
    """Temperature of the traces; 0 is greedy, 1 samples as training does. Answers are greedy."""
    score_references: bool = False
    """Also score the reference answer after each trace (eval/reward and others); not for sft."""
    samples: int = Field(default=10, ge=0)
    """Examples whose trace and answer are written to samples.jsonl."""
