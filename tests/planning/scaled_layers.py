"""Programs of six layers compiled for a TPU, over those scaled from two and four: one JSON line.

python -m tests.planning.scaled_layers
"""

import json

from nrt_jax.config.run import RunConfig
from nrt_jax.planning.compiled import (
    Compiled,
    compile_programs,
    described_devices,
    expected,
    programs_of,
)
from nrt_jax.planning.setting import resolve
from nrt_jax.planning.work import Lengths, work
from nrt_jax.topologies import parse_topology

LAYERS = 6
CONFIG = {
    "model": {
        "architecture": {
            "vocab_size": 512,
            "hidden_size": 1024,
            "intermediate_size": 2048,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
        "dtype": "bfloat16",
        "remat": "full",
    },
    "data": {"path": "x", "tokenizer": "x", "max_prompt_tokens": 255, "max_answer_tokens": 64},
    "rollout": {
        "traces_per_prompt": 2,
        "max_trace_tokens": 128,
        "max_response_tokens": 256,
        "slots": 16,
        "decode_steps": 2,
        "prefill_chunk": None,
        "mesh": {"data": 2, "tensor": 4},
    },
    "train": {"micro_batch_prompts": 4},
    "mesh": {"data": 1, "fsdp": 4, "tensor": 2},
}


def main() -> None:
    setting = resolve(RunConfig.model_validate(CONFIG), parse_topology("v5p:2x2x2"))
    from_few = compile_programs(setting)
    of_all = dict(programs_of(setting, described_devices(setting.topology), LAYERS))
    by_formula = expected(setting, work(setting, Lengths()))
    report = {}
    for name, few in from_few.items():
        whole = of_all[name]
        report[name] = {
            "temporaries": few.temporaries / whole.temporaries,
            "flops": few.flops / whole.flops,
            "sent": total(few) / total(whole),
        }
        if name in by_formula:
            report[name]["flops by formula"] = by_formula[name][0] / whole.flops
    print(json.dumps(report))


def total(one: Compiled) -> float:
    """Bytes over all axes."""
    return sum(one.sent.values())


if __name__ == "__main__":
    main()
