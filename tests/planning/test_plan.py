"""The formulas of a plan against the decoder, compiled programs, and sums by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

from benchmarks.plans import load
from nrt_jax.config.mesh import parse_mesh
from nrt_jax.errors import InputError
from nrt_jax.models.decoder import abstract_decoder
from nrt_jax.planning.compiled import QUIET, Compiled, axes_of, described_devices, scaled
from nrt_jax.planning.compiled_text import collectives
from nrt_jax.planning.links import links
from nrt_jax.planning.memory import memory, weights_per_device
from nrt_jax.planning.plan import as_json, make_plan, with_programs
from nrt_jax.planning.report import shown
from nrt_jax.planning.search import cheapest_changes, misfit, search
from nrt_jax.planning.setting import Setting, resolve, weights_of
from nrt_jax.planning.traffic import update_traffic
from nrt_jax.planning.work import Lengths, work
from nrt_jax.topologies import parse_topology
from tests.models.tiny import architecture
from tests.planning.runs import plan
from tests.training.tpu_compile import SHAPE

GIB = 2**30
PAPER = ("models/llama3_1_8b", "recipes/paper")
ON_V6E = ("hardware/v6e_64", *PAPER)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_of_the_decoder(tied):
    a = architecture(vocab_size=1000, tie_word_embeddings=tied)
    state = nnx.state(abstract_decoder(a, vocab_multiple=256))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(state)))
    assert weights_of(a, 256).total(a.num_hidden_layers) == count


# --- against compiled programs: docs/training.md -------------------------------------------------


def compiled_setting(mesh: str) -> Setting:
    """What docs/training.md measures: a micro-batch of SHAPE of an 8B model on a v5p of 8 chips."""
    config = load(*PAPER, "model.remat=full", "train.micro_batch_prompts=8")
    config = config.model_copy(update={"mesh": parse_mesh(mesh)})
    return resolve(config, parse_topology("v5p:2x2x2"))._replace(shape=SHAPE)


@pytest.mark.parametrize(
    ("mesh", "gradient", "apply"), [("fsdp=8", 18.8, 15.0), ("fsdp=4,tensor=2", 20.0, 15.0)]
)
def test_memory_is_near_that_of_compiled_programs(mesh, gradient, apply):
    setting = compiled_setting(mesh)
    found = memory(setting)
    assert (found.update - found.moments) / GIB == pytest.approx(gradient, rel=0.1)
    assert found.apply / GIB == pytest.approx(apply, rel=0.02)


@pytest.mark.parametrize(("mesh", "gb"), [("fsdp=8", 58.7), ("fsdp=4,tensor=2", 47.2)])
def test_traffic_is_near_that_of_compiled_programs(mesh, gb):
    setting = compiled_setting(mesh)
    amount = work(setting, Lengths())._replace(
        updates=1,
        micro_batches=1,
        micro_tokens=8 * (1024 + 4 * 2048),
        micro_baselines=8 * 256,
        micro_scored=8 * 4 * 2048,
    )
    sent = sum(update_traffic(setting, amount).values()) / 1e9
    # XLA reduces over eight chips in pieces that go around a ring nine times instead of seven.
    assert gb - 8 < sent < gb + 5


# --- work ----------------------------------------------------------------------------------------


def test_operations_of_the_updates_are_six_per_weight_and_token():
    found = plan("v6e:8x8", *ON_V6E)
    S, Z, A, _ = found.lengths
    tokens = 256 * (S + 8 * (Z + 1 + A))
    weights = found.setting.count - found.setting.weights.embedding
    assert found.work.update_model == pytest.approx(6 * weights * tokens, rel=0.08)
    # remat=full runs a layer again, and a micro-batch has padding.
    assert 1.3 < found.work.update.total / found.work.update_model < 1.6


def test_recomputing_less_takes_more_memory_and_less_time():
    plans = {remat: plan("v6e:8x8", *ON_V6E, f"model.remat={remat}") for remat in ("none", "full")}
    assert plans["none"].memory.activations > 2 * plans["full"].memory.activations
    assert plans["none"].step.update.total < plans["full"].step.update.total


def test_offloaded_moments_leave_the_device_between_updates():
    here, offloaded = (
        plan("v6e:8x8", *ON_V6E, f"optimizer.offload={value}") for value in ("false", "true")
    )
    moments = 8 * weights_per_device(here.setting)
    assert here.memory.update - offloaded.memory.update == pytest.approx(moments)
    assert here.memory.apply == offloaded.memory.apply
    assert offloaded.step.update.total > here.step.update.total


def test_int8_caches_take_half_and_a_factor_per_head():
    bf16, int8 = (
        plan("v5e:8x8", "hardware/v5e_64", *PAPER, f"rollout.cache_dtype={dtype}")
        for dtype in ("bfloat16", "int8")
    )
    # The kernel of the TPU takes no int8, and pads slots to pages.
    assert int8.memory.caches / bf16.memory.caches == pytest.approx((128 + 4) / 256, rel=0.05)


def test_sft_has_no_rollouts():
    found = plan("v6e:8x8", *ON_V6E, "methods/sft")
    assert found.step.rollout.total == found.step.sync.total == found.memory.caches == 0
    assert found.work.tokens == 256 * (300 + 416)


def test_cost_is_price_times_chips_and_hours():
    found = make_plan(load(*ON_V6E), parse_topology("v6e:8x8"), price_per_hour=2.5)
    assert found.cost == pytest.approx(2.5 * 64 * 800 * found.step.total / 3600)


def test_lengths_stay_within_the_limits():
    assert Lengths(9000, 9000, 9000).within(load(*PAPER)) == Lengths(4096, 1, 4093)


# --- links ---------------------------------------------------------------------------------------


def test_mesh_axes_take_the_links_of_the_dims_that_they_cover():
    sizes = {"data": 1, "fsdp": 16, "tensor": 4, "context": 1}
    torus = links(parse_topology("v5p:4x4x4"), sizes)
    assert (torus["tensor"].bytes_per_s, torus["fsdp"].bytes_per_s) == (200e9, 400e9)
    # A slice of 8 x 8 has no links between its ends.
    assert links(parse_topology("v6e:8x8"), sizes)["tensor"].bytes_per_s == 100e9
    hosts = links(parse_topology("h100x8:2"), sizes | {"fsdp": 4})
    assert (hosts["tensor"].bytes_per_s, hosts["fsdp"].bytes_per_s) == (450e9, 100e9)


# --- what does not fit ---------------------------------------------------------------------------


def test_a_plan_that_does_not_fit_names_three_changes_that_do():
    found = plan(
        "v6e:8x8",
        *ON_V6E,
        "model.remat=none",
    )
    assert not found.fits
    changes = cheapest_changes(found)
    assert len(changes) == 3
    assert all(change.plan.fits for change in changes)
    line = misfit(found)
    over = (found.memory.total - found.usable) / 1e9
    assert f"{over:.1f} GB more than the 30.4 GB" in line
    assert "model.remat=full" in line


def test_a_model_that_fits_nowhere_says_what_it_takes():
    found = plan("h100x1", "hardware/h100x1", *PAPER)
    assert "take more chips" in misfit(found)
    with pytest.raises(InputError, match="no mesh"):
        search(found.setting.config, found.setting.topology)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mesh.fsdp=48", "mesh: data=1, fsdp=48, tensor=1, context=1 does not cover 64 devices"),
        ("train.micro_batch_prompts=16", "use a multiple of 64"),
        ("rollout.devices=8", "set it to null"),
    ],
)
def test_sizes_that_do_not_divide(override, message):
    with pytest.raises(InputError, match=message):
        plan("v6e:8x8", *ON_V6E, override)


def test_heads_must_divide_over_tensor():
    with pytest.raises(InputError, match=r"mesh.tensor=16 does not divide num_key_value_heads 8"):
        plan("v6e:8x8", *ON_V6E, "mesh.tensor=16", "mesh.fsdp=4")


# --- search --------------------------------------------------------------------------------------


def test_a_search_lists_ten_that_fit_the_fastest_first():
    config, topology = load(*ON_V6E), parse_topology("v6e:8x8")
    best = search(config, topology)
    times = [candidate.plan.step.total for candidate in best]
    assert len(best) == 10
    assert times == sorted(times)
    assert all(candidate.plan.fits for candidate in best)
    assert times[0] <= make_plan(config, topology).step.total


# --- compiled programs ---------------------------------------------------------------------------


def test_a_program_of_all_layers_is_scaled_from_two_of_few():
    less = Compiled(100.0, 30.0, {"fsdp": 8.0}, seconds=1.0)
    more = Compiled(120.0, 50.0, {"fsdp": 12.0, "tensor": 2.0}, seconds=2.0)
    # 80 + 10 L, 10 + 10 L, 4 + 2 L and -2 + L at L = 8.
    assert scaled(less, more, (2, 4), 8) == (160.0, 90.0, {"fsdp": 20.0, "tensor": 6.0}, 3.0)


SIZES = {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}


@pytest.mark.parametrize(
    ("attributes", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "tensor"),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", "fsdp"),
        ("replica_groups=[2,4]<=[2,4]T(1,0)", "data+tensor"),
        ("replica_groups=[1,8]<=[8]", "data+fsdp+tensor"),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'data'}", "data"),
        ("source_target_pairs={{0,4},{4,0}}", "data"),
        ("", "data+fsdp+tensor"),
    ],
)
def test_collectives_are_told_by_their_axes(attributes, axes):
    line = f"  %s = f32[8]{{0}} all-reduce(f32[8]{{0}} %x), {attributes}"
    (found,) = collectives(f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{line}\n}}\n", 8)
    assert axes_of(found, SIZES) == axes


def test_programs_are_not_compiled_for_gpus():
    with pytest.raises(InputError, match="h100x8 has GPUs"):
        described_devices(parse_topology("h100x8"))


def test_without_libtpu_a_plan_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(InputError, match=r"pip install 'nrt-jax\[tpu\]'"):
        described_devices(parse_topology("v6e:8x8"))


def test_compiled_temporaries_take_the_place_of_the_formulas():
    found = plan("v6e:8x8", *ON_V6E)
    one = Compiled(7e9, 1e12, {"fsdp": 1e9}, seconds=1.0)
    programs = {"gradient": one, "prefill": one, "decode step": one._replace(temporaries=9e9)}
    other = with_programs(found, programs)
    assert (other.memory.activations, other.memory.decoding) == (7e9, 9e9)
    text = "\n".join(shown(other))
    assert "GB sent over fsdp: gradient 1.000" in text
    assert as_json(other)["programs"]["gradient"]["flops"] == 1e12


@pytest.mark.slow
def test_a_compiled_program_is_that_of_two_with_fewer_layers():
    """For a v5p of eight chips: temporaries, operations and traffic grow by the layer."""
    pytest.importorskip("libtpu", reason="libtpu is installed on Linux only")
    done = subprocess.run(
        [sys.executable, "-m", "tests.planning.scaled_layers"],
        cwd=Path(__file__).parents[2],
        env=os.environ | QUIET,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    for name, of in report.items():
        assert of["flops"] == pytest.approx(1, rel=0.01), name
        assert of["temporaries"] == pytest.approx(1, rel=0.05), name
        assert of["sent"] == pytest.approx(1, rel=0.05), name
        assert of.get("flops by formula", 1) == pytest.approx(1, rel=0.1), name


# --- text ----------------------------------------------------------------------------------------


def test_text_and_json_say_the_same():
    found = plan("v5p:2x4x4", "hardware/v5p_32", *PAPER)
    text, figures = "\n".join(shown(found)), json.loads(json.dumps(as_json(found)))
    assert f"step {figures['seconds']['step']:.1f} s" in text
    assert f"fits: {figures['memory']['total'] / 1e9:.2f} GB" in text
    assert figures["mesh"] == "fsdp=32"
    assert all(f"- {line}" in text for line in figures["assumed"])
