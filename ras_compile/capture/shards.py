"""Weights that are sharded tensors of PyTorch (`DTensor`, of `parallelize_module`): a process computes with the part that it holds.

Dynamo's graph says of every value how it is laid out over the processes. Where features are split by columns and added up by
rows (Megatron-LM's way, arXiv 1909.08053), a linear layer of parts is a plain linear layer, and what stands between is one
collective:

    x -> linear, by columns -> gelu -> linear, by rows -> redistribute
    x -> linear(x, part)    -> gelu -> linear(x, part) -> all_reduce

So sharded tensors are taken out of the graph before it is captured.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.rules.registry import source_line


def of_parts(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph on the parts that this process holds; the graph itself where no tensor is sharded.

    Args:
        graph: Dynamo's graph, whose weights have been taken apart: see :class:`~ras_compile.capture.subclasses.Entrance`.

    Raises:
        UnsupportedGraph: what a sharded tensor is used for is none of the layers above.
    """
    if not any(_sharded(node) is not None for node in graph.graph.nodes):
        return graph
    new, env = fx.Graph(), dict[Any, fx.Node]()
    part = env.__getitem__

    for node in graph.graph.nodes:
        given = [operand for operand in node.all_input_nodes if _sharded(operand) is not None]
        if _sharded(node) is None and not given:
            env[node] = new.node_copy(node, part)
            continue
        line = source_line(node)
        if not given:  # a weight that is put together, or a plain tensor that is declared to be a part
            made = next(
                operand for operand in node.all_input_nodes if isinstance(operand.meta.get("example_value"), Tensor)
            )
            env[node] = env[made]
        elif _named(node) == "to_local":
            env[node] = env[node.args[0]]
        elif _named(node) == "redistribute":
            env[node] = _redistributed(new, env[node.args[0]], node, line)
        elif all(_kind(operand, line) == "all" for operand in (node, *given)):
            env[node] = new.node_copy(node, part)
        elif node.target is F.linear:
            env[node] = _linear(new, env, node, line)
        else:
            raise _unsupported(f"in {_named(node)}", line)
    return fx.GraphModule(graph, new)


def _sharded(node: fx.Node) -> Any:
    """A value that is laid out over the processes, a DTensor; None for a plain tensor."""
    value: Any = node.meta.get("example_value")
    return value if type(value).__name__ == "DTensor" else None


def _named(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).removeprefix("prim_")


def _kind(node: fx.Node, line: str | None) -> str:
    """Where a value's entries are: "all" in each process, "columns" or "rows" split by its last or first dimension, or "sum":
    each process holds a term."""
    value = _sharded(node)
    if len(value.placements) != 1:
        raise _unsupported("over a mesh of several dimensions", line)
    (placement,) = value.placements
    rank = value.ndim
    if placement.is_replicate():
        return "all"
    if placement.is_partial() and placement.reduce_op == "sum":
        return "sum"
    if placement.is_shard() and placement.dim % rank == rank - 1:
        return "columns"
    if placement.is_shard() and placement.dim % rank == 0 and rank == 2:
        return "rows"
    raise _unsupported(f"as {placement}", line)


def _linear(new: fx.Graph, env: dict[Any, fx.Node], node: fx.Node, line: str | None) -> fx.Node:
    """`linear(x, weight, bias)` of parts."""
    given: list[Any] = [*node.args, node.kwargs.get("bias"), None]
    x, weight, bias = given[:3]
    kinds = _kind(x, line), _kind(weight, line), _kind(node, line)
    own = None if bias is None else env[bias]
    if kinds == ("columns", "columns", "sum"):  # each process adds its share of the bias
        count = _sharded(node).device_mesh.size()
        own = None if own is None or _kind(bias, line) != "all" else new.call_function(torch.div, (own, count))
        if bias is not None and own is None:
            raise _unsupported("with a bias that is split beside a sum", line)
    elif kinds != ("all", "rows", "columns"):
        raise _unsupported("in a linear layer that is split neither by its columns nor by its rows", line)
    made = new.call_function(F.linear, (env[x], env[weight], own))
    made.meta = {key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta}
    return made


def _redistributed(new: fx.Graph, value: fx.Node, node: fx.Node, line: str | None) -> fx.Node:
    """A value whose parts are laid out anew; where they are put together, each process adds its own to zeros elsewhere."""
    wanted = _sharded(node)
    mesh = wanted.device_mesh
    before, after = _kind(node.all_input_nodes[0], line), _kind(node, line)
    if before == after:
        return value
    size, rank = mesh.size(), mesh.get_local_rank()
    width, rest = divmod(wanted.shape[-1], size)
    if rest or "rows" in (before, after) or after == "sum":
        raise _unsupported(f"laid out anew as {wanted.placements[0]}", line)
    if before == "columns":
        value = new.call_function(F.pad, (value, (rank * width, (size - 1 - rank) * width)))
    if before != "all":
        c10d = torch.ops._c10d_functional
        sent = new.call_function(c10d.all_reduce.default, (value, "sum", mesh.get_group().group_name))
        value = new.call_function(c10d.wait_tensor.default, (sent,))
    return value if after == "all" else new.call_function(torch.narrow, (value, -1, rank * width, width))


def _unsupported(how: str, line: str | None) -> UnsupportedGraph:
    return UnsupportedGraph(
        f"a DTensor {how}; linear layers whose features ColwiseParallel and RowwiseParallel split are supported",
        source=line,
    )
