"""A judge of traces: a model behind an OpenAI-compatible server scores each (Appendix H).

A score is what the judge says in JSON, from 0 to 1. A refusal, and a reply that cannot be read as a
score, are counted as what they are and never scored.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nrt_jax.atomic_files import write_atomically
from nrt_jax.evaluation.chat_client import ChatClient, ServerRefused
from nrt_jax.strict_json import parse_json

SUMMARY_FILE = "judge.json"
JUDGED = "judged"
"""The folder in a run directory where reports look for judgements of its checkpoints."""
ROWS = 100
"""N of Appendix H."""
TRIES = 3
"""How often a judge is asked whose replies cannot be read."""
AT_ONCE = 8
"""Requests under way."""
_REFUSED = {400, 413, 422}
"""With these a server refuses what one request holds: its content filter, or its length."""

# The text of the paper's Table 8. Of the fences that it is printed in, the outer ones are layout.
PROMPT = """\
You are verifying the *reasoning process* quality, not the final answer formatting.

Score the quality of the thought process for the given reasoning trace. Focus on:

1. Logical coherence and absence of contradictions.
2. Faithfulness to the provided problem statement.
3. Correct mathematical or algorithmic steps (even if arithmetic slips occur later).
4. Absence of hallucinated facts or unjustified leaps.

Return JSON with fields:

{
  "score": float in [0, 1],
  "justification": "one paragraph that cites concrete issues or strengths",
  "flags": ["optional short tags such as `hallucination`, `missing-step`, ..."]
}

Problem:

```
{problem}
```

Model reasoning trace:

```
{reasoning}
```

Ground-truth answer:

```
{ground_truth}
```

Give higher scores when the reasoning is consistent and well-grounded, and lower scores when it is \
self-contradictory, irrelevant, or clearly flawed."""


class Judged(NamedTuple):
    """What a judge reads."""

    problem: str
    """x."""
    reasoning: str
    """z."""
    ground_truth: str
    """y*."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of asking a judge about one trace."""

    outcome: Literal["scored", "refused", "unreadable"]
    score: float | None = None
    """0 to 1; None unless scored."""
    justification: str = ""
    flags: tuple[str, ...] = ()
    replies: tuple[str, ...]
    """Every reply, as it came; that of a refusal may be the server's error."""


def fill(judged: Judged) -> str:
    """The prompt for one trace; braces in its texts stay as they are."""
    texts = judged._asdict()
    return re.sub(r"\{(problem|reasoning|ground_truth)\}", lambda found: texts[found[1]], PROMPT)


def read_score(reply: str) -> dict[str, Any]:
    """`score`, `justification` and `flags` of a reply; ValueError where it holds no such object.

    There may be other text before and after the object, such as a fence. A score must be a number
    from 0 to 1; the other fields may be missing.
    """
    start, end = reply.find("{"), reply.rfind("}")
    if start < 0 or end < start:
        raise ValueError("holds no JSON object")
    content = parse_json(reply[start : end + 1])
    score = content.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise ValueError(f"score is {score!r:.40}, not a number from 0 to 1")
    justification, flags = content.get("justification", ""), content.get("flags", [])
    if not isinstance(justification, str) or not isinstance(flags, list):
        raise ValueError("justification must be a text and flags a list")
    return {
        "score": float(score),
        "justification": justification,
        "flags": tuple(map(str, flags)),
    }


class Judge:
    """Asks about traces and keeps every final reply in a folder, by a digest of what was asked."""

    def __init__(self, client: ChatClient, folder: Path):
        self._client, self._folder = client, folder

    def verdicts(self, judged: Sequence[Judged]) -> Iterator[tuple[int, Verdict]]:
        """The index and the verdict of each trace, as they come, several at once.

        Raises ServerGone, and ServerRefused for a server that refuses them all, as without a key;
        what came before is kept.
        """
        places: dict[Judged, list[int]] = {}
        for index, item in enumerate(judged):
            places.setdefault(item, []).append(index)
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            waiting = {pool.submit(self.verdict, item): item for item in places}
            for done in as_completed(waiting):
                verdict = done.result()
                yield from ((index, verdict) for index in places[waiting[done]])
        finally:
            pool.shutdown(cancel_futures=True)

    def verdict(self, judged: Judged) -> Verdict:
        """The verdict on one trace, from the folder where it is known; a refusal is known too."""
        file = self._file(judged)
        if file.exists():
            return _read(file)
        verdict = self._ask(fill(judged))
        if verdict.outcome != "unreadable":
            self._folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(asdict(verdict), indent=1, ensure_ascii=False) + "\n"
            write_atomically(file, text.encode(errors="replace"))
        return verdict

    def _ask(self, prompt: str) -> Verdict:
        replies: tuple[str, ...] = ()
        for _ in range(TRIES):
            try:
                reply = self._client.complete([{"role": "user", "content": prompt}], temperature=0)
            except ServerRefused as error:
                if error.status not in _REFUSED:
                    raise
                return Verdict(outcome="refused", replies=(*replies, str(error)))
            if reply.refusal is not None:
                return Verdict(outcome="refused", replies=(*replies, reply.refusal))
            replies = (*replies, reply.text)
            try:
                return Verdict(outcome="scored", replies=replies, **read_score(reply.text))
            except ValueError:
                continue
        return Verdict(outcome="unreadable", replies=replies)

    def kept(self, judged: Sequence[Judged]) -> int:
        """How many of the traces have a verdict in the folder."""
        return sum(self._file(item).exists() for item in judged)

    def _file(self, judged: Judged) -> Path:
        text = json.dumps([self._client.model, fill(judged)])
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _read(file: Path) -> Verdict:
    content = json.loads(file.read_text(encoding="utf-8"))
    lists = {name: tuple(content[name]) for name in ("flags", "replies")}
    return Verdict(**content | lists)
