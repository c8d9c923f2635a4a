"""Which groups share the rows of a micro-batch: little padding, in few shapes.

A pack is what attention sees together: one row of S tokens that holds one or several prompts, and
rows of W tokens that hold their completions. Two groups of K = 2 traces in one pack:

    prompts    x1 x1 x1 x1 x2 x2 .  .
    rows       a1 a1 a1 a1 a1 b1 b1 b1          completions a of x1, b of x2
               a2 a2 a2 a2 a2 b2 b2 .
    baselines  a0 a0 a0 b0 b0 .  .  .           the empty traces

A micro-batch is a number of packs of one shape, and every shape is a compiled program. A packer
takes a shape that it knows as long as that leaves little padding; else it searches for the cheapest
one. Everything here is lengths in tokens; batch.py makes the arrays.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

TOLERATED_PADDING = 0.10
"""Share of padding at which a packer that knows few shapes takes one of them without a search."""
MICRO_BATCH_COST = 128
"""Cost of one more micro-batch, in positions: its gradient is added to those of the others."""


class Lengths(NamedTuple):
    """Token counts of one group."""

    prompt: int
    completions: tuple[int, ...]
    """Predicted tokens of each completion: z, t_end and y*."""
    baseline: int
    """Predicted tokens of the empty trace's completion: t_end and y*."""


class Shape(NamedTuple):
    """Sizes of the arrays of a micro-batch."""

    packs: int
    """On all devices."""
    groups: int
    """Most groups of a pack."""
    prompt_tokens: int
    rows: int
    """Rows of completions per pack."""
    row_tokens: int
    baseline_tokens: int
    """Tokens of the one row that holds all baselines of a pack."""
    completion_tokens: int
    """Tokens of the longest completion."""
    answer_tokens: int

    @property
    def pack_tokens(self) -> int:
        """Positions of a pack, padding included."""
        return self.prompt_tokens + self.rows * self.row_tokens + self.baseline_tokens

    @property
    def pack_scores(self) -> int:
        """Pairs of a query and a key in the completion rows of a pack."""
        return self.rows * self.row_tokens * (self.prompt_tokens + self.row_tokens)


class Layout(NamedTuple):
    """What bounds the shapes of a run."""

    micro_batch_prompts: int
    shards: int = 1
    """Devices that packs are split over."""
    sequence_shards: int = 1
    """Devices that the tokens of a row are split over."""
    equal_keys: float = math.inf
    """Keys per token at which attention costs as much as the rest of a layer."""
    packing: bool = True
    most_shapes: int | None = None
    """None for any number."""
    largest: Lengths | None = None
    """Lengths that no group of the run exceeds."""


def largest_shape(layout: Layout) -> Shape:
    """The shape of the largest micro-batch that the limits allow."""
    assert layout.largest is not None, "a bound needs the largest group there can be"
    return _one_group_per_pack([layout.largest], layout)


# --- packs and plans -----------------------------------------------------------------------------


@dataclass
class Pack:
    """Places of the groups that share a pack."""

    shape: Shape
    packing: bool = True
    """False: one completion per row."""
    groups: list[int] = field(default_factory=list)
    """The groups, by their index in the mini-batch."""
    prompt_starts: list[int] = field(default_factory=list)
    completion_places: list[list[tuple[int, int]]] = field(default_factory=list)
    """Row and first token of each completion of each group."""
    baseline_starts: list[int] = field(default_factory=list)
    prompt_used: int = 0
    baseline_used: int = 0
    row_used: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.row_used = [0] * self.shape.rows

    @property
    def completions_used(self) -> int:
        """Tokens of all completions."""
        return sum(self.row_used)

    def add(self, group: int, lengths: Lengths) -> bool:
        """Add the group if it fits."""
        shape = self.shape
        if (
            len(self.groups) == shape.groups
            or self.prompt_used + lengths.prompt > shape.prompt_tokens
            or self.baseline_used + lengths.baseline > shape.baseline_tokens
        ):
            return False
        placed = _place(self.row_used, shape.row_tokens, lengths.completions, self.packing)
        if placed is None:
            return False
        self.groups.append(group)
        self.row_used, places = placed
        self.completion_places.append(places)
        self.prompt_starts.append(self.prompt_used)
        self.baseline_starts.append(self.baseline_used)
        self.prompt_used += lengths.prompt
        self.baseline_used += lengths.baseline
        return True


def _place(
    used: list[int], width: int, lengths: Sequence[int], shared: bool
) -> tuple[list[int], list[tuple[int, int]]] | None:
    """First-fit-decreasing into rows of `width` tokens; None if a length fits in no row.

    Rows that are not `shared` take one length each.
    """
    if sum(used) + sum(lengths) > len(used) * width:
        return None
    used, places = list(used), [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row, start in enumerate(used):
            if start + lengths[i] <= width and (shared or not start):
                used[row], places[i] = start + lengths[i], (row, start)
                break
        else:
            return None
    return used, places


class Plan(NamedTuple):
    """The packs of a micro-batch."""

    shape: Shape
    packs: list[Pack]

    @property
    def groups(self) -> list[int]:
        """The groups, by their index in the mini-batch."""
        return [group for pack in self.packs for group in pack.groups]

    @property
    def padding(self) -> float:
        """Share of the positions that hold no token."""
        used = sum(p.prompt_used + p.completions_used + p.baseline_used for p in self.packs)
        return 1 - used / self.slots

    @property
    def slots(self) -> int:
        """Positions, padding included."""
        return self.shape.packs * self.shape.pack_tokens


def packing_metrics(plans: Sequence[Plan], packer: "Packer") -> dict[str, float]:
    """Padding and micro-batches of a step, and the number of shapes so far."""
    slots = sum(plan.slots for plan in plans)
    return {
        "batch/padding_share": sum(plan.padding * plan.slots for plan in plans) / slots,
        "batch/micro_batches": float(len(plans)),
        "batch/shapes": float(len(packer.shapes)),
    }


# --- packer --------------------------------------------------------------------------------------


@dataclass
class Packer:
    """Splits mini-batches into micro-batches of at most `layout.most_shapes` shapes."""

    layout: Layout
    shapes: list[Shape] = field(default_factory=list)
    """Known shapes. They are saved with a run, since sums may round differently in other shapes."""

    def get_state(self) -> dict[str, Any]:
        """The shapes, for a checkpoint."""
        return {"layout": repr(self.layout), "shapes": [list(shape) for shape in self.shapes]}

    def set_state(self, saved: dict[str, Any]) -> None:
        """Continue with the shapes of a checkpoint, if its layout is the same."""
        if saved["layout"] == repr(self.layout):
            self.shapes = [Shape(*sizes) for sizes in saved["shapes"]]

    def plan(self, lengths: Sequence[Lengths]) -> list[Plan]:
        """The groups of a mini-batch as micro-batches, groups with long completions first."""
        left = sorted(range(len(lengths)), key=lambda p: (-max(lengths[p].completions), p))
        plans = []
        while left:
            plans.append(self._next({p: lengths[p] for p in left}))
            taken = set(plans[-1].groups)
            left = [p for p in left if p not in taken]
        return plans

    def _next(self, left: dict[int, Lengths]) -> Plan:
        """A micro-batch that holds the first of the groups, and others that fit."""
        known = [plan for shape in self.shapes if (plan := self._fill(left, shape)).packs]
        best = min(known, key=self._cost, default=None)
        if best is not None and best.padding <= self._tolerated_padding():
            return best
        if self._one_shape_left:
            # The last shape must hold whatever comes.
            best = self._fill(left, self._shape_for_all(left))
            assert best.packs, "no group is larger than the largest"
        else:
            best = min((*known, *self._candidates(left)), key=self._cost)
        if best.shape not in self.shapes:
            self.shapes.append(best.shape)
        return best

    @property
    def _one_shape_left(self) -> bool:
        most = self.layout.most_shapes
        return most is not None and len(self.shapes) >= most - 1

    def _tolerated_padding(self) -> float:
        """Share of padding for which no other shape is searched: more, the fewer are left."""
        if self._one_shape_left:
            return 1.0
        most = self.layout.most_shapes or math.inf
        return TOLERATED_PADDING + (1 - TOLERATED_PADDING) * (len(self.shapes) / most) ** 3

    def _cost(self, plan: Plan) -> float:
        """Work per token that is not padding."""
        return self._cost_of_shape(plan.shape) / ((1 - plan.padding) * plan.slots)

    def _cost_of_shape(self, shape: Shape) -> float:
        """Work of a micro-batch: positions, weighted by the keys that each sees."""
        keys = self.layout.equal_keys
        S, W, E = shape.prompt_tokens, shape.row_tokens, shape.baseline_tokens
        cost = S * (1 + S / keys) + shape.rows * W * (1 + (S + W) / keys)
        cost += E * (1 + (S + E) / keys) / 3  # no backward pass
        return cost * shape.packs + MICRO_BATCH_COST

    def _fill(self, left: dict[int, Lengths], shape: Shape) -> Plan:
        """The groups that fit, the first of all among them; no packs if that one does not fit.

        Each group goes into the fullest pack that still takes it.
        """
        packs: list[Pack] = []
        for p, lengths in left.items():
            completion, answer = max(lengths.completions), lengths.baseline - 1
            fits = completion <= shape.completion_tokens and answer <= shape.answer_tokens
            fullest_first = sorted(packs, key=lambda pack: -pack.completions_used)
            if len(packs) < shape.packs:
                fullest_first.append(Pack(shape, self.layout.packing))
            added = next((pack for pack in fullest_first if fits and pack.add(p, lengths)), None)
            if added is None and not packs:
                break
            if added is not None and len(added.groups) == 1:
                packs.append(added)
        return Plan(shape, packs)

    def _candidates(self, left: dict[int, Lengths]) -> Iterator[Plan]:
        """One group per pack; and more groups per pack, within the memory that one of the largest
        size per pack may take."""
        layout = self.layout
        count = min(len(left), layout.micro_batch_prompts)
        first = list(left.values())[:count]
        alone = _one_group_per_pack(first, layout)
        yield self._fill(left, alone._replace(packs=_multiple(count, layout.shards)))
        if not layout.packing:
            return
        limit = alone if layout.largest is None else _one_group_per_pack([layout.largest], layout)
        for shape in _shared(first, layout, alone._replace(groups=len(left))):
            for packs in self._pack_counts(shape, limit):
                plan = self._fill(left, shape._replace(packs=packs))
                if plan.packs:
                    yield self._trimmed(plan)

    def _pack_counts(self, shape: Shape, limit: Shape) -> set[int]:
        """Numbers of packs, up to the memory of `limit`."""
        fits = min(
            limit.packs * limit.pack_tokens // shape.pack_tokens,
            limit.packs * limit.pack_scores // shape.pack_scores,
        )
        most = fits // self.layout.shards
        return {packs * self.layout.shards for packs in (most, (most + 1) // 2, min(most, 1))}

    def _cost_of_all(self, left: dict[int, Lengths], shape: Shape) -> float:
        """Cost of all groups in micro-batches of this shape; infinite where one does not fit."""
        count, rest = 0, left
        while taken := self._fill(rest, shape).groups:
            rest = {p: lengths for p, lengths in rest.items() if p not in taken}
            count += 1
        return math.inf if rest else count * self._cost_of_shape(shape)

    def _shape_for_all(self, left: dict[int, Lengths]) -> Shape:
        """Holds the largest group: one group per pack or, for a first shape, at the least cost."""
        layout = self.layout
        assert layout.largest is not None, "a bound needs the largest group there can be"
        alone = _one_group_per_pack([layout.largest], layout)
        if not layout.packing or self.shapes:
            return alone
        shapes, K = [alone], len(layout.largest.completions)
        for shape in _shared(list(left.values()), layout, alone._replace(groups=len(left))):
            rows = max(shape.rows, -(-K // (shape.row_tokens // alone.row_tokens)))
            shape = shape._replace(
                rows=rows,
                prompt_tokens=max(shape.prompt_tokens, alone.prompt_tokens),
                baseline_tokens=max(shape.baseline_tokens, alone.baseline_tokens),
            )
            shapes += [shape._replace(packs=packs) for packs in self._pack_counts(shape, alone)]
        return min(shapes, key=lambda shape: self._cost_of_all(left, shape))

    def _trimmed(self, plan: Plan) -> Plan:
        """Without empty packs."""
        packs = _multiple(len(plan.packs), self.layout.shards)
        groups = _power_of_two(max(len(pack.groups) for pack in plan.packs))
        return plan._replace(shape=plan.shape._replace(packs=packs, groups=groups))


# --- shapes --------------------------------------------------------------------------------------


def _one_group_per_pack(lengths: Sequence[Lengths], layout: Layout) -> Shape:
    """One completion per row, in rows as long as the longest."""
    shards = layout.sequence_shards
    longest = max(max(group.completions) for group in lengths)
    return Shape(
        packs=layout.micro_batch_prompts,
        groups=1,
        prompt_tokens=_rounded(max(group.prompt for group in lengths), shards),
        rows=max(len(group.completions) for group in lengths),
        row_tokens=_rounded(longest, shards),
        baseline_tokens=_rounded(max(group.baseline for group in lengths), shards),
        completion_tokens=_power_of_two(longest),
        answer_tokens=_power_of_two(max(group.baseline - 1 for group in lengths)),
    )


def _shared(lengths: Sequence[Lengths], layout: Layout, alone: Shape) -> Iterator[Shape]:
    """Packs for 1, 2, 4, ... groups of the mean size, which also hold the largest of them."""
    count, shards = len(lengths), layout.sequence_shards

    def tokens(groups: int, sizes: Sequence[int]) -> int:
        return max(max(sizes), math.ceil(groups * sum(sizes) / count))

    for groups in _powers_of_two(alone.groups):
        completion_tokens = tokens(groups, [sum(group.completions) for group in lengths])
        prompt_tokens = tokens(groups, [group.prompt for group in lengths])
        baseline_tokens = tokens(groups, [group.baseline for group in lengths])
        shape = alone._replace(
            prompt_tokens=_rounded(prompt_tokens, shards),
            baseline_tokens=_rounded(baseline_tokens, shards),
        )
        # From one long row to rows as short as the longest completion.
        for rows in _powers_of_two(2 * -(-completion_tokens // alone.row_tokens) - 1):
            width = max(alone.row_tokens, _rounded(math.ceil(completion_tokens / rows), shards))
            yield shape._replace(rows=rows, row_tokens=width)


def _powers_of_two(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]


def _power_of_two(length: int) -> int:
    """Rounded up to a power of two; 0 stays 0."""
    return 0 if length <= 0 else 1 << (length - 1).bit_length()


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _rounded(length: int, shards: int) -> int:
    """Rounded up to one of sixteen lengths per octave, multiples of 8 and of the shards."""
    if length <= 0:
        return 0
    step = max(8, 1 << max(0, (length - 1).bit_length() - 5))
    return _multiple(_multiple(length, step), shards)
