"""Parts b and e of accelerator.py: an update of a 1B-shaped model, its rate and its memory."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import Machine
from benchmarks.shapes import LLAMA_1B
from nrt_jax.checkpoints.abstract_model import training_definition
from nrt_jax.checkpoints.train_state import TrainState, init_state, state_shardings
from nrt_jax.chips import Chip
from nrt_jax.config.architecture import Architecture
from nrt_jax.config.run import RunConfig
from nrt_jax.models.decoder import abstract_decoder
from nrt_jax.models.flops import Rows, forward_flops
from nrt_jax.models.sharding import abstract_params, make_mesh
from nrt_jax.planning.memory import USABLE, memory
from nrt_jax.planning.setting import Setting, resolve
from nrt_jax.topologies import Topology
from nrt_jax.training.batch import sft_batch, sft_lengths
from nrt_jax.training.optimizer import make_optimizer
from nrt_jax.training.packing import Packer
from nrt_jax.training.setup import layout_on
from nrt_jax.training.sft import sft_loss_of_rows
from nrt_jax.training.update import Update, UpdateRule
from nrt_jax.types import Example, TokenizedExample

GOAL_MFU = 0.45
PROMPT_TOKENS = 128


class Sizes(NamedTuple):
    """The model, and the rows of a micro-batch."""

    architecture: Architecture
    dtype: str
    rows: int
    row_tokens: int
    micro_batches: int
    """Of the longer of the two updates whose difference is timed."""


FULL = Sizes(LLAMA_1B, "bfloat16", rows=2, row_tokens=4096, micro_batches=9)
TINY = Sizes(
    LLAMA_1B.model_copy(
        update={
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        }
    ),
    # XLA has no bfloat16 product of this form on CPUs.
    "float32",
    rows=2,
    row_tokens=160,
    micro_batches=2,
)


def measure(sizes: Sizes, machine: Machine, chip: Chip) -> dict[str, Any]:
    """Seconds of a micro-batch's gradient, MFU by the matmul rate measured here, peak memory."""
    setting = _that_fits(sizes, chip)
    compiled: list[int] = []
    update, state, batch = _prepare(setting, sizes, compiled)
    state, (one, many) = _seconds(update, state, batch, (1, sizes.micro_batches))
    seconds = (many - one) / (sizes.micro_batches - 1)
    rows = sizes.rows * sizes.row_tokens
    # Each token sees itself and those before it; two gradients for each product.
    seen = Rows(rows, (sizes.row_tokens + 1) / 2, rows)
    flops = 3 * forward_flops(setting.architecture, seen).total
    planned = memory(setting)
    peak, source = _peak(sum(x.nbytes for x in jax.tree.leaves(state)), compiled)
    return {
        "layers": setting.architecture.num_hidden_layers,
        "rows": sizes.rows,
        "row_tokens": sizes.row_tokens,
        "attention": setting.attention,
        "remat": setting.config.model.remat,
        "micro_batch_s": seconds,
        "tokens_per_s": rows / seconds,
        "model_flops": flops,
        "mfu": flops / seconds / machine.flops,
        "goal_mfu": GOAL_MFU,
        "peak_bytes": peak,
        "peak_from": source,
        "planned_bytes": planned.total,
        "peak_over_planned": peak / planned.total,
    }


def _that_fits(sizes: Sizes, chip: Chip) -> Setting:
    """The run on one device, with fewer layers where the plan says that it would not fit."""
    architecture = sizes.architecture
    while True:
        config = _config(sizes, architecture)
        setting = resolve(config, Topology("here", chip._replace(devices=1), 1, 1))
        layers = architecture.num_hidden_layers
        if layers == 1 or memory(setting).total <= USABLE * chip.memory / chip.devices:
            return setting
        architecture = architecture.model_copy(update={"num_hidden_layers": layers // 2})


def _config(sizes: Sizes, architecture: Architecture) -> RunConfig:
    prompt = min(PROMPT_TOKENS, sizes.row_tokens // 2)
    return RunConfig.model_validate(
        {
            "method": "sft",
            "model": {
                "architecture": architecture.model_dump(),
                "dtype": sizes.dtype,
                "vocab_multiple": 1,
            },
            "data": {
                "source": "chain_addition",
                # Nothing reads it: the rows are drawn ids.
                "tokenizer": "none",
                "max_prompt_tokens": prompt,
                "max_answer_tokens": sizes.row_tokens + 1 - prompt,
            },
            "train": {
                "batch_prompts": sizes.rows,
                "mini_batch_prompts": sizes.rows,
                "micro_batch_prompts": sizes.rows,
            },
        }
    )


def _prepare(setting: Setting, sizes: Sizes, compiled: list[int]) -> tuple[Update, TrainState, Any]:
    """The update, its state with drawn weights, and a micro-batch of whole rows."""
    config, a = setting.config, setting.architecture
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    definition = training_definition(config, a, mesh)
    shapes = abstract_params(mesh, abstract_decoder(a, dtype=config.model.dtype), jnp.float32)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    params = jax.jit(partial(_drawn, shapes), out_shardings=shardings)(jax.random.key(0))
    optimizer = make_optimizer(config.optimizer, updates=100)
    rule = UpdateRule(optimizer, state_shardings(optimizer, params, mesh))
    state = init_state(optimizer, params, rule.shardings)

    def loss_fn(params: Any, inputs: Any) -> Any:
        rows, answer_tokens = inputs
        chunk_tokens = config.model.logprob_chunk_tokens
        return sft_loss_of_rows(params, rows, answer_tokens, definition, chunk_tokens)

    def add_memory(name: str, program: jax.stages.Compiled) -> None:
        del name
        analysis = program.memory_analysis()
        compiled.append(0 if analysis is None else int(analysis.temp_size_in_bytes))

    rng = np.random.default_rng(0)
    prompt = config.data.max_prompt_tokens
    examples = [
        TokenizedExample(Example(i, "", ""), row[:prompt], row[prompt:])
        for i, row in enumerate(
            rng.integers(0, a.vocab_size, (sizes.rows, sizes.row_tokens + 1), np.int32)
        )
    ]
    packer = Packer(layout_on(config, a, setting.mesh))
    (plan,) = packer.plan([sft_lengths(example) for example in examples])
    batch = jax.device_put((sft_batch(examples, plan), np.float32(sizes.rows * sizes.row_tokens)))
    return Update(loss_fn, rule, add_memory), state, batch


def _drawn(shapes: Any, key: jax.Array) -> Any:
    """Normal weights of a standard deviation of 0.02, and ones for the norms."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    drawn = [
        jnp.ones(x.shape, x.dtype)
        if "norm" in jax.tree_util.keystr(path)
        else 0.02 * jax.random.normal(k, x.shape, x.dtype)
        for k, (path, x) in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


def _seconds(
    update: Callable[..., Any], state: TrainState, batch: Any, counts: tuple[int, ...]
) -> tuple[TrainState, list[float]]:
    """Shortest of two times of an update of so many micro-batches each, after one that compiles."""
    state, metrics = jax.block_until_ready(update(state, [batch]))
    shortest = []
    for count in counts:
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(update(state, [batch] * count))
            seconds.append(time.perf_counter() - start)
        shortest.append(min(seconds))
    assert int(metrics["update/skipped"]) == 0, "the gradient is not finite"
    return state, shortest


def _peak(state_bytes: int, temporaries: list[int]) -> tuple[int, str]:
    """Most bytes in use on the device so far, and who says so."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "the device"
    # Weights and their two moments are the state; the gradient is a third of it.
    return state_bytes * 4 // 3 + max(temporaries), "the compiled programs"
