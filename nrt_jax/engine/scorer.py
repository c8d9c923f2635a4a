"""Logprobs of given continuations of prompts, where what prompts have in common is run once.

    prompts        a b c d | e      a b c | f g        (| : what differs)
    prefix         a b c            keys and values, run once
    rows           d e x y          then the prompt's rest with each of its continuations
                   f g u

Letters: R shards of the rows, S prefix tokens, B rows, T tokens of a row, D model dim,
N scored tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from nrt_jax.engine.decode_state import padded, quarter_bucket
from nrt_jax.engine.kv_cache import shards_of
from nrt_jax.engine.programs import launched_in_order, with_decoder
from nrt_jax.models.attention import KVPrefix
from nrt_jax.models.decoder import Decoder
from nrt_jax.models.sharding import constrain

ROW_TOKENS = 2048
"""Tokens of the rows that run together."""
LOGIT_TOKENS = 128
"""Positions whose logits are in memory at a time."""


class Continuation(NamedTuple):
    """Tokens to score after a prompt; both int32 and not empty."""

    prompt_tokens: np.ndarray
    tokens: np.ndarray


class Scored(NamedTuple):
    """log pi(tokens | prompt) in nats, and whether greedy decoding would write them."""

    logprob: float
    is_greedy: bool


class Scorer:
    """Scores continuations with a model; its compiled programs are kept."""

    def __init__(self, definition: nnx.GraphDef, mesh: Mesh):
        self._shards = shards_of(mesh)
        self._prefix = launched_in_order(jax.jit(with_decoder(definition, _run_prefix)), mesh)
        rows = with_decoder(definition, _run_rows, mesh=mesh)
        self._rows = launched_in_order(jax.jit(rows), mesh)
        self._logprobs = launched_in_order(jax.jit(with_decoder(definition, _logprobs)), mesh)

    def score(
        self, params: Any, continuations: Sequence[Continuation]
    ) -> Iterator[tuple[int, Scored]]:
        """The index and the logprob of each continuation, as they come."""
        for group in share_prefixes(continuations):
            prefix = None
            if group.prefix_tokens:
                first = continuations[group.members[0]].prompt_tokens
                prefix = self._run_prefix(params, first[: group.prefix_tokens])
            yield from self._score_group(params, continuations, group, prefix)

    def _run_prefix(self, params: Any, tokens: np.ndarray) -> KVPrefix:
        capacity = quarter_bucket(len(tokens))
        return self._prefix(params, padded(tokens, capacity), np.int32(len(tokens)))

    def _score_group(
        self,
        params: Any,
        continuations: Sequence[Continuation],
        group: "PrefixGroup",
        prefix: KVPrefix | None,
    ) -> Iterator[tuple[int, Scored]]:
        rows = {i: _Row.of(continuations[i], group.prefix_tokens) for i in group.members}
        widest_first = sorted(rows, key=lambda i: (-len(rows[i].inputs), i))
        while widest_first:
            width = quarter_bucket(len(rows[widest_first[0]].inputs))
            fitting = max(1, ROW_TOKENS // width // self._shards) * self._shards
            batch, widest_first = widest_first[:fitting], widest_first[fitting:]
            # Few sizes, so that few programs are compiled.
            per_shard = -(-len(batch) // self._shards)
            size = min(fitting, (1 << (per_shard - 1).bit_length()) * self._shards)
            scored = self._run_rows(params, [rows[i] for i in batch], size, width, prefix)
            yield from zip(batch, scored, strict=True)

    def _run_rows(
        self,
        params: Any,
        rows: Sequence["_Row"],
        size: int,
        width: int,
        prefix: KVPrefix | None,
    ) -> list[Scored]:
        tokens_BT = np.zeros((size, width), np.int32)
        length_B = np.zeros(size, np.int32)
        for b, row in enumerate(rows):
            tokens_BT[b, : len(row.inputs)] = row.inputs
            length_B[b] = len(row.inputs)
        at_N = np.concatenate([b * width + row.scored_at for b, row in enumerate(rows)])
        target_N = np.concatenate([row.targets for row in rows])
        hidden_BTD = self._rows(params, prefix, tokens_BT, length_B)
        # The layers are compiled for the shape of the rows alone.
        logprob_N, greedy_N = self._logprobs(params, hidden_BTD, padded(at_N), padded(target_N))
        ends = np.cumsum([len(row.targets) for row in rows])
        logprobs = np.split(np.asarray(logprob_N, np.float64)[: ends[-1]], ends[:-1])
        greedy = np.split(np.asarray(greedy_N)[: ends[-1]], ends[:-1])
        return [
            Scored(float(logprob.sum()), bool(all_greedy.all()))
            for logprob, all_greedy in zip(logprobs, greedy, strict=True)
        ]


class PrefixGroup(NamedTuple):
    """Continuations whose prompts begin alike."""

    members: list[int]
    prefix_tokens: int
    """That they share; the last token of a prompt is never in it, since its output is scored."""


def share_prefixes(continuations: Sequence[Continuation]) -> list[PrefixGroup]:
    """Groups that run few tokens: one prefix for all, or each distinct prompt with its own.

    Shots that all questions share make the first better, long traces the second.
    """
    by_prompt: dict[bytes, list[int]] = {}
    for i, continuation in enumerate(continuations):
        by_prompt.setdefault(continuation.prompt_tokens.tobytes(), []).append(i)
    apart = [
        PrefixGroup(members, len(continuations[members[0]].prompt_tokens) - 1)
        for members in by_prompt.values()
    ]
    together = PrefixGroup(list(range(len(continuations))), _common(continuations, by_prompt))
    own = sum(len(c.prompt_tokens) - together.prefix_tokens for c in continuations)
    whole = sum(group.prefix_tokens + len(group.members) for group in apart)
    return [together] if together.prefix_tokens + own <= whole else apart


def _common(continuations: Sequence[Continuation], by_prompt: dict[bytes, list[int]]) -> int:
    """How many tokens all prompts begin with in common, the last token of each left out."""
    prompts = [continuations[members[0]].prompt_tokens for members in by_prompt.values()]
    common = min((len(prompt) for prompt in prompts), default=1) - 1
    for prompt in prompts:
        differs = np.nonzero(prompt[:common] != prompts[0][:common])[0]
        common = common if not len(differs) else int(differs[0])
    return common


class _Row(NamedTuple):
    """What runs after a prefix for one continuation."""

    inputs: np.ndarray
    scored_at: np.ndarray
    """Positions of the inputs whose next token is one of `targets`."""
    targets: np.ndarray

    @classmethod
    def of(cls, continuation: Continuation, prefix_tokens: int) -> "_Row":
        rest = continuation.prompt_tokens[prefix_tokens:]
        targets = continuation.tokens
        at = len(rest) - 1 + np.arange(len(targets))
        return cls(np.concatenate([rest, targets[:-1]]), at.astype(np.int32), targets)


def _run_prefix(decoder: Decoder, tokens_S: Int[Array, "S"], length: Int[Array, ""]) -> KVPrefix:
    positions_1S = jnp.arange(tokens_S.shape[0])[None]
    segments_1S = (positions_1S < length).astype(jnp.int32)
    return decoder.hidden(tokens_S[None], positions_1S, segments_1S)[1]


def _run_rows(
    decoder: Decoder,
    prefix: KVPrefix | None,
    tokens_BT: Int[Array, "B T"],
    length_B: Int[Array, "B"],
    *,
    mesh: Mesh,
) -> Float[Array, "B T D"]:
    """Hidden states of rows that continue the prefix."""
    tokens_BT = constrain(tokens_BT, mesh, ("batch", None))
    order_1T = jnp.arange(tokens_BT.shape[1])[None]
    before = 0 if prefix is None else jnp.sum(prefix.segment_ids_PS)
    positions_BT = jnp.broadcast_to(before + order_1T, tokens_BT.shape)
    valid_BT = (order_1T < length_B[:, None]).astype(jnp.int32)
    return decoder.hidden(tokens_BT, positions_BT, valid_BT, prefix)[0]


def _logprobs(
    decoder: Decoder,
    hidden_BTD: Float[Array, "B T D"],
    at_N: Int[Array, "N"],
    target_N: Int[Array, "N"],
) -> tuple[Float[Array, "N"], Bool[Array, "N"]]:
    """log pi of each target after its position in the rows side by side, and if it is the mode."""
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[at_N]

    def at_position(row: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden_D, target = row
        log_pi_V = jax.nn.log_softmax(decoder.logits(hidden_D))
        return log_pi_V[target], jnp.argmax(log_pi_V) == target

    return jax.lax.map(at_position, (hidden_ND, target_N), batch_size=LOGIT_TOKENS)
