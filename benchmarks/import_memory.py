"""Memory of an import: peak resident bytes of the host against the bytes of the weights.

Writes a random checkpoint of the shape of Llama-3.2-3B to --folder, tensor by tensor, and reads it
in processes of their own: onto one device, and onto 8 simulated ones; then `nrt-jax import` and
`nrt-jax export`. The devices are simulated on the CPU, so the host's memory holds the weights too:
1.0 in the last column would be the weights alone. Linux only.

    python benchmarks/import_memory.py --folder /tmp/import_memory
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from nrt_jax.checkpoints.hf_config import config_json
from nrt_jax.checkpoints.json_files import write_json
from nrt_jax.checkpoints.safetensors_files import MAX_SHARD_BYTES, NewTensor, write_tensors
from nrt_jax.checkpoints.weight_table import weight_table
from nrt_jax.config.architecture import Architecture, Llama3Scaling

LLAMA_3B = Architecture(
    vocab_size=128256,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=500000.0,
    rope_scaling=Llama3Scaling(factor=32.0),
    tie_word_embeddings=True,
    max_position_embeddings=131072,
)
LLAMA_1B = LLAMA_3B.model_copy(
    update={
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
    }
)
SHAPES = {"3b": LLAMA_3B, "1b": LLAMA_1B}

LOAD = """
import sys, time
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
from nrt_jax.checkpoints import load_pretrained
from nrt_jax.config.mesh import parse_mesh
from nrt_jax.models.sharding import make_mesh
start = time.perf_counter()
decoder = load_pretrained(sys.argv[1], mesh=make_mesh(parse_mesh(sys.argv[3])), dtype="bfloat16")
jax.block_until_ready(decoder)
"""
VERB = """
import sys, time
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
from nrt_jax.cli import main
start = time.perf_counter()
assert main(sys.argv[2:]) == 0
"""
MEASURE = """
import json
from pathlib import Path
status = Path("/proc/self/status").read_text()
# Not getrusage, whose peak a process inherits from the one that started it.
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
seconds = time.perf_counter() - start
cpu = time.process_time()
print(json.dumps({"peak": peak, "seconds": seconds, "cpu": cpu}))
"""


def write_checkpoint(folder: Path, architecture: Architecture) -> int:
    """A bfloat16 checkpoint of random weights in shards of 5 GB; returns its bytes."""
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(jnp.bfloat16)

    dtype = jnp.dtype(jnp.bfloat16)
    tensors = [
        NewTensor(name, row.file_shape(), dtype, lambda row=row: draw(row.file_shape()))
        for row in weight_table(architecture)
        for name in row.names(architecture.num_hidden_layers)
    ]
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config_json(architecture, "bfloat16", {}))
    write_tensors(folder, tensors, max_shard_bytes=MAX_SHARD_BYTES)
    return sum(tensor.nbytes for tensor in tensors)


def measure(script: str, *arguments: object) -> dict:
    """Run a script in a process of its own; what it printed last."""
    command = [sys.executable, "-c", script + MEASURE, *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Write, measure, print a table, clean up."""
    parser = argparse.ArgumentParser(
        description="Memory of an import: peak bytes of the host against the bytes of the weights."
    )
    parser.add_argument("--folder", type=Path, required=True, help="a new folder; it is removed")
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    args = parser.parse_args()
    source, imported, back = (args.folder / name for name in ("hf", "imported", "back"))
    args.folder.mkdir(parents=True)
    try:
        start = time.perf_counter()
        nbytes = write_checkpoint(source, SHAPES[args.shape])
        print(f"{args.shape}: {nbytes / 1e9:.2f} GB of bfloat16 weights in {source}")
        print(f"written in {time.perf_counter() - start:.0f} s; idle process: ", end="", flush=True)
        idle = measure(
            "import time\nfrom nrt_jax.checkpoints import load_pretrained\n"
            "import jax\njax.devices()\nstart = time.perf_counter()\n"
        )
        print(f"{idle['peak'] / 1e9:.2f} GB")
        print(f"{'':44} {'wall s':>8} {'CPU s':>8} {'peak GB':>8} {'peak / weights':>15}")
        runs = [
            ("load_pretrained, 1 device", LOAD, (source, 1, "data=1")),
            ("load_pretrained, 8 devices, fsdp=8", LOAD, (source, 8, "fsdp=8")),
            ("load_pretrained, 8 devices, fsdp=2,tensor=4", LOAD, (source, 8, "fsdp=2,tensor=4")),
            ("import, 1 device", VERB, (1, "import", source, imported)),
            ("load_pretrained of the import, 8 devices", LOAD, (imported, 8, "fsdp=8")),
            ("export of the import, 8 devices", VERB, (8, "export", imported, back)),
            (
                "import, 8 devices, fsdp=4,tensor=2",
                VERB,
                (8, "import", source, args.folder / "again", "--mesh", "fsdp=4,tensor=2"),
            ),
        ]
        for name, script, arguments in runs:
            figures = measure(script, *arguments)
            print(
                f"{name:44} {figures['seconds']:8.0f} {figures['cpu']:8.0f} "
                f"{figures['peak'] / 1e9:8.2f} {figures['peak'] / nbytes:15.2f}",
                flush=True,
            )
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
