"""Which groups share rows of a batch: little padding, in few shapes, each of which is a program.

A pack is what attention sees together: one row of S tokens that holds one or several prompts, and
rows of W tokens that hold their completions. Two groups of K = 2 traces in one pack:

    prompts    x1 x1 x1 x1 x2 x2 .  .
    rows       a1 a1 a1 a1 a1 b1 b1 b1          completions a of x1, b of x2
               a2 a2 a2 a2 a2 b2 b2 .
    baselines  a0 a0 a0 b0 b0 .  .  .           the empty traces

A micro-batch is a number of packs. Everything here is lengths in tokens; batch.py makes the arrays.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from nrt_jax.config.architecture import Architecture
from nrt_jax.models.flops import Rows, forward_flops

BEARABLE_PADDING = 0.10
"""Share of padding for which no new shape is looked for while there are few."""
LARGEST_WASTE = 1.05
"""A shape that a batch before had is taken again unless it costs this times the best there is."""
MICRO_BATCH_COST = 128
"""What one micro-batch more costs, in positions: its gradient is added to the others."""
SLACK = 1.05
"""Room of a pack beyond that of its mean groups, which all of them do not fill alike."""
MOST_GROUPS = 64
"""Groups that may share a pack."""
GROUPS_PER_PACK = (1, 2, 3, 4, 6, 8, 12, 16)
EVEN_PARTS = (1, 2, 3, 4, 6)
"""Micro-batches that all groups that are left are split into evenly."""
WINDOW = 4
"""Groups that are tried, for each that a shape has room for: enough to fill holes."""
ROWS_PER_PACK = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


class Lengths(NamedTuple):
    """Tokens of one group."""

    prompt: int
    completions: tuple[int, ...]
    """Predicted tokens of each completion: z, t_end and y*."""
    baseline: int
    """Predicted tokens of the empty trace: t_end and y*."""


class Shape(NamedTuple):
    """What the arrays of a micro-batch are like; one compiled program each."""

    packs: int
    """On all devices."""
    groups: int
    """Most groups of a pack."""
    prompt_tokens: int
    rows: int
    row_tokens: int
    baseline_tokens: int
    """All baselines of a pack lie in one row."""
    completion_tokens: int
    """Longest completion; a row may hold several."""
    answer_tokens: int

    @property
    def pack_tokens(self) -> int:
        """Positions of a pack, padding included."""
        return self.prompt_tokens + self.rows * self.row_tokens + self.baseline_tokens

    @property
    def pack_scores(self) -> int:
        """Pairs of a query and a key in the rows of completions of a pack."""
        return self.rows * self.row_tokens * (self.prompt_tokens + self.row_tokens)


class Layout(NamedTuple):
    """What bounds the shapes of a run."""

    micro_batch_prompts: int
    shards: int = 1
    """Devices that packs are split over."""
    sequence_shards: int = 1
    """Devices that the tokens of a row are split over."""
    equal_keys: float = math.inf
    """Keys a token at which attention costs what the rest of a layer does."""
    packing: bool = True
    most_shapes: int | None = None
    """None: any number."""
    largest: Lengths | None = None
    """Lengths that no group of the run exceeds."""


def equal_keys(architecture: Architecture) -> float:
    """Keys a token at which attention costs what the products with weights do."""
    of_a_token = forward_flops(architecture, Rows(tokens=1, keys=1))
    return of_a_token.weights / of_a_token.attention


@dataclass
class Pack:
    """The places of the groups that share a pack."""

    shape: Shape
    packing: bool = True
    groups: list[int] = field(default_factory=list)
    """Which groups, by their number in the mini-batch."""
    prompt_starts: list[int] = field(default_factory=list)
    completion_places: list[list[tuple[int, int]]] = field(default_factory=list)
    """Row and first token of each completion of each group."""
    baseline_starts: list[int] = field(default_factory=list)
    prompt_used: int = 0
    completion_used: int = 0
    baseline_used: int = 0
    row_used: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.row_used = [0] * self.shape.rows

    def add(self, group: int, lengths: Lengths) -> bool:
        """Take the group in, where it fits."""
        shape, tokens = self.shape, sum(lengths.completions)
        if (
            len(self.groups) == shape.groups
            or self.prompt_used + lengths.prompt > shape.prompt_tokens
            or self.completion_used + tokens > shape.rows * shape.row_tokens
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
        self.completion_used += tokens
        self.baseline_used += lengths.baseline
        return True


def _place(
    used: list[int], width: int, lengths: Sequence[int], shared: bool
) -> tuple[list[int], list[tuple[int, int]]] | None:
    """Each length into the first row with room, long ones first; None where one finds none.

    A row that is not shared is full as soon as it holds anything.
    """
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
    """Where the groups of a micro-batch go."""

    shape: Shape
    packs: list[Pack]

    @property
    def groups(self) -> list[int]:
        """Which groups, by their number in the mini-batch."""
        return [group for pack in self.packs for group in pack.groups]

    @property
    def padding(self) -> float:
        """Share of the positions that hold no token."""
        used = sum(u.prompt_used + u.completion_used + u.baseline_used for u in self.packs)
        return 1 - used / self.slots

    @property
    def slots(self) -> int:
        """Positions, padding included."""
        return self.shape.packs * self.shape.pack_tokens


@dataclass
class Packer:
    """Lays mini-batches out, in no more shapes than the layout allows."""

    layout: Layout
    shapes: list[Shape] = field(default_factory=list)
    """Those in use; part of a run's state, since a sum may round by the shape it runs in."""

    def get_state(self) -> dict[str, Any]:
        """The shapes, for a checkpoint."""
        return {"layout": repr(self.layout), "shapes": [list(shape) for shape in self.shapes]}

    def set_state(self, saved: dict[str, Any]) -> None:
        """Go on with the shapes of a checkpoint, if they are of the same layout."""
        if saved["layout"] == repr(self.layout):
            self.shapes = [Shape(*sizes) for sizes in saved["shapes"]]

    def plan(self, lengths: Sequence[Lengths]) -> list[Plan]:
        """The groups of a mini-batch as micro-batches, those with the longest completions first."""
        left = sorted(range(len(lengths)), key=lambda p: (-max(lengths[p].completions), p))
        plans = []
        while left:
            plans.append(self._next({p: lengths[p] for p in left}))
            taken = set(plans[-1].groups)
            left = [p for p in left if p not in taken]
        return plans

    def _next(self, left: dict[int, Lengths]) -> Plan:
        """A micro-batch with the first of the groups: in the best of the known shapes, or in one
        that wastes less and becomes known."""
        known = [plan for shape in self.shapes if (plan := self._fill(left, shape)).packs]
        again = min(known, key=self._cost, default=None)
        if again is not None and (again.padding <= self._bearable() or self._full):
            return again
        if self._full:
            # The last one must hold whatever comes.
            assert self.layout.largest is not None, "a bound needs the largest group there can be"
            best = self._fill(left, _alone([self.layout.largest], self.layout))
            assert best.packs, "no group is larger than the largest"
        else:
            best = min(self._candidates(left), key=self._cost)
            if again is not None and self._cost(again) <= LARGEST_WASTE * self._cost(best):
                return again
        self.shapes.append(best.shape)
        return best

    @property
    def _full(self) -> bool:
        """Whether no shape may become known but that of the largest groups."""
        most = self.layout.most_shapes
        return most is not None and len(self.shapes) >= most - 1

    def _bearable(self) -> float:
        """The share of padding for which no other shape is looked for: more, the fewer are left."""
        most = self.layout.most_shapes or math.inf
        return BEARABLE_PADDING + (1 - BEARABLE_PADDING) * (len(self.shapes) / most) ** 3

    def _cost(self, plan: Plan) -> float:
        """Positions with the keys that each sees, for each token that is no padding."""
        shape, keys = plan.shape, self.layout.equal_keys
        S, W, E = shape.prompt_tokens, shape.row_tokens, shape.baseline_tokens
        cost = S * (1 + S / keys) + shape.rows * W * (1 + (S + W) / keys)
        cost += E * (1 + (S + E) / keys) / 3  # no backward pass
        return (cost * shape.packs + MICRO_BATCH_COST) / ((1 - plan.padding) * plan.slots)

    def _fill(self, left: dict[int, Lengths], shape: Shape) -> Plan:
        """The groups that find room, the first of all among them; no packs where that has none.

        Each goes into the fullest pack with room for it.
        """
        packs: list[Pack] = []
        for p, lengths in islice(left.items(), WINDOW * shape.packs * shape.groups):
            completion, answer = max(lengths.completions), lengths.baseline - 1
            fits = completion <= shape.completion_tokens and answer <= shape.answer_tokens
            fullest_first = sorted(packs, key=lambda pack: -pack.completion_used)
            if len(packs) < shape.packs:
                fullest_first.append(Pack(shape, self.layout.packing))
            added = next((u for u in fullest_first if fits and u.add(p, lengths)), None)
            if added is None and not packs:
                break
            if added is not None and len(added.groups) == 1:
                packs.append(added)
        return Plan(shape, packs)

    def _candidates(self, left: dict[int, Lengths]) -> Iterator[Plan]:
        """A pack a group, and plans of more groups and rows a pack, none of which takes more memory
        than a pack a group can."""
        layout = self.layout
        count = min(len(left), layout.micro_batch_prompts)
        first = list(islice(left.values(), count))
        alone = _alone(first, layout)
        yield self._fill(left, alone._replace(packs=_multiple(count, layout.shards)))
        if not layout.packing:
            return
        # Memory must do for a pack a group of the largest size.
        most = alone if layout.largest is None else _alone([layout.largest], layout)
        even = [len(left) / (layout.shards * parts) for parts in EVEN_PARTS]
        shapes = (
            *_shared(first, layout, alone, GROUPS_PER_PACK),
            *_shared(list(left.values()), layout, alone, [g for g in even if g > 1]),
        )
        for shape in shapes:
            fits = min(
                most.packs * most.pack_tokens // shape.pack_tokens,
                most.packs * most.pack_scores // shape.pack_scores,
            )
            most_packs = fits // layout.shards
            for packs in {most_packs, (most_packs + 1) // 2, min(most_packs, 1)}:
                packs *= layout.shards
                plan = self._fill(left, shape._replace(packs=packs))
                if plan.packs:
                    yield self._trimmed(plan)

    def _trimmed(self, plan: Plan) -> Plan:
        """Without packs that nothing is in."""
        packs = _multiple(len(plan.packs), self.layout.shards)
        groups = _power(max(len(pack.groups) for pack in plan.packs))
        return plan._replace(shape=plan.shape._replace(packs=packs, groups=groups))


def packing_metrics(plans: Sequence[Plan], packer: Packer) -> dict[str, float]:
    """How well the groups of a step fill their rows, and in how many shapes so far."""
    slots = sum(plan.slots for plan in plans)
    return {
        "batch/padding_share": sum(plan.padding * plan.slots for plan in plans) / slots,
        "batch/micro_batches": float(len(plans)),
        "batch/shapes": float(len(packer.shapes)),
    }


def _alone(lengths: Sequence[Lengths], layout: Layout) -> Shape:
    """A pack a group and a row a completion, as long as the longest."""
    shards = layout.sequence_shards
    longest = max(max(group.completions) for group in lengths)
    return Shape(
        packs=layout.micro_batch_prompts,
        groups=1,
        prompt_tokens=_rounded(max(group.prompt for group in lengths), shards),
        rows=max(len(group.completions) for group in lengths),
        row_tokens=_rounded(longest, shards),
        baseline_tokens=_rounded(max(group.baseline for group in lengths), shards),
        completion_tokens=_power(longest),
        answer_tokens=_power(max(group.baseline - 1 for group in lengths)),
    )


def _shared(
    lengths: Sequence[Lengths], layout: Layout, alone: Shape, numbers: Sequence[float | int]
) -> Iterator[Shape]:
    """Units with room for such numbers of groups of the mean size, and always for the largest."""
    count, shards = len(lengths), layout.sequence_shards

    def room(groups: float | int, sizes: Sequence[int]) -> int:
        return max(max(sizes), math.ceil(SLACK * groups * sum(sizes) / count))

    for groups in numbers:
        tokens = room(groups, [sum(group.completions) for group in lengths])
        shape = alone._replace(
            groups=MOST_GROUPS,
            prompt_tokens=_rounded(room(groups, [group.prompt for group in lengths]), shards),
            baseline_tokens=_rounded(room(groups, [group.baseline for group in lengths]), shards),
        )
        for rows in ROWS_PER_PACK:
            width = max(alone.row_tokens, _rounded(math.ceil(tokens / rows), shards))
            yield shape._replace(rows=rows, row_tokens=width)
            if alone.row_tokens * rows >= tokens:
                break


def _power(length: int) -> int:
    """Up to a power of two, 0 of nothing."""
    return 0 if length <= 0 else 1 << (length - 1).bit_length()


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _rounded(length: int, shards: int) -> int:
    """Up to one of sixteen lengths an octave, multiples of 8 and of the shards."""
    if length <= 0:
        return 0
    step = max(8, 1 << max(0, (length - 1).bit_length() - 5))
    return _multiple(_multiple(length, step), shards)
