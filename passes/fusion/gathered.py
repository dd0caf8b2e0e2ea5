"""What a gather takes from memory: strides for what it does not index, addresses by experiment for what it does.

    index(permute(latent), [batch, None, rows // w, rows % w])      entries of the latent's memory

The index tensors are run for drawn active rows; they count samples, rows, and the pixels of a patch at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ras_compile.passes.analysis.roles import Role, role_of
from ras_compile.passes.fusion.addresses import ancestors, evaluate
from ras_compile.passes.fusion.walks import VIEWS, Digits, Walk, chained, contiguous, moves_entries, numbers
from ras_compile.passes.programs.aliases import overlaps_itself

LARGEST = 1 << 24  # entries of index tensors that are looked at, in all draws together


@dataclass(frozen=True)
class Gathered:
    """`index(moves(base), indices)`, a value of some of the rows of a dense one."""

    base: fx.Node  # an input of the graph or a view of one; all addresses are entries of its memory
    places: Walk  # how the value's entries visit the index tensors, broadcast to one shape
    memory: Walk  # how they visit the base's memory, apart from what the indices say
    shape: torch.Size  # that of the index tensors, broadcast
    indices: list[tuple[fx.Node, Digits]]  # the index tensors, each with the digits of its dim in memory
    behind: list[fx.Node]  # what computes them from the active rows
    rows: fx.Node  # the active rows

    @staticmethod
    def of(index: fx.Node, rows: fx.Node) -> Gathered | None:
        """None where what is indexed was computed, or is written, or has no strides."""
        value, given = index.args[0], index.args[1]
        assert isinstance(value, fx.Node) and isinstance(given, Sequence)
        base, moves = value, []
        while base.op == "call_function":
            if not moves_entries(base):
                return None
            moves.append(base)
            base = base.all_input_nodes[0]
        while moves and moves[-1].target in VIEWS:  # no copy yet
            base = moves.pop()
        named = {dim: node for dim, node in enumerate(given) if isinstance(node, fx.Node)}
        behind = ancestors(list(named.values()), rows)
        # a cache is written in between
        if role_of(base) is Role.CACHE or overlaps_itself(base.meta["val"]) or behind is None:
            return None
        if any(node.meta["val"].dtype is not torch.int64 for node in named.values()):
            return None
        whole = Walk.of(contiguous(value))
        walk = chained(moves, whole)
        walk = None if walk is None else walk.over(Walk(Walk.of(base.meta["val"]).runs))
        split = None if walk is None else walk.split(whole.runs)
        if split is None:
            return None
        dims, offset = split
        shape = torch.broadcast_shapes(*(node.meta["val"].shape for node in named.values()))
        # Their dims stand where the indexed ones stood if those are neighbours, else in front.
        first = min(named) if [*named] == [*range(min(named), max(named) + 1)] else 0
        indexed = [(size, stride, 0) for size, stride in Walk.of(torch.empty(shape, device="meta")).runs]
        rest = [[(size, 0, stride) for size, stride in digits] for dim, digits in enumerate(dims) if dim not in named]
        runs = [run for part in (*rest[:first], indexed, *rest[first:]) for run in part]
        return Gathered(
            base,
            Walk(tuple((size, place) for size, place, _ in runs)),
            Walk(tuple((size, stride) for size, _, stride in runs), offset),
            shape,
            [(node, dims[dim]) for dim, node in named.items()],
            behind,
            rows,
        )

    def addresses(
        self, order: Walk, lead: tuple[int, int], channels: int, draws: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor] | None:
        """Addresses of the first channel [B, A], for each draw, and what each channel adds to them [channels].

        None where they are no such sum.

        Args:
            order: how [B, A, channels] visits the value's entries.
        """
        if self.shape.numel() * len(draws) > LARGEST:
            return None
        counts = ((lead[0], lead[1] * channels), (lead[1], channels), (channels, 1))
        walks = [order.over(self.places), order.over(self.memory)]
        index, memory = (None if walk is None else walk.split(counts) for walk in walks)
        if index is None or memory is None:
            return None
        (places, place), (strides, offset) = index, memory
        by_row, rest = numbers(Walk(places[0] + places[1], place)), numbers(Walk(strides[0] + strides[1], offset))
        # The channels that the index tensors tell apart, and all of them.
        told = [numbers(Walk(tuple(run for run in places[2] if run[1]))), numbers(Walk(places[2]))]
        firsts: list[Tensor] = []
        steps: list[Tensor] = []
        for draw in draws:
            found = self.indexed(draw)
            if found is None:
                return None
            first = found[by_row]
            if not firsts:
                steps = [found[place + channel] - first[0] for channel in told]
            for channel, step in zip(told[0].tolist(), steps[0], strict=True):
                if not torch.equal(found[by_row + channel], first + step):
                    return None
            firsts.append((first + rest).view(lead))
        return firsts, steps[1] + numbers(Walk(strides[2]))

    def indexed(self, draw: Tensor) -> Tensor | None:
        """What the indices of active rows add to the addresses, place by place; None where one is out of bounds."""
        known = {self.rows: draw}
        evaluate(self.behind, known)
        total = torch.zeros(self.shape, dtype=torch.int64)
        for node, digits in self.indices:
            left = known[node]
            if left.numel() and not 0 <= int(left.min()) <= int(left.max()) < math.prod(size for size, _ in digits):
                return None
            for size, stride in reversed(digits):
                total += left % size * stride
                left = left // size
        return total.flatten()
