"""A tiny decoder and made-up groups for the tests of training."""

from functools import partial

import jax
import numpy as np
from flax import nnx

from nrt_jax.config.architecture import Architecture
from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.models.decoder import Decoder
from nrt_jax.training.batch import NrtBatch, group_lengths, nrt_batch
from nrt_jax.training.forward import NrtSettings
from nrt_jax.training.packing import Layout, Packer
from nrt_jax.training.update import Metrics, add_micro_batch, zero_total
from nrt_jax.types import Example, Group, TokenizedExample, Trace

VOCAB, EOS, THINK_START, THINK_END = 16, 1, 2, 3
ARCHITECTURE = Architecture(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    initializer_range=0.3,
)


def tiny_decoder(**kwargs) -> tuple[nnx.GraphDef, dict]:
    """Definition and weights of a decoder whose probabilities are far from uniform."""
    definition, state = nnx.split(Decoder(ARCHITECTURE, nnx.Rngs(0), **kwargs))
    return definition, nnx.to_pure_dict(state)


def abstract_state() -> nnx.State:
    """Shapes and logical axes of the weights."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(ARCHITECTURE, nnx.Rngs(0))))[1]


def settings(definition: nnx.GraphDef, *, temperature: float = 1.0, chunk=4096, **objective):
    """Loss settings with a length constant of 8."""
    config = ObjectiveConfig.model_validate({"length_constant": 8.0, **objective})
    return NrtSettings(definition, config, THINK_START, THINK_END, temperature, chunk)


def tokens(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(4, VOCAB, length).astype(np.int32)


def random_groups(prompts: int, traces: int, seed: int = 0) -> list[Group]:
    """Groups of ragged prompts, traces (some empty, some cut by the limit) and answers."""
    rng = np.random.default_rng(seed)
    groups = []
    for index in range(prompts):
        answer = np.append(tokens(rng, rng.integers(1, 5)), EOS).astype(np.int32)
        prompt = tokens(rng, rng.integers(2, 9))
        example = TokenizedExample(Example(index, "q", "a"), prompt, answer)
        groups.append(Group(example, tuple(_trace(rng, k) for k in range(traces))))
    return groups


def _trace(rng: np.random.Generator, k: int) -> Trace:
    length = 0 if k == 1 else int(rng.integers(1, 7))
    end = (THINK_END, THINK_END, EOS, None)[k % 4]
    # Near the policy's own logprobs of this model, so that some ratios are clipped and some not.
    logprobs = rng.uniform(-4, -1, length).astype(np.float32)
    return Trace(tokens(rng, length), logprobs, end, 0.0 if end is None else -1.5)


def random_batch(prompts: int = 4, traces: int = 4, seed: int = 0) -> NrtBatch:
    return batch_of(random_groups(prompts, traces, seed))


def batch_of(groups: list[Group], packer: Packer | None = None) -> NrtBatch:
    """One micro-batch: one group per pack and one completion per row, unless a packer is given."""
    (batch,) = batches_of(groups, packer or Packer(Layout(len(groups), packing=False)))
    return batch


def batches_of(groups: list[Group], packer: Packer) -> list[NrtBatch]:
    """The groups as micro-batches."""
    plans = packer.plan([group_lengths(group) for group in groups])
    think = {"think_start": THINK_START, "think_end": THINK_END}
    return [as_jax(nrt_batch(groups, plan, **think)) for plan in plans]


def summed(loss_fn, params, batches) -> tuple[Metrics, dict]:
    """Metrics and gradient of the sum of the micro-batches' losses, as an update adds them up."""
    add = jax.jit(partial(add_micro_batch, loss_fn))
    total = zero_total(loss_fn, params, batches[0])
    for batch in batches:
        total, _ = add(params, total, batch)
    return total.metrics, total.gradient


def as_jax(tree):
    return jax.tree.map(jax.numpy.asarray, tree)


def wider(rows, extra: int, segments: str):
    """Rows with so many more tokens of padding, which are 7 in every array but that of segments."""

    def pad(name: str, x: jax.Array) -> jax.Array:
        fill = 0 if name == segments else 7
        widths = ((0, 0),) * (x.ndim - 1) + ((0, extra),)
        return jax.numpy.pad(x, widths, constant_values=x.dtype.type(fill))

    return type(rows)(*(pad(name, x) for name, x in rows._asdict().items()))
