"""Parts of the tokens that are worked apart and joined again: each part's work is done on all tokens, and a mask chooses.

    cat([x[:, :1], x[:, 1:] + pose], 1)  ->  where(arange(n) < 1, x, x + pad(pose))

Active rows stand anywhere, so that no row knows at compile time which part it is in. What works each token alone can
be done for all of them: the ops' rules say where the tokens of a part stand in its results, and what the arguments are at
another size, as they do for active rows. Equal work of several parts (a feed-forward layer in chunks) is one computation.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ras_compile.errors import UnsupportedGraph
from ras_compile.notices import fell_back
from ras_compile.passes.algebra.layout import Axis, Frame, Layout, Restart, Sizes, opaque
from ras_compile.passes.algebra.order import Atom
from ras_compile.passes.analysis.emit import Emitter
from ras_compile.passes.rules.concatenation import CONCATENATIONS, SPLITS
from ras_compile.passes.rules.pointwise import copies, find_rule, is_pointwise
from ras_compile.passes.rules.registry import RULES, Call, Gather, Step, Use, named_arguments, operands

aten = torch.ops.aten

CUTS = (aten.slice.Tensor, *SPLITS)
JOINS = (*CONCATENATIONS, aten.slice_scatter.default)
SAME_PLACE = (aten.linear.default, aten.layer_norm.default, aten.rms_norm.default)
HEAVY = (
    aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default,
    aten.einsum.default, aten.scaled_dot_product_attention.default,
)  # fmt: skip
MOST_WORK = 2.0  # so many times the parts' own products may be computed for it
MOST_OPS = 1000  # between a cut and its join: what has more is no part of a layer
MOST_BESIDE = 4  # between the cut of another value and where it meets a part
TOKENS = Atom(0, 1)


class NotTogether(Exception):
    """The parts cannot be worked together."""


@dataclass(frozen=True)
class Part:
    """Entries ``start`` to ``stop`` of ``size`` along one dimension of a value, which exists for all of them."""

    whole: fx.Node  # the value for all entries
    layout: Layout  # the layout of the part itself, whose tokens are the entries
    start: int
    stop: int
    size: int


def join_parts(graph: fx.Graph, node: fx.Node) -> bool:
    """Works the parts together into which ``node`` cuts the tokens, wherever they are joined again; says whether any is."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    derived: dict[fx.Node, None] = {}
    left = deque(user for user in source.users if user.target in CUTS)
    while left and len(derived) < MOST_OPS:
        user = left.popleft()
        if user not in derived and user.op == "call_function":
            derived[user] = None
            if user.target not in JOINS:
                left += user.users
    order = {found: index for index, found in enumerate(graph.nodes)}
    joins = sorted((found for found in derived if found.target in JOINS), key=order.__getitem__)
    found = sum(not join._erased and Together(graph, derived, source).join(join) for join in joins) > 0
    if found and graph.owning_module is not None:
        graph.owning_module.recompile()
    return found


class Together:
    """One attempt: what it adds to the graph goes again where it fails."""

    def __init__(self, graph: fx.Graph, derived: dict[fx.Node, None], source: fx.Node) -> None:
        self.graph, self.derived, self.source = graph, dict(derived), source
        self.emitter = Emitter.of(graph)
        self.parts: dict[fx.Node, Part] = {}
        self.added: dict[str, fx.Node] = {}
        self.narrow = self.wide = 0.0

    def join(self, node: fx.Node) -> bool:
        self.emitter.origin = node
        try:
            made = self._joined(node)
            if self.wide > MOST_WORK * self.narrow:
                raise NotTogether
        except (NotTogether, Restart, UnsupportedGraph, RuntimeError) as error:
            if not isinstance(error, (NotTogether, Restart, UnsupportedGraph)):  # no answer, but a failure
                fell_back("pieces of a sequence worked one by one", error)
            for added in reversed(list(self.added.values())):
                if not added.users:
                    self.graph.erase_node(added)
            return False
        splits = [part.args[0] for part in self.parts if part.target is operator.getitem]
        self.emitter.replace(node, made)
        dead: set[fx.Node] = {*self.parts, *splits}
        for gone in sorted(dead, key={n: k for k, n in enumerate(self.graph.nodes)}.__getitem__, reverse=True):
            if not gone.users and gone.op == "call_function":
                self.graph.erase_node(gone)
        return True

    def emit(self, target, *args, **kwargs) -> fx.Node:
        """A call before the join; the same call is one node."""
        key = repr((str(target), args, kwargs))
        if key not in self.added:
            with self.graph.inserting_before(self.emitter.origin):
                self.added[key] = self.emitter(target, *args, **kwargs)
        return self.added[key]

    def _joined(self, node: fx.Node) -> fx.Node:
        args, shape = named_arguments(node), tuple(node.meta["val"].shape)
        dim = args["dim"] % len(shape)
        if node.target is aten.slice_scatter.default:
            base, part = args["self"], self.part(args["src"])
            start, stop, step = slice(args["start"], args["end"], args["step"]).indices(shape[dim])
            if base in self.derived or step != 1 or (start, stop, shape[dim]) != (part.start, part.stop, part.size):
                raise NotTogether
            self._stands(part, dim)
            return self._chosen([(start, base), (stop, part.whole), (shape[dim], base)], dim, node)
        pieces = [self.part(operand) for operand in args["tensors"]]
        ends = [0, *(piece.stop for piece in pieces)]
        if [piece.start for piece in pieces] != ends[:-1] or any(piece.size != ends[-1] for piece in pieces):
            raise NotTogether
        for piece in pieces:
            self._stands(piece, dim)
        return self._chosen([(piece.stop, piece.whole) for piece in pieces], dim, node)

    def _stands(self, part: Part, dim: int) -> None:
        if part.layout.dims[dim] != (Axis(part.stop - part.start, TOKENS),):
            raise NotTogether
        if part.whole.meta["val"].shape[dim] != part.size:
            raise NotTogether

    def _chosen(self, borders: Sequence[tuple[int, fx.Node]], dim: int, node: fx.Node) -> fx.Node:
        """Of several values the one whose border comes next, entry by entry along ``dim``."""
        value, like = borders[-1][1], node.meta["val"]
        for stop, other in list(borders)[-2::-1]:
            if other.meta["val"].dtype != like.dtype or value.meta["val"].dtype != like.dtype:
                raise NotTogether
            if other is not value and stop:
                places = self.emit(aten.arange.default, like.shape[dim], dtype=torch.int64, device=like.device)
                before = self.emit(aten.lt.Scalar, places, stop)
                shape = [-1 if index == dim else 1 for index in range(like.ndim)]
                value = self.emit(aten.where.self, self.emit(aten.reshape.default, before, shape), other, value)
        if tuple(value.meta["val"].shape) != tuple(like.shape):
            raise NotTogether
        return value

    def part(self, node: fx.Node) -> Part:
        """What a value of the parts is a part of.

        Raises:
            NotTogether: it is none.
        """
        if node not in self.parts:
            if node not in self.derived:
                raise NotTogether
            self.parts[node] = cut_of(node) or self._worked(node)
        return self.parts[node]

    def _worked(self, node: fx.Node) -> Part:
        """An op on parts, done for all entries."""
        value = node.meta["val"]
        if not isinstance(value, Tensor) or node.target in (*CUTS, *JOINS, operator.getitem):
            raise NotTogether
        first = next(self.part(operand) for operand in operands(node) if operand in self.derived)
        given = [operand for operand in operands(node) if operand in self.derived or self._beside(operand, first)]
        parts = [self.part(operand) for operand in given]
        if any((p.start, p.stop, p.size) != (first.start, first.stop, first.size) for p in parts):
            raise NotTogether
        length = first.stop - first.start
        if length == 1:
            return self._single(node, given, first)
        frame = Frame.of((length,), batch_dim=None)
        layouts = {operand: self.parts[operand].layout for operand in given}
        step: Step = find_rule(node)(Call(node, dict(layouts), frame))
        if step.whole or not isinstance(step.out, Layout):
            raise NotTogether
        target, args, kwargs = (
            step.rewrite(Sizes(frame, first.size)) if step.rewrite else (node.target, node.args, node.kwargs)
        )
        uses = iter(step.uses)

        def taken(operand: fx.Node) -> fx.Node:
            use = next(uses)
            if isinstance(use, Gather):
                return self._padded(operand, use.layout, first)
            return self.part(operand).whole if use is Use.ROWS else operand

        args, kwargs = fx.node.map_arg((args, kwargs), taken)
        return self._made(node, first, step.out, target, args, kwargs)

    def _beside(self, operand: fx.Node, part: Part, ops: int = MOST_BESIDE) -> bool:
        """Whether an operand that is not of the source is the same entries of another value (of attention's, beside the input's).

        Args:
            ops: how many of them may stand between that value's cut and the operand.
        """
        cut, length = cut_of(operand), part.stop - part.start
        works = operand.op == "call_function" and operand.target not in (*CUTS, *JOINS, operator.getitem)
        if cut is not None:
            found = (cut.start, cut.stop, cut.size) == (part.start, part.stop, part.size)
        elif not (ops and works and length in getattr(operand.meta["val"], "shape", ())):
            return False
        else:  # all of them, for each that is found is noted
            found = sum(other in self.derived or self._beside(other, part, ops - 1) for other in operands(operand)) > 0
        if found:
            self.derived[operand] = None
        return found

    def _single(self, node: fx.Node, given: list[fx.Node], part: Part) -> Part:
        """An op on a part of a single entry, whose rule could not tell the entry's dimension from others of size one."""
        rank, dims = node.meta["val"].ndim, set()
        for operand in given:
            mine = self.parts[operand]
            places = [index for index, dim in enumerate(mine.layout.dims) if dim == (Axis(1, TOKENS),)]
            dims |= {place + rank - len(mine.layout.dims) for place in places}
        alone = is_pointwise(node.target) or RULES.get(node.target) is copies
        if len(dims) != 1 or not (alone or node.target in SAME_PLACE):
            raise NotTogether
        (dim,) = dims
        if node.target in SAME_PLACE and (dim == rank - 1 or given != operands(node)[:1]):
            raise NotTogether
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda operand: self.parts[operand].whole if operand in given else operand
        )
        shape = node.meta["val"].shape
        out = Layout(tuple((Axis(1, TOKENS),) if index == dim else opaque(shape[index]) for index in range(rank)))
        return self._made(node, part, out, node.target, args, kwargs)

    def _made(self, node: fx.Node, part: Part, out: Layout, target, args, kwargs) -> Part:
        known = len(self.added)
        made = self.emit(target, *args, **kwargs)
        if node.target in HEAVY:
            self.narrow += part.stop - part.start
            self.wide += part.size if len(self.added) > known else 0
        return Part(made, out, part.start, part.stop, part.size)

    def _padded(self, operand: fx.Node, layout: Layout, part: Part) -> fx.Node:
        """A dense operand of a part for all entries: what it was cut from, or padded with zeros."""
        cut, rank = cut_of(operand), operand.meta["val"].ndim
        if cut is not None and (cut.start, cut.stop, cut.size) == (part.start, part.stop, part.size):
            return cut.whole
        # tokens of the same picture in other places: no padding is theirs
        if _pictures(operand) & _pictures(self.source):
            raise NotTogether
        pads = [0] * (2 * rank)
        for index, dim in enumerate(layout.dims[len(layout.dims) - rank :]):
            if dim == (Axis(part.stop - part.start, TOKENS),) and operand.meta["val"].shape[index] != 1:
                pads[2 * (rank - 1 - index) : 2 * (rank - index)] = [part.start, part.size - part.stop]
            elif any(isinstance(factor, Axis) and factor.atom == TOKENS for factor in dim):
                raise NotTogether
        return self.emit(aten.constant_pad_nd.default, operand, pads)


def cut_of(node: fx.Node) -> Part | None:
    """What a slice, or a piece of a split, is a part of; None for any other value."""
    cut, index = (node.args[0], node.args[1]) if node.target is operator.getitem else (node, None)
    if not isinstance(cut, fx.Node) or cut.target not in (CUTS[:1] if index is None else SPLITS):
        return None
    args, source = named_arguments(cut), cut.args[0]
    assert isinstance(source, fx.Node)
    shape = source.meta["val"].shape
    dim = args["dim"] % len(shape)
    length = node.meta["val"].shape[dim]
    if index is not None:
        start = sum(piece.shape[dim] for piece in cut.meta["val"][:index])
    else:
        start, _, step = slice(args["start"], args["end"], args["step"]).indices(shape[dim])
        if step != 1:
            return None
    if not 0 < length < shape[dim]:
        return None
    dims = [(Axis(length, TOKENS),) if k == dim else opaque(size) for k, size in enumerate(node.meta["val"].shape)]
    return Part(source, Layout(tuple(dims)), start, start + length, shape[dim])


def _pictures(node: fx.Node) -> set[fx.Node]:
    """The inputs of three dimensions or more, which may be the latent, that a value is made of."""
    found: set[fx.Node] = set()
    seen, left = {node}, [node]
    while left:
        value = left.pop()
        if value.op == "placeholder" and getattr(value.meta.get("val"), "ndim", 0) >= 3:
            found.add(value)
        new = [operand for operand in value.all_input_nodes if operand not in seen]
        seen.update(new)
        left += new
    return found
