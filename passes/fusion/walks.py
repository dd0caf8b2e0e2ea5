"""Where entries stand after ops that move them: strides, carried through reshapes that copy, without a tensor.

    permute, slice, expand, .. , reshape        a view of a contiguous tensor each: its strides say what it takes from where
    one after the other                         digits of a mixed radix, one (size, stride) for each

A chain of such ops takes the same time for any sizes. What is no such sum of digits, as a reshape across the borders of
dims that were permuted, has no walk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ras_compile._torch import memory_key
from ras_compile.kernels.arguments import joined
from ras_compile.passes.rules.registry import called

aten = torch.ops.aten

Digits = tuple[tuple[int, int], ...]  # (size, stride) of a mixed radix, outermost first

# Ops that put entries elsewhere and change none; and those that only look at memory in another way.
VIEWS = frozenset([
    aten.alias.default, aten.detach.default, aten.permute.default, aten.select.int, aten.slice.Tensor,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.t.default, aten.transpose.int,
    aten.unflatten.int, aten.unsqueeze.default, aten.view.default,
])  # fmt: skip
COPIES = frozenset([aten.cat.default, aten.clone.default, aten.contiguous.default])  # of one operand, in its order
MOVES = VIEWS | {
    aten.clone.default, aten.contiguous.default, aten.expand.default, aten.flatten.using_ints, aten.reshape.default,
    aten._unsafe_view.default,
}  # fmt: skip


@dataclass(frozen=True)
class Walk:
    """An order of visiting a tensor's entries: ``offset + sum of digit * stride``, the digits counting up, the last one first."""

    runs: Digits
    offset: int = 0

    @staticmethod
    def of(view: Tensor) -> Walk:
        """Visits memory as a view shows it."""
        return Walk(tuple(zip(view.shape, view.stride(), strict=True)), int(view.storage_offset()))

    def split(self, runs: Digits, offset: int = 0) -> tuple[list[Digits], int] | None:
        """What this walk visits at the steps ``offset + sum of digit * stride``: digits for each run, and the first place.

        None where these digits are no sum of this walk's: one would carry over into the next.
        """
        digits, weight = [], 1  # innermost first: steps that one count is worth, size, stride
        for size, stride in reversed(self.runs):
            digits.append((weight, size, stride))
            weight *= size
        if offset >= weight:
            return None
        used = [offset // weight % size for weight, size, _ in digits]
        first = self.offset + sum(count * stride for count, (_, _, stride) in zip(used, digits, strict=True))
        found: list[Digits] = []
        for count, step in runs:
            pieces = []
            for place, (weight, size, stride) in enumerate(digits):
                if count == 1 or not 0 < step < weight * size:
                    continue
                times, rest = divmod(step, weight)
                taken = count if (count - 1) * times < size else size // times
                if rest or count % taken or (taken < count and size % times):
                    return None
                pieces.append((taken, times * stride))
                used[place] += times * (taken - 1)
                count, step = count // taken, weight * size
            if count > 1:
                if step:
                    return None  # past the end
                pieces.append((count, 0))
            found.append(tuple(reversed(pieces)))
        if any(count >= size for count, (_, size, _) in zip(used, digits, strict=True)):
            return None
        return found, first

    def over(self, memory: Walk) -> Walk | None:
        """This walk over what another one visits."""
        found = memory.split(self.runs, self.offset)
        return None if found is None else Walk(sum(found[0], ()), found[1])

    def joined(self) -> Walk:
        """The same with as few digits as possible."""
        return Walk(tuple(joined(self.runs)), self.offset)


def contiguous(node: fx.Node) -> Tensor:
    """A tensor of a node's sizes without memory, whose entries are numbered one after the other."""
    return torch.empty(node.meta["val"].shape, device="meta")


def moves_entries(node: fx.Node) -> bool:
    """Whether an op of one operand puts its entries elsewhere, and changes none."""
    if node.target in (aten.cat.default, aten.einsum.default):  # of one operand
        given = node.all_input_nodes
        return len(given) == 1 and given[0].meta["val"].numel() == node.meta["val"].numel()
    return node.target in MOVES


def walk_of(node: fx.Node) -> Walk | None:
    """The order in which an op that moves entries visits its operand."""
    given = contiguous(node.all_input_nodes[0])
    if node.target in COPIES:
        return Walk.of(given)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: given)
    view = called(node, args, kwargs)
    same = memory_key(view) == memory_key(given)
    return Walk.of(view) if same else None


def chained(moves: Sequence[fx.Node], walk: Walk) -> Walk | None:
    """How a walk over the result of ops that move entries, the last one first, visits the operand of the first one."""
    for node in moves:
        step = walk_of(node)
        found = None if step is None else walk.over(step)
        if found is None:
            return None
        walk = found
    return walk


def numbers(walk: Walk) -> Tensor:
    """The places that a walk visits, one after the other."""
    result = torch.tensor([walk.offset])
    for size, stride in walk.runs:
        result = (result[:, None] + torch.arange(size) * stride).flatten()
    return result
