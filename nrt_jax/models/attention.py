"""Grouped-query attention over a sequence's own tokens and an optional shared prefix.

Letters: P prompts, B = P * K sequences (the K sequences of one prompt are neighbours), T tokens,
S prefix tokens, H key/value heads, G query heads per key/value head, d head dim. `queries` are the
K * T queries of one prompt.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class KVPrefix(NamedTuple):
    """Keys and values of tokens before a sequence, in one layer or (with leading L) in all.

    A row may hold several prompts, each with its own segment id; 0 is padding.
    """

    k: Float[Array, "*L P S H d"]
    v: Float[Array, "*L P S H d"]
    positions_PS: Int[Array, "P S"]
    segment_ids_PS: Int[Array, "P S"]


def own_mask(
    positions_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"], window: int | None
) -> Bool[Array, "B T T"]:
    """True where query t may see key s: not later, of its own segment, and inside the window.

    Segment 0 is padding, which no query sees. With segments [1 1 2 0] and no window, query by
    query: [1 0 0 0], [1 1 0 0], [0 0 1 0], [0 0 0 0].
    """
    order = jnp.arange(positions_BT.shape[1])
    mask_BTT = (order[:, None] >= order[None, :])[None] & (segment_ids_BT != 0)[:, None, :]
    mask_BTT &= segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return mask_BTT & _inside(positions_BT[:, :, None], positions_BT[:, None, :], window)


def segment_positions(segment_ids_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions from 0 within each run of one segment: [0 1 1 2 2 2] gives [0 0 1 0 1 2]."""
    order_1T = jnp.arange(segment_ids_BT.shape[1])[None]
    before_BT = jnp.pad(segment_ids_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    starts_BT = jnp.where(segment_ids_BT != before_BT, order_1T, 0)
    return order_1T - jax.lax.cummax(starts_BT, axis=1)


def prefix_mask(
    positions_BT: Int[Array, "B T"],
    prefix_segment_ids_BT: Int[Array, "B T"],
    key_positions_PS: Int[Array, "P S"],
    key_segment_ids_PS: Int[Array, "P S"],
    window: int | None,
) -> Bool[Array, "P queries S"]:
    """True where a query may see a prefix key: a key of the segment that it continues.

    The prefix is before every query. With the prefix's segments [1 1 2 0], a query that continues
    1 sees [1 1 0 0], one that continues 2 sees [0 0 1 0], and one of padding, 0, sees nothing.
    """
    P = key_positions_PS.shape[0]
    positions = positions_BT.reshape(P, -1, 1)
    continued = prefix_segment_ids_BT.reshape(P, -1, 1)
    mask = (continued == key_segment_ids_PS[:, None, :]) & (continued != 0)
    return mask & _inside(positions, key_positions_PS[:, None, :], window)


def _inside(query: Int[Array, "..."], key: Int[Array, "..."], window: int | None) -> Array:
    return jnp.bool_(True) if window is None else query - key < window


def attend(
    q_BTHGd: Float[Array, "B T H G d"],
    k_BTHd: Float[Array, "B T H d"],
    v_BTHd: Float[Array, "B T H d"],
    mask_BTT: Bool[Array, "B T T"],
    prefix: KVPrefix | None = None,
    mask_P_queries_S: Bool[Array, "P queries S"] | None = None,
) -> Float[Array, "B T H G d"]:
    """softmax(q k / sqrt(d)) v over [prefix ; own tokens], softmax in float32.

    The keys of the prefix are never copied to the K sequences that share it.
    """
    B, T, H, G, d = q_BTHGd.shape
    scale = d**-0.5
    scores = jnp.einsum("bthgd,bshd->bhgts", q_BTHGd, k_BTHd, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BTT[:, None, None], scores * scale, jnp.finfo(jnp.float32).min)
    if prefix is None or mask_P_queries_S is None:
        weights = jax.nn.softmax(scores, axis=-1).astype(v_BTHd.dtype)
        return jnp.einsum("bhgts,bshd->bthgd", weights, v_BTHd)

    P, S = prefix.positions_PS.shape
    K = B // P
    before = jnp.einsum(
        "pqhgd,pshd->phgqs",
        q_BTHGd.reshape(P, K * T, H, G, d),
        prefix.k,
        preferred_element_type=jnp.float32,
    )
    before = jnp.where(mask_P_queries_S[:, None, None], before * scale, jnp.finfo(jnp.float32).min)
    before_BHGTS = before.reshape(P, H, G, K, T, S).transpose(0, 3, 1, 2, 4, 5)
    before_BHGTS = before_BHGTS.reshape(B, H, G, T, S)
    weights = jax.nn.softmax(jnp.concatenate([before_BHGTS, scores], axis=-1), axis=-1)
    weights = weights.astype(v_BTHd.dtype)
    own_BTHGd = jnp.einsum("bhgts,bshd->bthgd", weights[..., S:], v_BTHd)
    weights_PHGKTS = weights[..., :S].reshape(P, K, H, G, T, S).transpose(0, 2, 3, 1, 4, 5)
    before = jnp.einsum("phgqs,pshd->pqhgd", weights_PHGKTS.reshape(P, H, G, K * T, S), prefix.v)
    return own_BTHGd + before.reshape(B, T, H, G, d)
