"""One of two processes that read a checkpoint together, import it, and export the import.

python -m tests.checkpoints.two_processes PORT RANK SOURCE OUT
"""

import sys
from pathlib import Path

import jax


def main(port: str, rank: str, source: Path, out: Path) -> None:
    """Four devices of eight; asserts that each weight is held in part only."""
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
    from nrt_jax.checkpoints.export import export
    from nrt_jax.checkpoints.import_format import import_directory
    from nrt_jax.config.mesh import MeshConfig
    from nrt_jax.models.sharding import make_mesh

    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    params = import_directory(source, out / "imported", mesh)
    gate = params["layers"]["mlp"]["gate"]
    here = sum(shard.data.size for shard in gate.addressable_shards)
    assert here == gate.size // 2, "each process holds half"
    export(out / "imported", out / "exported", dtype=None, copy_rows=[])
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:3], Path(sys.argv[3]), Path(sys.argv[4]))
