"""The collectives of a compiled program, read off its text, with loops multiplied out.

XLA's own cost analysis counts the body of a loop once. Here a computation runs as often as its
callers call it: the body of a `while` as often as its loop, whose passes XLA writes beside it on
the platforms where it knows them, and which follow from its condition elsewhere.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "bf16": 2, "token": 0} | {
    f"{kind}{bits}": bits / 8 for kind in "fsu" for bits in (2, 4, 8, 16, 32, 64)
}
SHAPE = re.compile(r"\b(pred|bf16|f8e\w+|[fsu]\d+)\[([\d,]*)\]")
KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
CALLS = "calls|to_apply|body|condition|true_computation|false_computation"


class Collective(NamedTuple):
    """A collective of a program."""

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """Dtype and dims of the operands on one device."""
    devices: int
    """Of a group that exchanges."""
    bytes_sent: float
    """By one device in one run of it, in a ring."""
    count: int
    """Runs per run of the program."""
    loops: tuple[int, ...]
    """Passes of the loops around it, the outermost first."""
    source: str
    """Where the model asks for it: `file:line`, or the operation."""
    group: tuple[int, ...] = ()
    """The devices that exchange with the first one, by their places in the mesh; empty for all."""

    @property
    def total_bytes(self) -> float:
        """Sent by one device per run of the program."""
        return self.bytes_sent * self.count


class _Instruction(NamedTuple):
    name: str
    type: str
    op: str
    operands: str
    attributes: str
    root: bool


_Program = dict[str, list[_Instruction]]


def collectives(text: str, devices: int, *, conditional: bool = False) -> list[Collective]:
    """Every collective of a compiled program of this many devices.

    Those in branches that run on a condition are left out, unless `conditional`.
    """
    program, entry = _parse(text)
    found, source_of = [], _Sources(text)
    for computation, loops in _loops_around(program, entry, conditional):
        types = {i.name: i.type for i in program[computation]}
        for i in program[computation]:
            kind = i.op.removesuffix("-start")
            if kind not in KINDS:
                continue
            if computation.startswith("all-reduce-scatter"):
                # TPUs run this sum and the slice of it as one operation.
                kind = "reduce-scatter"
            names = map(_name, _split(i.operands))
            shapes = tuple(s for name in names for s in _shapes(types.get(name, "")))
            shapes = shapes or tuple(_shapes(i.operands))
            size = _group_size(i.attributes, devices)
            sent = _bytes_sent(kind, shapes, size)
            count = math.prod(loops)
            group = _first_group(i.attributes)
            found.append(Collective(kind, shapes, size, sent, count, loops, source_of(i), group))
    return found


def _bytes_sent(kind: str, shapes: Sequence[tuple[str, tuple[int, ...]]], devices: int) -> float:
    """Bytes that a device sends in a ring."""
    operand = sum(_size(dtype) * math.prod(dims) for dtype, dims in shapes)
    rest = devices - 1
    match kind:
        case "all-gather":
            return operand * rest
        case "all-reduce":
            return 2 * operand * rest / devices
        case "reduce-scatter" | "all-to-all" | "ragged-all-to-all":
            return operand * rest / devices
        case _:
            return operand


def _size(dtype: str) -> float:
    return 1.0 if dtype.startswith("f8") else float(BYTES[dtype])


def _shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(d, tuple(int(n) for n in dims.split(",") if n)) for d, dims in SHAPE.findall(text)]


def matrix_flops(text: str) -> float:
    """Operations of the matrix products of one device, those of Pallas kernels left out."""
    program, entry = _parse(text)
    total = 0.0
    for computation, loops in _loops_around(program, entry, conditional=True):
        shapes = {i.name: _shapes(i.type) for i in program[computation]}
        for i in program[computation]:
            if i.op in ("dot", "convolution"):
                left, right = (shapes[_name(operand)][0][1] for operand in _split(i.operands))
                count = _dot if i.op == "dot" else _convolution
                total += count(i, left, right, _shapes(i.type)[0][1]) * math.prod(loops)
    return total


def _dot(
    i: _Instruction, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]
) -> float:
    del right
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
    contracted = [int(n) for n in found.group(1).split(",") if n] if found else []
    return 2.0 * math.prod(out) * math.prod(left[n] for n in contracted)


def _convolution(
    i: _Instruction, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]
) -> float:
    """A product as XLA for TPUs writes it; its window takes some pairs of spatial indices only."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels is not None
    of_left, of_right, of_out = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    said = dict(part.split("=") for part in window.group(1).split(" ")) if window else {}
    products = 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")]
    for n, label in enumerate(sorted(c for c in of_left if c.isdigit())):
        size, kernel = left[of_left.index(label)], right[of_right.index(label)]

        def setting(name: str, default: str, n: int = n) -> int:
            return int(said[name].split("x")[n].split("_")[0]) if name in said else int(default)

        stride, dilation = setting("stride", "1"), setting("lhs_dilate", "1")
        spread, before = setting("rhs_dilate", "1"), setting("pad", "0")
        at = np.arange(out[of_out.index(label)], dtype=np.int64)[:, None] * stride
        at = at + np.arange(kernel, dtype=np.int64)[None] * spread - before
        products *= int(((at >= 0) & (at % dilation == 0) & (at // dilation < size)).sum())
    return products


# --- the text -------------------------------------------------------------------------------------


def _parse(text: str) -> tuple[_Program, str]:
    """The computations by their names, and the name of the one that runs."""
    program: _Program = {}
    entry, current = "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY\s+)?%?([\w.\-]+)\s.*->.*\{\s*$", line)
        if head and not line.startswith(" "):
            current = head.group(2)
            program[current] = []
            entry = current if head.group(1) else entry
        elif line.strip() == "}":
            current = None
        elif current is not None and (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line)):
            program[current].append(_instruction(found.group(2), found.group(3), found.group(1)))
    return program, entry


def _instruction(name: str, text: str, root: str | None) -> _Instruction:
    """From `TYPE op(operands), attributes`, where a type may be a tuple of types."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    kind, text = text[:end], text[end:].lstrip()
    start = text.index("(")
    end = _closing(text, start)
    return _Instruction(
        name, kind, text[:start], text[start + 1 : end], text[end + 1 :], bool(root)
    )


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found.group() == "(" else -1
        if not depth:
            return start + found.start()
    return len(text)


def _split(operands: str) -> list[str]:
    """Operands, which commas separate where they are in no brackets."""
    operands = re.sub(r"/\*.*?\*/", "", operands)
    return [part.strip() for part in re.split(r",(?![^\[{(]*[\]})])", operands) if part.strip()]


def _name(operand: str) -> str:
    return operand.split(" ")[-1].lstrip("%")


def _called(i: _Instruction) -> Iterator[tuple[str, str]]:
    """How an instruction calls which computations."""
    for how, name in re.findall(rf"({CALLS})=%?([\w.\-]+)", i.attributes):
        yield how, name
    for how, names in re.findall(
        r"(branch_computations|called_computations)=\{([^}]*)\}", i.attributes
    ):
        for name in names.split(","):
            yield how, name.strip().lstrip("%")


def _group_size(attributes: str, devices: int) -> int:
    """Devices of a group, in any of the forms of XLA."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found.group(1).split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found.group(1))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        # 'axis':(2)4 is a part of an axis: 4 of its devices.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 2 if "source_target_pairs" in attributes else devices


def _first_group(attributes: str) -> tuple[int, ...]:
    """Devices of the group of device 0, or of the first pair, in any of the forms of XLA."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", attributes):
        return tuple(map(int, found.group(1).split(",")))
    if found := re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        groups, size, dims, order = found.groups()
        shape = [int(n) for n in dims.split(",")]
        ids = np.arange(math.prod(shape)).reshape(shape)
        ids = ids.transpose([int(n) for n in order.split(",")]) if order else ids
        return tuple(ids.reshape(int(groups), int(size))[0].tolist())
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", found.group(1))}
        axes = [axis for axis, _ in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found.group(2))]
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        at = tuple(slice(None) if axis in axes else 0 for axis in sizes)
        return tuple(ids[at].reshape(-1).tolist())
    return ()


# --- loops ----------------------------------------------------------------------------------------


def _loops_around(
    program: _Program, entry: str, conditional: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every computation that runs, once per place that calls it, with the passes of its loops."""
    todo: list[tuple[str, tuple[int, ...]]] = [(entry, ())]
    while todo:
        computation, loops = todo.pop()
        yield computation, loops
        for i in program[computation]:
            for how, name in _called(i):
                if name not in program or (how == "to_apply" and i.op != "call"):
                    continue
                branch = how == "branch_computations" or how.endswith("e_computation")
                if branch and not conditional:
                    continue
                passes = _passes(program, i) if i.op == "while" else None
                todo.append((name, loops if passes is None else (*loops, passes)))


def _passes(program: _Program, loop: _Instruction) -> int:
    """Passes of a loop; 1 for one that ends by a condition on data."""
    if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
        return int(known.group(1))
    names = dict(_called(loop))
    limits = [value for value in _constants(program, names["condition"]) if value > 0]
    return max(limits) // _stride(program, names) if limits else 1


def _constants(program: _Program, computation: str) -> Iterator[int]:
    """The integers that a computation and those that it calls have as constants."""
    for i in program.get(computation, []):
        if i.op == "constant" and re.match(r"[su]32\[\]", i.type):
            yield int(i.operands)
        for _, name in _called(i):
            yield from _constants(program, name)


def _stride(program: _Program, names: Mapping[str, str]) -> int:
    """By how much the counter of a loop grows in a pass: more than 1 in an unrolled one."""
    condition = {i.name: i for i in program[names["condition"]]}
    body = {i.name: i for i in program[names["body"]]}
    compare = next((i for i in condition.values() if i.op == "compare"), None)
    counter = compare and condition.get(_name(_split(compare.operands)[0]))
    index = counter and re.search(r"index=(\d+)", counter.attributes)
    root = next((i for i in body.values() if i.root), None)
    if not index or root is None or root.op != "tuple":
        return 1
    add = body.get(_name(_split(root.operands)[int(index.group(1))]))
    if add is None or add.op != "add":
        return 1
    for operand in _split(add.operands):
        i = body.get(_name(operand))
        if i is not None and i.op == "constant":
            return int(i.operands)
    return 1


# --- sources --------------------------------------------------------------------------------------


class _Sources:
    """The place in this package that an instruction comes from.

    A text has tables of stack frames, or a file and line at each instruction.
    """

    def __init__(self, text: str):
        self.files, self.locations, self.stacks = (
            self._table(text, name) for name in ("FileNames", "FileLocations", "StackFrames")
        )

    def __call__(self, i: _Instruction) -> str:
        frame = re.search(r"stack_frame_id=(\d+)", i.attributes)
        place = self._innermost(int(frame.group(1))) if frame else ""
        if not place and (
            found := re.search(r'source_file="([^"]*)" source_line=(\d+)', i.attributes)
        ):
            place = f"{found.group(1).split('nrt_jax/')[-1]}:{found.group(2)}"
        operation = re.search(r'op_name="([^"]*)"', i.attributes)
        return place or (operation.group(1)[-60:] if operation else "")

    @staticmethod
    def _table(text: str, name: str) -> dict[int, str]:
        found = re.search(rf"^{name}\n((?:\d+ .*\n)+)", text, re.MULTILINE)
        lines = re.findall(r"^(\d+) (.*)$", found.group(1), re.MULTILINE) if found else []
        return {int(number): line for number, line in lines}

    def _innermost(self, frame: int) -> str:
        """The innermost frame in nrt_jax."""
        seen = set()
        while frame in self.stacks and frame not in seen:
            seen.add(frame)
            fields = dict(re.findall(r"(\w+)=(\d+)", self.stacks[frame]))
            location = dict(
                re.findall(r"(\w+)=(\d+)", self.locations.get(int(fields["file_location_id"]), ""))
            )
            file = self.files.get(int(location.get("file_name_id", 0)), "").strip('"')
            if "nrt_jax/" in file:
                return f"{file.split('nrt_jax/')[-1]}:{location['line']}"
            frame = int(fields.get("parent_frame_id", 0))
        return ""
