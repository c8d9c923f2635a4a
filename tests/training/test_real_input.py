"""Real questions at real lengths through a small random Llama: every method makes finite steps."""

import json
import math
from pathlib import Path

import pytest

from nrt_jax.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]
METHODS = sorted(path.stem for path in (REPOSITORY / "configs/methods").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_gsm8k_with_the_mistral_tokenizer(method, shared_data, tmp_path):
    configs = [
        REPOSITORY / "configs/examples/gsm8k_tiny.yaml",
        REPOSITORY / f"configs/methods/{method}.yaml",
    ]
    overrides = {
        "run_dir": tmp_path / "run",
        "data.path": shared_data / "gsm8k/train.jsonl",
        "data.tokenizer": shared_data / "tokenizers/mistral_v3_fast",
        "train.steps": 2,
        "mesh.data": 2,
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
        "train.micro_batch_prompts": 4,
        "evaluation.examples": 0,
    }
    words = [*map(str, configs), *(f"{key}={value}" for key, value in overrides.items())]
    assert main(["train", *words]) == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values()), row
        assert row["update/skipped"] == 0
        assert row["update/gradient_norm"] > 0
