"""Linears before an activation: one that only feeds a GELU in its tanh form becomes one product with it.

    y = linear(x, w, b)                    # [..., N]
    z = gelu(y, approximate="tanh")

becomes

    z = ras_compile::linear_gelu(x, w, b)
"""

from __future__ import annotations

import torch
from torch import fx

from ras_compile.passes.analysis.emit import Emitter
from ras_compile.passes.rules.registry import named_arguments

aten = torch.ops.aten


def fuse_linear_gelu(graph: fx.Graph, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)) -> int:
    """Replaces every `linear -> gelu` of these dtypes; returns how many there were.

    It does not fire without a bias, on the exact form of GELU, where the linear's result has another use, or where dtypes
    differ (a custom op is not under autocast).
    """
    emit, count = Emitter.of(graph), 0
    for node in list(graph.find_nodes(op="call_function", target=aten.gelu.default)):
        linear = node.args[0]
        if named_arguments(node)["approximate"] != "tanh" or linear.target is not aten.linear.default:
            continue
        operands = [*linear.args, *linear.kwargs.values()]
        if len(linear.users) != 1 or len(operands) != 3 or operands[2] is None:
            continue
        kinds = {operand.meta["val"].dtype for operand in (*operands, node)}
        if len(kinds) != 1 or not kinds <= set(dtypes):
            continue
        emit.instead(node, torch.ops.ras_compile.linear_gelu.default, *operands)
        graph.erase_node(linear)
        count += 1
    return count
