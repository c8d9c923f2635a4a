"""A plan as text: memory, operations, traffic, time, cost, and what was assumed."""

from collections.abc import Mapping, Sequence

from nrt_jax.planning.compiled import FEW_LAYERS, Compiled, expected
from nrt_jax.planning.plan import Plan, traffic_of
from nrt_jax.planning.roofline import ASSUMED
from nrt_jax.planning.search import Candidate, changes_text
from nrt_jax.planning.setting import mesh_text
from nrt_jax.planning.traffic import sync_bytes

GB = 1e9


def shown(plan: Plan) -> list[str]:
    """The lines of a plan."""
    parts = [_head(plan), _memory(plan), _work(plan), _time(plan), _assumed(plan)]
    if plan.programs is not None:
        parts.insert(2, _programs(plan, plan.programs))
    return [line for part in parts for line in (*part, "")][:-1]


def found(best: Sequence[Candidate]) -> list[str]:
    """The lines of a search: a row each, then its overrides."""
    rows = [("", "GB", "rollouts s", "updates s", "step s", "MFU", "hours", "cost")]
    for number, (_, plan) in enumerate(best, 1):
        times = plan.step
        rows.append(
            (
                str(number),
                _gb(plan.memory.total),
                f"{times.rollout.total:.1f}",
                f"{times.update.total:.1f}",
                f"{times.total:.1f}",
                f"{plan.update_mfu:.1%}",
                f"{plan.hours:.1f}",
                "-" if plan.cost is None else f"{plan.cost:,.0f}",
            )
        )
    settings = [f"{number}: {changes_text(one.changes)}" for number, one in enumerate(best, 1)]
    lines = [*table(rows), "", *settings]
    for number, (_, plan) in enumerate(best, 1):
        if plan.programs is not None:
            verdict = "fits" if plan.fits else "does not fit"
            lines += ["", f"{number}, compiled, {verdict}:", *_programs(plan, plan.programs)]
    return lines


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _head(plan: Plan) -> list[str]:
    setting, topology = plan.setting, plan.setting.topology
    config = setting.config
    return [
        f"{topology.name}: {topology.chips} chips of {topology.chip.memory / GB:.0f} GB, "
        f"{topology.chip.flops / 1e12:.0f} TFLOP/s and {topology.chip.bandwidth / GB:,.0f} GB/s "
        f"({topology.chip.source})",
        f"{setting.count / 1e9:.2f} billion weights; training on {mesh_text(setting.mesh)}"
        + (f", rollouts on {mesh_text(setting.rollout_mesh)}" if config.method == "nrt" else "")
        + f"; model.remat={config.model.remat}, "
        f"train.micro_batch_prompts={config.train.micro_batch_prompts}, "
        f"rollout.slots={config.rollout.slots}",
    ]


def _memory(plan: Plan) -> list[str]:
    memory, of = plan.memory, plan.setting.device_memory
    names = {
        "weights": "weights, float32",
        "moments": "optimizer moments",
        "gradient": "gradient",
        "activations": "activations and temporaries of the largest micro-batch",
        "rollout_weights": "weights of the rollouts",
        "caches": "keys and values",
        "decoding": "logits and prefill",
    }
    rows = [("memory of a device", "GB")]
    rows += [(title, _gb(getattr(memory, name))) for name, title in names.items()]
    rows += [
        ("while rollouts run", _gb(memory.rollout)),
        ("while a micro-batch runs", _gb(memory.update)),
        ("while an update is applied", _gb(memory.apply)),
    ]
    verdict = "fits" if plan.fits else "does not fit"
    return [
        *table(rows),
        f"{verdict}: {_gb(memory.total)} GB of {_gb(plan.usable)} GB, 95 % of the chip's {_gb(of)}",
    ]


def _work(plan: Plan) -> list[str]:
    amount, setting = plan.work, plan.setting
    again = amount.update.total - amount.update_model
    lines = [
        f"a step: {amount.tokens:,} tokens, {amount.updates} updates of {amount.micro_batches} "
        f"micro-batches, {amount.decode_steps:,.0f} decode steps of {amount.slots} sequences",
        f"operations of a step: updates {_peta(amount.update_model)} PFLOP of the model and "
        f"{_peta(again)} recomputed, padded or masked; scoring {_peta(amount.scoring.total)}, "
        f"prefill {_peta(amount.prefill.total)}, decoding {_peta(amount.decode.total)}",
    ]
    sent = [f"{axis} {_gb(bytes_)} GB" for axis, bytes_ in traffic_of(plan).items()]
    if setting.config.method == "nrt":
        sent.append(f"new weights to the rollouts {_gb(sync_bytes(setting))} GB")
    return [*lines, f"a device sends per step: {', '.join(sent) or 'nothing'}"]


def _programs(plan: Plan, programs: Mapping[str, Compiled]) -> list[str]:
    """What was compiled beside the formulas."""
    by_formula = expected(plan.setting, plan.work)
    rows = [
        ("compiled", "temporaries GB", "TFLOP", "by formula", "GB sent", "by formula", "compile s")
    ]
    for name, one in programs.items():
        flops, sent = by_formula.get(name, (None, None))
        rows.append(
            (
                name,
                _gb(one.temporaries),
                f"{one.flops / 1e12:.3f}",
                "-" if flops is None else f"{flops / 1e12:.3f}",
                f"{sum(one.sent.values()) / GB:.3f}",
                "-" if sent is None else f"{sent / GB:.3f}",
                f"{one.seconds:.0f}",
            )
        )
    axes = {axis for one in programs.values() for axis in one.sent}
    lines = table(rows)
    for axis in sorted(axes):
        of_axis = (f"{name} {one.sent.get(axis, 0) / GB:.3f}" for name, one in programs.items())
        lines.append(f"GB sent over {axis}: {', '.join(of_axis)}")
    few = " and ".join(map(str, FEW_LAYERS))
    return [
        *lines,
        f"compiled with {few} layers and scaled to {plan.setting.architecture.num_hidden_layers}; "
        "products without attention's kernels; memory above is with these temporaries",
    ]


def _time(plan: Plan) -> list[str]:
    times = plan.step
    rows = [("time of a step, seconds", "compute", "memory", "network", "total", "bound")]
    titles = {
        "rollout": "rollouts",
        "scoring": "scoring",
        "update": "updates",
        "sync": "weights to the rollouts",
    }
    for name, title in titles.items():
        time = getattr(times, name)
        if time.total:
            numbers = (f"{part:.2f}" for part in time)
            rows.append((title, *numbers, time.bound))
    lines = table(rows)
    lines.append(
        f"step {times.total:.1f} s; {plan.tokens_per_second:,.0f} tokens/s, "
        f"{plan.tokens_per_second / plan.setting.topology.chips:,.0f} per chip; "
        f"MFU {plan.update_mfu:.1%} in updates, {plan.step_mfu:.1%} over the step"
    )
    steps = plan.setting.config.train.steps
    run = f"run of {steps} steps: {plan.hours:.1f} hours"
    if plan.cost is not None:
        run += f", {plan.cost:,.0f} at {plan.price_per_hour:g} per chip and hour"
    return [*lines, run]


def _assumed(plan: Plan) -> list[str]:
    S, Z, A, padding = plan.lengths
    lengths = (
        f"mean tokens of a row: prompt {S}, trace {Z}, answer {A} (--tokens); {padding:.0%} of the "
        "positions of micro-batches are padding"
    )
    return ["assumed:", *(f"- {line}" for line in (lengths, *ASSUMED))]


def _gb(size: int | float) -> str:
    return f"{size / GB:.2f}"


def _peta(flops: int | float) -> str:
    return f"{flops / 1e15:.2f}"
