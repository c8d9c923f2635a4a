"""What the compiled programs send between chips, beside the least possible; compiled, never run.

    python -m benchmarks.collectives
    python -m benchmarks.collectives --mesh data=2,tensor=4 --programs prefill,decode
    python -m benchmarks.collectives --mesh fsdp=16,tensor=4 --topology v5p:4x4x4

Needs libtpu and no TPU; a program of the 8B shape compiles for minutes. `gradient` is a micro-batch
of 8 x (1,024 + 4 x 2,048) tokens and of baselines of 8 x 256, which have no gradient, `scoring`
what scores it before several updates, `prefill` a prompt of 1,024 tokens in each shard of the
slots, `decode` a step of 64 slots. Bytes are those that one chip sends in a ring, loops multiplied
out; branches on a condition are left out.

The least: the weights of layers and head gathered over `fsdp` in bf16 once per pass (forward, and
backward, which runs the layers again), and their gradient reduced once in bf16; tokens exchanged
for their embeddings; with `tensor`, the sums of the activations, twice per layer forward, twice
backward, and once where the layer is run again. A decoding step gathers no weights, and a prefill
gathers them once.
"""

import argparse
import os
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from nrt_jax.config.mesh import parse_mesh
from nrt_jax.models.sharding import make_mesh
from nrt_jax.planning.compiled_text import Collective, collectives, matrix_flops
from tests.engine import tpu_compile as engine
from tests.training import tpu_compile as training

MESHES = ("fsdp=8", "fsdp=4,tensor=2")
PROGRAMS = ("gradient", "scoring", "prefill", "decode")
BF16 = 2
GIB = 2**30


def main() -> None:
    """Compile, read, print."""
    parser = argparse.ArgumentParser(description="Collectives of compiled TPU programs.")
    parser.add_argument("--mesh", nargs="+", default=MESHES, help="sizes, such as fsdp=4,tensor=2")
    parser.add_argument("--topology", default="v5p:2x2x2")
    parser.add_argument("--shape", default="llama-8b", choices=sorted(engine.SHAPES))
    parser.add_argument("--programs", default=",".join(PROGRAMS))
    parser.add_argument("--lines", type=int, default=12, help="of the table of each program")
    args = parser.parse_args()
    # Nothing is asked of a machine that would tell what TPU this is.
    os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=args.topology)
    for sizes, name in product(args.mesh, args.programs.split(",")):
        mesh = make_mesh(parse_mesh(sizes), topology.devices)
        program = lowered(name, args.shape, mesh).compile()
        print(f"\n{name}, {args.shape}, {sizes} of {args.topology}")
        print("\n".join(report(name, program, Least(args.shape, mesh), args.lines)), flush=True)


def lowered(name: str, shape: str, mesh: Mesh) -> jax.stages.Lowered:
    """A program by its name."""
    if name in ("prefill", "decode"):
        return getattr(engine.lowered(shape, mesh), name)()
    return getattr(training.lowered(shape, mesh), {"gradient": "add", "scoring": "score"}[name])()


def report(name: str, program: jax.stages.Compiled, least: "Least", lines: int) -> list[str]:
    """The lines of one program: what it sends, by what, and what it takes."""
    text, memory = program.as_text(), program.memory_analysis()
    assert text is not None
    assert memory is not None
    steps = engine.STEPS if name == "decode" else 1
    found = collectives(text, least.mesh.size)
    sent = sum(c.total_bytes for c in found) / steps
    least_bytes = getattr(least, name)()
    ratio = f", {sent / least_bytes:.2f} of it" if least_bytes else ""
    inside = sum(c.total_bytes for c in found if c.loops) / steps
    return [
        f"{sent / 1e9:9.3f} GB sent per chip, {inside / 1e9:.3f} in loops; "
        f"least {least_bytes / 1e9:.3f} GB{ratio}",
        f"{memory.peak_memory_in_bytes / GIB:9.2f} GiB of memory at the peak; "
        f"{matrix_flops(text) / steps / 1e12:.3f} TFLOP per chip in products",
        *table(found, steps, lines),
    ]


def table(found: Sequence[Collective], steps: int, lines: int) -> list[str]:
    """Lines of the collectives that send most, alike ones together."""
    alike: dict[tuple, list[Collective]] = defaultdict(list)
    for c in found:
        alike[c.kind, c.shapes, c.devices, c.source].append(c)
    groups = sorted(alike.values(), key=lambda group: -sum(c.total_bytes for c in group))
    rows = []
    for group in groups[:lines]:
        first, sent = group[0], sum(c.total_bytes for c in group) / steps
        dims = " ".join(f"{dtype}[{','.join(map(str, dims))}]" for dtype, dims in first.shapes[:3])
        more = f" and {len(first.shapes) - 3} more" if len(first.shapes) > 3 else ""
        rows.append(
            f"{sent / 1e9:9.3f} GB  {sum(c.count for c in group) / steps:6g} x {first.kind:18s} "
            f"over {first.devices:2d}: {dims}{more}  {first.source}"
        )
    if rest := groups[lines:]:
        sent = sum(c.total_bytes for group in rest for c in group) / steps
        count = sum(c.count for group in rest for c in group) / steps
        rows.append(f"{sent / 1e9:9.3f} GB  {count:6g} more")
    return rows


class Least(NamedTuple):
    """The fewest bytes that a chip sends; without `context`, whose keys and values travel too."""

    shape: str
    mesh: Mesh

    def gradient(self) -> float:
        """Weights forward and backward, their gradient, and activations."""
        tokens, scored = self._training_tokens()
        baselines = self._baseline_tokens()
        weights, exchanged = self._layers() + self._head(), 2 * self._embedded(tokens)
        exchanged += self._embedded(baselines)
        layers, head = 5 * self._sums(tokens), self._sums(scored) / self._size("num_hidden_layers")
        layers += 2 * self._sums(baselines)
        return 2 * self._gathered(weights) + self._reduced(weights) + exchanged + layers + head

    def scoring(self) -> float:
        """One pass, of the baselines too."""
        tokens = self._training_tokens()[0] + self._baseline_tokens()
        weights = self._gathered(self._layers() + self._head())
        return weights + self._embedded(tokens) + 2 * self._sums(tokens)

    def prefill(self) -> float:
        """The weights once, and the sums of a chip's own prompt."""
        return self._gathered(self._layers() + self._head()) + 2 * self._sums(engine.PROMPT_TOKENS)

    def decode(self) -> float:
        """A token of each slot, no weights."""
        return 2 * self._sums(engine.SLOTS / self._rows())

    def _size(self, name: str) -> int:
        return engine.SHAPES[self.shape][name]

    def _rows(self) -> int:
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def _training_tokens(self) -> tuple[float, float]:
        """Of one chip: all, and those that the head scores."""
        shape = training.SHAPE
        scored = shape.packs * shape.rows * shape.row_tokens
        return (scored + shape.packs * shape.prompt_tokens) / self._rows(), scored / self._rows()

    def _baseline_tokens(self) -> float:
        """Of one chip."""
        return training.SHAPE.packs * training.SHAPE.baseline_tokens / self._rows()

    def _layers(self) -> float:
        """Bytes of the layers' weights in bf16, of one shard of `tensor`."""
        heads = 2 * self._size("num_attention_heads") + 2 * self._size("num_key_value_heads")
        columns = heads * 128 + 3 * self._size("intermediate_size")
        weights = self._size("num_hidden_layers") * self._size("hidden_size") * columns
        return BF16 * weights / self.mesh.shape["tensor"]

    def _head(self) -> float:
        """Bytes of the head, likewise."""
        weights = self._size("vocab_size") * self._size("hidden_size")
        return BF16 * weights / self.mesh.shape["tensor"]

    def _embedded(self, tokens: float) -> float:
        """The embeddings of so many tokens, looked up in shards of the model dim."""
        return self._gathered(BF16 * tokens * self._size("hidden_size"))

    def _gathered(self, bytes_of_all: float) -> float:
        fsdp = self.mesh.shape["fsdp"]
        return bytes_of_all * (fsdp - 1) / fsdp

    def _reduced(self, bytes_of_all: float) -> float:
        """Summed over `fsdp` to its shards, and these over `data`."""
        data, fsdp = self.mesh.shape["data"], self.mesh.shape["fsdp"]
        return self._gathered(bytes_of_all) + 2 * bytes_of_all / fsdp * (data - 1) / data

    def _sums(self, tokens: float) -> float:
        """One sum of the activations of so many tokens over `tensor`, in every layer."""
        tensor = self.mesh.shape["tensor"]
        layers, width = self._size("num_hidden_layers"), self._size("hidden_size")
        return layers * 2 * BF16 * tokens * width * (tensor - 1) / tensor


if __name__ == "__main__":
    main()
