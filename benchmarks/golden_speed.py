"""CPU seconds of a rollout and an update, in one tree or in two by turns.

What is run is benchmarks/peer_workload.py and benchmarks/rollout.py of each tree, on a random Llama
that is made here (6 layers of width 256, a vocabulary of 8,192).
"""

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import tokenizers
from safetensors.numpy import save_file

from benchmarks.golden_tree import environment

VOCABULARY, WIDTH, HIDDEN, LAYERS, HEADS, KEY_HEADS, HEAD_DIM = 8192, 256, 1024, 6, 8, 4, 32
PROMPTS, WORDS = 8, 63

Figures = dict[str, float]


def measure_by_turns(
    trees: dict[str, Path], rounds: int, scratch: Path
) -> dict[str, dict[str, list[float]]]:
    """CPU seconds by tree and figure; every other round begins with the last tree."""
    assets = scratch / "assets"
    make_assets(assets)
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in trees}
    for turn in range(rounds):
        for name in list(trees)[:: -1 if turn % 2 else 1]:
            for figure, seconds in measure(trees[name], assets, scratch).items():
                taken[name].setdefault(figure, []).append(seconds)
                print(f"round {turn + 1}, {name}: {figure} {seconds:.2f}", flush=True)
    return taken


def measure(tree: Path, assets: Path, scratch: Path) -> Figures:
    """Of one tree: rollout and update of a step, and each workload with each sampler."""
    step = _run(tree, "peer_workload", scratch, "--assets", str(assets))
    rollouts = _run(tree, "rollout", scratch)
    names = ("rollout_cpu_s", "update_cpu_s")
    figures = {f"step/{name.removesuffix('_cpu_s')}": step[name] for name in names}
    lines = {name: line for name, line in rollouts.items() if "/" in name}
    return figures | {name: line["cpu_s"] for name, line in lines.items()}


def table(taken: dict[str, dict[str, list[float]]]) -> str:
    """Medians over the rounds, and with two trees the second over the first."""
    names = list(taken)
    lines = ["CPU-seconds".ljust(30) + "".join(name.rjust(12) for name in names)]
    lines[0] += "ratio".rjust(8) if len(names) == 2 else ""
    for figure in taken[names[0]]:
        medians = [median(taken[name].get(figure, [float("nan")])) for name in names]
        line = figure.ljust(30) + "".join(f"{seconds:12.2f}" for seconds in medians)
        lines.append(line + (f"{medians[1] / medians[0]:8.2f}" if len(names) == 2 else ""))
    return "\n".join(lines)


def _run(tree: Path, name: str, scratch: Path, *words: str) -> dict:
    out = scratch / f"{name}.json"
    script = tree / "benchmarks" / f"{name}.py"
    command: Sequence[str] = [sys.executable, str(script), *words, "--out", str(out)]
    surroundings = environment(tree, scratch, scratch / "compiled")
    done = subprocess.run(command, cwd=tree, env=surroundings, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(out.read_text())


def make_assets(folder: Path) -> None:
    """A random Llama, a tokenizer of words and some prompts, the same ones every time."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.02, shape).astype(np.float32)

    ones = np.ones(WIDTH, np.float32)
    weights = {"model.embed_tokens.weight": normal(VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        weights |= {
            f"model.layers.{layer}.{name}.weight": value
            for name, value in {
                "input_layernorm": ones,
                "post_attention_layernorm": ones,
                "self_attn.q_proj": normal(HEADS * HEAD_DIM, WIDTH),
                "self_attn.k_proj": normal(KEY_HEADS * HEAD_DIM, WIDTH),
                "self_attn.v_proj": normal(KEY_HEADS * HEAD_DIM, WIDTH),
                "self_attn.o_proj": normal(WIDTH, HEADS * HEAD_DIM),
                "mlp.gate_proj": normal(HIDDEN, WIDTH),
                "mlp.up_proj": normal(HIDDEN, WIDTH),
                "mlp.down_proj": normal(WIDTH, HIDDEN),
            }.items()
        }
    weights |= {"model.norm.weight": ones, "lm_head.weight": normal(VOCABULARY, WIDTH)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = special + [f"w{i}" for i in range(len(special), VOCABULARY)]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    drawn = random.Random(0)
    prompts = [" ".join(drawn.choices(words[4:], k=WORDS)) for _ in range(PROMPTS)]
    (folder / "prompts.json").write_text(json.dumps(prompts))
