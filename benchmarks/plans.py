"""Plans of every model on every machine, and of published work beside what was measured there.

    python -m benchmarks.plans --out plans.json
    python docs/figures.py plans plans.json

All by formula, in seconds and without an accelerator. The published work: MaxText pretrains
Llama-3.1-8B on 256 chips of v6e, 4 rows of 8,192 tokens per chip, weights over all chips; inputs of
layers and projections of attention are kept in the hosts' memory, where ours recomputes the layer.
NeMo-RL 0.4 makes a GRPO step of Llama-3.1-8B on 16 H100: 64 prompts x 32 samples of 1,060 tokens on
average, 1,192 with their prompts, 4 updates, with the trainer's logprobs and a reference.
"""

import argparse
import json
from pathlib import Path

from nrt_jax.config.load import load_config
from nrt_jax.config.presets import presets
from nrt_jax.config.run import RunConfig
from nrt_jax.errors import InputError
from nrt_jax.planning.plan import Plan, make_plan
from nrt_jax.planning.work import Lengths
from nrt_jax.topologies import parse_topology

TOPOLOGIES = {
    "v5e_64": "v5e:8x8",
    "v5p_32": "v5p:2x4x4",
    "v6e_64": "v6e:8x8",
    "h100x8": "h100x8",
    "h200x8": "h200x8",
    "h100x1": "h100x1",
}
"""That of each preset of hardware/."""
MODELS = ("llama3_2_3b", "mistral_7b_v0_3", "llama3_1_8b", "llama3_1_70b")
"""The presets of models/."""
DATA = ("data/tulu3_200k", "data.path=tulu3/*.parquet")
MAXTEXT = {"tokens_per_second_per_chip": 7207.0, "mfu_percent": 45.46}
NEMO_RL = {"step_s": 97.7, "tokens_per_second_per_chip": 1562.0}
_MAXTEXT_FLOPS = 57.9e9
"""Operations per token that MaxText counts: 6 per weight, and attention with masked keys."""

Figures = dict[str, float]


def main() -> None:
    """Write the figures as JSON."""
    parser = argparse.ArgumentParser(description="Plans of presets and of published work.")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.write_text(json.dumps(all_figures(), indent=1) + "\n", encoding="utf-8")


def all_figures() -> Figures:
    """Of all presets and of the published work, by name."""
    found: Figures = {}
    for model in MODELS:
        for machine in TOPOLOGIES:
            found |= {
                f"{model}_{machine}_{k}": v for k, v in preset_figures(model, machine).items()
            }
    maxtext, nemo = maxtext_plan(), nemo_rl_plan()
    tokens = maxtext.tokens_per_second / maxtext.setting.topology.chips
    mfu = 100 * tokens * _MAXTEXT_FLOPS / maxtext.setting.topology.chip.flops
    found |= {
        "maxtext_tokens": tokens,
        "maxtext_error_percent": _error(tokens, MAXTEXT["tokens_per_second_per_chip"]),
        "maxtext_mfu_percent": mfu,
        "nemo_step_s": nemo.step.total,
        "nemo_error_percent": _error(nemo.step.total, NEMO_RL["step_s"]),
        "nemo_rollout_s": nemo.step.rollout.total,
        "nemo_scoring_s": nemo.step.scoring.total,
        "nemo_update_s": nemo.step.update.total,
    }
    # Rounded, so that the last bits of a sum on another machine change no document.
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def preset_figures(model: str, machine: str) -> Figures:
    """Memory, whether it fits, and times; none for a mesh that does not divide."""
    try:
        plan = preset_plan(model, machine)
    except InputError:
        return {}
    return {
        "gb": plan.memory.total / 1e9,
        "usable_gb": plan.usable / 1e9,
        "fits": float(plan.fits),
        "rollout_s": plan.step.rollout.total,
        "update_s": plan.step.update.total,
        "step_s": plan.step.total,
        "hours": plan.hours,
    }


def preset_plan(model: str, machine: str, *more: str) -> Plan:
    """The paper's run of a model on a machine."""
    words = (f"hardware/{machine}", f"models/{model}", "recipes/paper", *more)
    return make_plan(load(*words), parse_topology(TOPOLOGIES[machine]))


def load(*words: str) -> RunConfig:
    """Presets and overrides, with rows."""
    words = (*words, *DATA)
    names = [presets()[word] for word in words if "=" not in word]
    return load_config(RunConfig, names, [word for word in words if "=" in word])


def maxtext_plan() -> Plan:
    """Rows of 8,192 tokens, all scored, no padding."""
    config = load(
        *("models/llama3_1_8b", "methods/sft", "mesh.data=1", "mesh.fsdp=256", "model.remat=full"),
        *("data.max_prompt_tokens=2", "data.max_answer_tokens=8191", "train.packing=false"),
        *(f"train.{name}=1024" for name in ("batch_prompts", "mini_batch_prompts")),
        "train.micro_batch_prompts=1024",
    )
    lengths = Lengths(prompt=2, answer=8191, padding=0.0)
    return make_plan(config, parse_topology("v6e:16x16"), lengths=lengths)


def nemo_rl_plan() -> Plan:
    """The same prompts, samples, updates and passes; ours runs a prompt once for its samples."""
    config = load(
        *("models/llama3_1_8b", "mesh.data=2", "mesh.fsdp=8", "model.remat=full"),
        *("rollout.mesh.data=16", "rollout.slots=2048", "rollout.traces_per_prompt=32"),
        *("rollout.max_trace_tokens=3072", "train.batch_prompts=64", "train.mini_batch_prompts=16"),
        *("train.micro_batch_prompts=16", "objective.old_logprobs=recompute"),
        *("objective.kl_coefficient=0.01", "data.max_prompt_tokens=512"),
        *("data.max_answer_tokens=16", "rollout.max_response_tokens=3580"),
    )
    lengths = Lengths(prompt=132, trace=1060, answer=2)
    return make_plan(config, parse_topology("h100x8:2"), lengths=lengths)


def _error(estimate: float, measured: float) -> float:
    """Of the estimate, in percent of what was measured."""
    return 100 * (estimate / measured - 1)


if __name__ == "__main__":
    main()
