"""Linears of a few rows that read the same input become one launch: the modulations of all blocks.

    m_0 = linear(silu(t), w_0, b_0)        # t [B, K], in each block, where it is needed
    ...
    m_1 = linear(silu(t), w_1, b_1)

becomes

    s = silu(t)
    m_0, m_1 = ras_compile::many_linears(s, [w_0, w_1], [b_0, b_1])

because each of them only waits for its weight to arrive, and all can be computed as soon as their input is there. What every
block computes again from the same values counts as the same input.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from ras_compile.kernels.many_linears import ROWS
from ras_compile.passes.analysis.emit import Emitter, sweep
from ras_compile.passes.programs.aliases import movable
from ras_compile.passes.programs.equals import equals

aten = torch.ops.aten
own = torch.ops.ras_compile
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Views that keep the order of the rows.
RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)

Parameters = tuple[fx.Node, fx.Node | None]  # weight and bias
# Asked with the input, the weights and the biases of a launch (fake tensors): is it worth it?
FewRowsChoice = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor | None]], bool]


def join_linears(graph: fx.Graph, pays: FewRowsChoice | None, dtypes: Sequence[torch.dtype] = DTYPES) -> int:
    """Joins the linears of at most 16 rows that read the same input; returns how many launches there are of several.

    It does not fire where a weight is computed in the graph, or where dtypes differ (a custom op is not under autocast).

    Args:
        pays: says of a launch whether it is faster than its linears one by one; None: nothing is joined.
    """
    if pays is None:
        return 0
    first = equals(graph, lambda node: few(node.meta.get("val")) and movable(node))
    readers: dict[fx.Node, dict[Parameters, list[fx.Node]]] = {}
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        if fits(node, dtypes):
            x, weight, bias = (*node.args, None)[:3]
            readers.setdefault(source(x, first), {}).setdefault((weight, bias), []).append(node)
    count = 0
    for x, members in reversed(readers.items()):  # what reads a member's result goes first: its input is still there
        weights, biases = zip(*members, strict=True)
        if len(members) > 1 and pays(*fx.node.map_arg((x, weights, biases), lambda operand: operand.meta["val"])):
            join(graph, x, members)
            count += 1
    sweep(graph)
    return count


def few(value: object) -> bool:
    """Whether this is a matrix of at most 16 rows, in any number of dimensions."""
    return isinstance(value, Tensor) and value.ndim > 0 and 0 < value.numel() <= ROWS * value.shape[-1]


def fits(linear: fx.Node, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether a linear may be a member: few rows, and parameters that are there from the beginning."""
    x, *parameters = [operand for operand in linear.args if operand is not None]
    values = [operand.meta["val"] for operand in (linear, x, *parameters)]
    kinds = {value.dtype for value in values}
    there = all(operand.op == "placeholder" and operand.meta["val"].is_contiguous() for operand in parameters)
    return few(values[1]) and there and len(kinds) == 1 and kinds <= set(dtypes) and movable(linear)


def source(x: fx.Node, first: dict[fx.Node, fx.Node]) -> fx.Node:
    """The first node that computes the same rows."""
    while True:
        x = first.get(x, x)
        if x.target not in RESHAPES or x.meta["val"].shape[-1] != x.args[0].meta["val"].shape[-1]:
            return x
        (x,) = x.all_input_nodes


def join(graph: fx.Graph, x: fx.Node, members: dict[Parameters, list[fx.Node]]) -> None:
    """Writes the launch behind its input, and takes the linears away."""
    place = x.next if x.op == "call_function" else next(n for n in graph.nodes if n.op == "call_function")
    weights, biases = map(list, zip(*members, strict=True))
    emit, firsts = Emitter.of(graph), [linears[0] for linears in members.values()]
    with graph.inserting_before(place):
        launch = emit.like(firsts[0], own.many_linears.default, x, weights, biases)
        results = [emit.like(first, operator.getitem, launch, index) for index, first in enumerate(firsts)]
    for linears, result in zip(members.values(), results, strict=True):
        for linear in linears:
            shape = linear.meta["val"].shape
            if shape == result.meta["val"].shape:
                emit.replace(linear, result)
            else:  # made where the linear stood: repeated blocks stay alike
                emit.instead(linear, aten.view.default, result, list(shape))
