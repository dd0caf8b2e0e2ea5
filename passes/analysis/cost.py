"""The cost model: FLOPs and bytes of the dense and of the sparse program, the latter as expressions in A.

The same layout algebra that writes the sparse program gives its sizes with a symbol for the number of active rows, so
one walk over the dense graph prices every ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ras_compile._torch import OpOverload, schema_of
from ras_compile.passes.algebra.layout import Layout, Sizes
from ras_compile.passes.analysis.propagate import Analysis
from ras_compile.passes.analysis.splices import SparsePlan
from ras_compile.passes.rules.attention import ATTENTION
from ras_compile.passes.rules.collectives import COLLECTIVES, sent_by
from ras_compile.passes.rules.registry import Gather, Step, Use, operands
from ras_compile.passes.rules.token_wise import PACKED

aten = torch.ops.aten

ACTIVE = sympy.Symbol("A", positive=True, integer=True)

Shape = Sequence[Any]


def _linear(x: Shape, weight: Shape, *bias: Shape) -> Any:
    return 2 * math.prod(x) * weight[0]


def _matmul(first: Shape, second: Shape) -> Any:
    """The larger operand has all batch dimensions, or they are equal."""
    batch = max(first[:-2], second[:-2], key=len)
    rows = first[-2] if len(first) > 1 else 1
    columns = second[-1] if len(second) > 1 else 1
    return 2 * math.prod(batch) * rows * first[-1] * columns


def _attention(query: Shape, key: Shape, value: Shape, *mask: Shape) -> Any:
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(equation: str) -> Callable[..., Any]:
    def cost(*shapes: Shape) -> Any:
        if len(shapes) == 1:
            return 0
        sizes: dict[str, Any] = {}
        for word, shape in zip(equation.replace(" ", "").partition("->")[0].split(","), shapes, strict=True):
            head, dots, tail = word.partition("...")
            rank = len(shape) - len(head) - len(tail)
            labels = [*head, *(f"...{rank - k}" for k in range(rank) if dots), *tail]
            for label, size in zip(labels, shape, strict=True):
                sizes[label] = size if sizes.get(label, 1) == 1 else sizes[label]
        return 2 * math.prod(sizes.values())

    return cost


def _convolution(out: Shape, weight: Shape) -> Any:
    return 2 * math.prod(out) * math.prod(weight[1:])


def flops_of(node: fx.Node, shapes: Sequence[Shape], out: Shape) -> Any:
    """FLOPs of one op (two per multiply-add; contractions, attention and convolutions, as `torch.utils.flop_counter`).

    Args:
        shapes: shapes of its tensor operands, in order; entries may be sympy expressions.
    """
    if node.target in ATTENTION:
        return _attention(*shapes)
    name = schema_of(node.target).name if isinstance(node.target, OpOverload) else ""
    match name:
        case "aten::linear":
            return _linear(*shapes)
        case "aten::matmul" | "aten::mm" | "aten::bmm" | "aten::_int_mm":
            return _matmul(*shapes)
        case "aten::_scaled_mm":  # its scales follow
            return _matmul(*shapes[:2])
        case "aten::addmm" | "aten::baddbmm":
            return _matmul(*shapes[1:])
        case "ras_compile::token_wise":  # all its experts: how many a token goes through, nothing here says
            return sum(_linear(shapes[0], weight) for weight in shapes[1:] if len(weight) == 2)
        case name if name in PACKED:
            return 2 * math.prod(shapes[0]) * out[-1]
        case "aten::einsum":
            return _einsum(str(node.args[0]))(*shapes)
        case "aten::conv1d" | "aten::conv2d" | "aten::conv3d":
            return _convolution(out, shapes[1])
        case "aten::conv_transpose1d" | "aten::conv_transpose2d" | "aten::conv_transpose3d":
            return _convolution(shapes[0], shapes[1])
    return 0


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of one step."""

    dense_flops: int  # FLOPs of a dense step
    sparse_flops: sympy.Expr  # FLOPs of a sparse step, an expression in ``A``
    dense_bytes: int  # bytes that a dense step's contractions, attention and convolutions read and write
    sparse_bytes: sympy.Expr  # the same for a sparse step, an expression in ``A``
    cache_bytes: int  # bytes of all caches of one branch
    tokens: int  # N
    dense_sent: int = 0  # bytes that one process sends to others in a dense step, over several devices
    sparse_sent: sympy.Expr = sympy.Integer(0)  # the same for a sparse step, an expression in ``A``
    # bytes of queries, keys, values and results of attention between the picture's tokens in a dense step: what
    # processes would exchange that share the tokens, and attend by heads
    attended_bytes: int = 0

    def seconds(self, active: int, ranks: int, flops: float, bandwidth: float) -> tuple[float, float]:
        """Predicted seconds of a dense and of a sparse step of which ``ranks`` processes each compute a share of the tokens.

        Args:
            active: active rows of all processes.
            ranks: how many processes there are; each is sent its heads of all tokens and sends their results back (Ulysses).
            flops: FLOPs that one device does in a second.
            bandwidth: bytes that one process sends in a second.
        """
        moved = self.attended_bytes * (ranks - 1) / ranks**2 / bandwidth
        computed = self.dense_flops / ranks / flops
        return computed + moved, self.flop_ratio(active) * computed + active / self.tokens * moved

    def flop_ratio(self, active: int) -> float:
        """FLOPs of a sparse step with ``active`` rows over those of a dense step."""
        return float(self.sparse_flops.subs(ACTIVE, active)) / self.dense_flops

    def speedup(self, sample_ratio: float, num_steps: int, dense_steps: int) -> float:
        """Predicted speed-up by FLOPs of ``num_steps`` steps, ``dense_steps`` of them dense, over all dense."""
        sparse = self.flop_ratio(max(1, round(sample_ratio * self.tokens)))
        return num_steps / (dense_steps + (num_steps - dense_steps) * sparse)

    def ratio_for(self, speedup: float, num_steps: int, dense_steps: int, fewest: int = 1) -> float:
        """The sample ratio that gives ``speedup`` (by FLOPs), where a sparse step computes ``fewest`` tokens or more.

        Raises:
            ValueError: no ratio in (0, 1] gives it; the text says what the limits are.
        """
        sparse_steps = num_steps - dense_steps
        limits = [self.speedup(ratio, num_steps, dense_steps) for ratio in (1.0, fewest / self.tokens)]
        if not limits[0] <= speedup <= limits[1] or sparse_steps < 1:
            raise ValueError(
                f"a speed-up of {speedup:g} is out of reach with {dense_steps} dense steps of {num_steps}: "
                f"{limits[0]:.2f} to {limits[1]:.2f} can be had"
            )
        target = (num_steps / speedup - dense_steps) / sparse_steps * self.dense_flops
        # FLOPs are linear in A wherever attention's keys are whole; a quadratic has one positive root
        roots = sympy.Poly(self.sparse_flops - sympy.Float(target), ACTIVE).nroots()
        found = [float(root) for root in roots if root.is_real and root > 0]
        return min(1.0, max(1.0, min(found, default=1.0)) / self.tokens)


def cost(analysis: Analysis, sparse: SparsePlan) -> Cost:
    """Prices the dense and the sparse program of an analysis."""
    sizes = sparse.sizes(analysis.frame, ACTIVE)
    dense_flops, sparse_flops, dense_bytes, sparse_bytes = 0, sympy.Integer(0), 0, sympy.Integer(0)
    dense_sent, sparse_sent, attended = sympy.Integer(0), sympy.Integer(0), 0
    for node in analysis.graph.nodes:
        value = first(node.meta.get("val"))
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        given = operands(node)
        if not all(isinstance(operand.meta["val"], Tensor) for operand in given):
            continue
        whole = [tuple(operand.meta["val"].shape) for operand in given]
        flops = flops_of(node, whole, tuple(value.shape))
        step = analysis.steps.get(node)
        if node.target in COLLECTIVES:
            dense, sparse_part = sent(node, step, analysis, sizes)
            dense_sent, sparse_sent = dense_sent + dense, sparse_sent + (0 if sparse.skips(node) else sparse_part)
        if not flops:
            continue
        widths = [operand.meta["val"].element_size() for operand in given] + [value.element_size()]
        traffic = sum(w * math.prod(s) for w, s in zip(widths, [*whole, tuple(value.shape)], strict=True))
        dense_flops, dense_bytes = dense_flops + flops, dense_bytes + traffic
        if node.target in ATTENTION and step is not None and Use.WHOLE in step.uses:
            attended += sum(
                w * math.prod(s) for w, s in zip((*widths[:3], widths[-1]), (*whole[:3], value.shape), strict=True)
            )
        if sparse.skips(node):
            continue
        if step is not None and not step.whole:
            layouts = [analysis.layouts.get(operand) for operand in given]
            shapes = [_shape(s, u, k, sizes) for s, u, k in zip(whole, step.uses, layouts, strict=True)]
            layout = first(step.out)
            out = tuple(value.shape) if layout is None else sizes.shape(layout)
            flops = flops_of(node, shapes, out)
            traffic = sum(w * math.prod(s) for w, s in zip(widths, [*shapes, out], strict=True))
        sparse_flops, sparse_bytes = sparse_flops + flops, sparse_bytes + traffic
    group = analysis.frame.shards
    if group is not None and any(splice.layout.ranked for splice in sparse.splices):  # which rows the others compute
        sparse_sent += (group.size - 1) * analysis.frame.samples * ACTIVE * torch.int64.itemsize
    caches = [node.meta["val"] for node in [*(splice.node for splice in sparse.splices), *sparse.frozen]]
    return Cost(
        dense_flops,
        sympy.expand(sparse_flops),
        dense_bytes,
        sympy.expand(sparse_bytes),
        sum(cache.numel() * cache.element_size() for cache in caches),
        analysis.frame.tokens,
        int(dense_sent),
        sympy.expand(sparse_sent),
        attended,
    )


def first(results: Any) -> Any:
    """The first result of an op with several; else the result."""
    return results[0] if isinstance(results, (tuple, list)) else results


def sent(node: fx.Node, step: Step | None, analysis: Analysis, sizes: Sizes) -> tuple[Any, Any]:
    """Bytes that one process sends in a collective: in a dense and in a sparse step."""
    (operand,) = operands(node)
    value = operand.meta["val"]
    whole = tuple(value.shape)
    shape = whole if step is None else _shape(whole, step.uses[0], analysis.layouts.get(operand), sizes)
    return tuple(value.element_size() * sent_by(node, entries) for entries in (whole, shape))


def _shape(whole: Shape, use: Use | Gather, layout: object, sizes: Sizes) -> Shape:
    if use is Use.ROWS and isinstance(layout, Layout):
        return sizes.shape(layout)
    return sizes.shape(use.layout) if isinstance(use, Gather) else whole
