"""The update rule: clip by the global norm, then AdamW with a learning-rate schedule."""

from collections.abc import Callable

import jax
import optax

from nrt_jax.config.optimizer import OptimizerConfig


def make_schedule(config: OptimizerConfig, updates: int) -> optax.Schedule:
    """Learning rate by update: linear warm-up, then constant or a decay to zero."""
    warmup = round(config.warmup_ratio * updates)
    rest = max(updates - warmup, 1)
    after = {
        "constant": optax.constant_schedule(config.learning_rate),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
    }[config.schedule]
    if not warmup:
        return after
    # The first update has 1/warmup of the rate: with a rate of zero it would do nothing.
    start = config.learning_rate / warmup
    rise = optax.linear_schedule(start, config.learning_rate, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: OptimizerConfig, updates: int) -> optax.GradientTransformation:
    """Clip and AdamW for a run of `updates`."""
    return clipped_adamw(
        config, make_schedule(config, updates), clip_gradient=optax.clip_by_global_norm
    )


def clipped_adamw(
    config: OptimizerConfig,
    schedule: optax.Schedule,
    *,
    clip_gradient: Callable[[float], optax.GradientTransformation],
) -> optax.GradientTransformation:
    """AdamW behind `clip_gradient(optimizer.clip_norm)`; the scales of norms do not decay.

    Where clips have no state, states have the same structure whatever the schedule and the clip.
    """

    def decays(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)

    adamw = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(clip_gradient(config.clip_norm), adamw)
