"""The `evaluation` section: exact match on held-out examples, and benchmarks."""

from difflib import get_close_matches
from typing import Any

from pydantic import Field, field_validator

from nrt_jax.config.load import MOST_TOKENS, LocalPath, Section

EXTRACTS = ("whole", "last_number", "boxed", "choice", "any_of")
AFTER = "after:"
EVALUATION_METRICS = (
    "eval/exact_match",
    "eval/trace_tokens",
    "eval/think_end_share",
    "eval/reward",
    "eval/baseline",
    "eval/reference_logprob",
    "eval/trace_gain",
    "eval/shuffled_gain",
)
"""What an evaluation can measure: the reward, the baseline and the reference's logprob with
score_references alone, the gains with reference_rows above 0."""


class EvaluationConfig(Section):
    """Exact match on held-out examples, and benchmarks, while training."""

    every_steps: int = Field(default=100, ge=1)
    """Steps between evaluations; the first is before training and the last after the last step."""
    examples: int = Field(default=512, ge=0)
    """Held-out examples to answer; 0 for no evaluation."""
    max_answer_tokens: int = Field(default=64, ge=1, le=MOST_TOKENS)
    """Longest answer to generate, in tokens."""
    extract: str = "whole"
    """What of an answer is compared with the reference: whole, last_number, boxed (the last
    \\boxed), choice (a letter), after:TEXT (the line after the last TEXT), or any_of (the whole,
    without case, punctuation and articles)."""
    trace_temperature: float = Field(default=0.0, ge=0)
    """Temperature of the traces; 0 is greedy, 1 samples as training does. Answers are greedy."""
    score_references: bool = False
    """Also score the reference answer after each trace (eval/reward and others); not for sft."""
    reference_rows: int = Field(default=64, ge=0)
    """Examples whose reference answer is scored token by token, after the trace, the empty trace
    and another question's trace: eval/trace_gain, eval/shuffled_gain, and references/ in the run
    directory, which reports read; 0 for none."""
    samples: int = Field(default=10, ge=0)
    """Examples whose trace and answer are written to samples.jsonl."""

    suite: tuple[str, ...] = ()
    """Benchmarks to ask at every evaluation too, such as [gsm8k, ifeval]; they need the extra
    `eval`."""
    suite_limit: int | None = Field(default=100, ge=1)
    """Documents of each, the first ones; null for all."""
    suite_data: LocalPath | None = None
    """Folder with a folder per benchmark; null asks the Hugging Face hub."""

    @field_validator("extract", mode="before")
    @classmethod
    def _read_as_yaml(cls, value: Any) -> Any:
        # YAML reads `after: TEXT`, with a space and without quotes, as a mapping.
        if isinstance(value, dict) and list(value) == ["after"]:
            return f"{AFTER}{'' if value['after'] is None else value['after']}"
        return value

    @field_validator("extract")
    @classmethod
    def _known_extract(cls, value: str) -> str:
        kind, colon, text = value.partition(":")
        if value in EXTRACTS or (kind + colon == AFTER and text.strip()):
            return value
        if kind == AFTER.removesuffix(":"):
            raise ValueError("needs the text in front of the answer, as in after:####")
        near = get_close_matches(kind.lower(), [*EXTRACTS, "after"], n=1)
        meant = near[0].replace("after", "after:TEXT") if near else None
        hint = f"; did you mean {meant!r}?" if meant else ""
        raise ValueError(f"must be one of {', '.join(EXTRACTS)}, after:TEXT{hint}")
