"""One of several processes that sample together; each writes the traces that it got.

python -m tests.training.two_samplers PORT RANK PROCESSES OUT
"""

import json
import sys
from pathlib import Path

import jax

DEVICES, SLOTS, COPIES = 4, 4, 3


def main(port: str, rank: str, processes: str, out: Path) -> None:
    """Four devices in all, fewer slots than sequences, prompts longer than a chunk."""
    jax.config.update("jax_num_cpu_devices", DEVICES // int(processes))
    if int(processes) > 1:
        jax.distributed.initialize(f"localhost:{port}", int(processes), int(rank))
    assert jax.device_count() == DEVICES
    groups, scores = sample()
    rows = [
        [trace.tokens.tolist(), trace.logprobs.tolist(), trace.end_token, trace.end_logprob]
        for group in groups
        for trace in group
    ]
    scored = [[score.samples_KA.tolist(), score.empty_A.tolist()] for score in scores]
    (out / f"{rank}.json").write_text(json.dumps({"traces": rows, "scores": scored}))
    if int(processes) > 1:
        jax.distributed.shutdown()


def sample():
    """Traces and scores of seven prompts, three copies each, under weights over all devices."""
    import numpy as np
    from flax import nnx

    from nrt_jax.config.mesh import MeshConfig
    from nrt_jax.engine.engine import Engine
    from nrt_jax.engine.generate import generate_and_score
    from nrt_jax.engine.requests import Request
    from nrt_jax.models.decoder import Decoder
    from nrt_jax.models.sharding import abstract_params, make_mesh
    from tests.training.worlds import ARCHITECTURE, EOS, THINK_END, THINK_START

    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2))
    abstract = nnx.eval_shape(lambda: Decoder(ARCHITECTURE, nnx.Rngs(0)))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(mesh, abstract))

    def draw():
        return nnx.to_pure_dict(nnx.split(Decoder(ARCHITECTURE, nnx.Rngs(0)))[1])

    params = jax.jit(draw, out_shardings=shardings)()
    engine = Engine(
        nnx.split(abstract)[0],
        ARCHITECTURE,
        mesh,
        slots=SLOTS,
        max_prompt_tokens=40,
        max_new_tokens=12,
        stop_ids=frozenset({EOS, THINK_START, THINK_END}),
        num_samples=COPIES,
        prefill_chunk=16,
    )
    rng = np.random.default_rng(0)
    requests = [
        Request(
            rng.integers(4, ARCHITECTURE.vocab_size, length).astype(np.int32),
            index,
            COPIES,
            12,
            suffix_tokens=np.asarray([THINK_END, 5, EOS], np.int32),
        )
        for index, length in enumerate((3, 35, 8, 20, 1, 16, 40))
    ]
    return generate_and_score(engine, params, requests, jax.random.key(0), steps=4)


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]))
