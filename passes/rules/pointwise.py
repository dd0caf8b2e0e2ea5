"""Ops that treat every entry alone: `f(... , ...) -> ...` with broadcasting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from ras_compile._torch import OpOverload
from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.algebra.layout import Dim, Layout, atoms_of, opaque, paired
from ras_compile.passes.rules.registry import Call, Gather, Rule, Step, Use, rule_for, rule_of, source_line

aten = torch.ops.aten


def dense_use(call: Call, out: Layout, shape: Sequence[int]) -> Use | Gather:
    """A dense operand of ``shape`` that is broadcast against ``out``: its rows where it has an entry for every token."""
    offset = len(out.dims) - len(shape)
    dims = [() if index < offset or shape[index - offset] == 1 else dim for index, dim in enumerate(out.dims)]
    if not call.frame.carries(Layout(tuple(dims))):
        return Use.SAME
    # a part of the grid is repeated along the others
    frame = call.frame
    grid = [any(frame.counts_pictures(a) or frame.counts_tokens(a) for a in atoms_of(full)) for full in out.dims]
    return Gather(Layout(tuple(full if has else dim for has, full, dim in zip(grid, out.dims, dims, strict=True))))


def broadcast(call: Call, nodes: Sequence[fx.Node], shape: Sequence[int]) -> Layout | None:
    """The layout of a broadcast of ``nodes`` to ``shape``; None where they arrange the tokens differently."""
    dims: list[Dim] = [opaque(size) for size in shape]
    raw = True
    for node in nodes:
        layout = call.layout(node)
        if layout is None:
            continue
        raw = raw and layout.raw
        offset = len(shape) - len(layout.dims)
        for index, dim in enumerate(layout.dims, start=offset):
            both = paired(dims[index], dim)
            if both is None:
                return None
            dims[index] = both
    if call.frame.twice(dims):  # an operation between all pairs of tokens
        return None
    return Layout.of(dims, raw)


def pointwise(call: Call) -> Step:
    """`f(... , ...) -> ...`"""
    value = call.node.meta["val"]
    out = broadcast(call, call.operands, (value[0] if isinstance(value, (tuple, list)) else value).shape)
    return call.whole(call.each(None)) if out is None else Step(call.each(out), rows_or_gather(call, out))


def rows_or_gather(call: Call, out: Layout | Mapping[fx.Node, Layout]) -> tuple[Use | Gather, ...]:
    """Uses of operands that meet entry by entry: rows of region values, gathered rows of dense ones.

    Args:
        out: the layout by which all of them are read, or one for each.
    """

    def use(node: fx.Node) -> Use | Gather:
        if call.layout(node) is not None:
            return Use.ROWS
        return dense_use(call, out if isinstance(out, Layout) else out[node], call.shape_of(node))

    return call.uses(use)


@rule_for(aten._to_copy.default, aten.copy.default, aten.alias.default, aten.detach.default, aten.dropout.default)
@rule_for(aten.clone.default, aten.contiguous.default, aten.lift_fresh.default)
@rule_for(aten.masked_fill.Tensor, aten.floor_divide.Scalar, aten.rsub.Tensor)
@rule_for(aten.log_sigmoid.default, aten.hardswish.default, aten.polar.default, aten.floor_divide.default)
@rule_for(aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor, aten._prelu_kernel.default)
@rule_for(aten.real.default, aten.imag.default, aten.conj.default, aten.resolve_conj.default, aten.complex.default)
def copies(call: Call) -> Step:
    """`... -> ...`: pointwise ops that carry no such tag."""
    if call.node.target is aten.dropout.default and call.args["train"] and call.args["p"] > 0:
        raise call.unsupported("dropout in training mode: region-adaptive sampling runs a model in eval mode")
    return pointwise(call)


@rule_for(aten.type_as.default)
def like_first(call: Call) -> Step:
    """`... , other -> ...`: only the dtype of the second operand counts."""
    return Step(call.layout(call.operands[0]), call.uses())


@rule_for(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default)
@rule_for(aten.zero.default, aten.fill.Scalar, aten.fill.Tensor)
def constant_like(call: Call) -> Step:
    """`... -> ...`: a constant of the shape of the operand; rows of it are as good as the whole."""
    return pointwise(call)


@rule_for(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default)
def new_constant(call: Call) -> Step:
    """`... -> sizes`: only dtype and device of the operand count; the sizes stand in the call."""
    return Step(None, call.uses())


def is_pointwise(target: object) -> bool:
    """Whether PyTorch itself tags an op as pointwise and no rule speaks for it."""
    return isinstance(target, OpOverload) and rule_of(target) is None and torch.Tag.pointwise in target.tags


def find_rule(node: fx.Node) -> Rule:
    """The rule of a node's op.

    Raises:
        UnsupportedGraph: the op has none.
    """
    rule = rule_of(node.target)
    if rule is None and is_pointwise(node.target):
        rule = pointwise
    if rule is None:
        raise UnsupportedGraph(
            f"no rule says how {node.target} treats the tokens of the picture; add one to the registry",
            op=str(node.target),
            source=source_line(node),
        )
    return rule
