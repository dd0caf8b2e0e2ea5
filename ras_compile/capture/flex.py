"""`flex_attention` spelled as attention with a mask, which the compiler knows.

    mask = create_block_mask(mask_mod, ...)              # vmap over positions, then block lists
    out = flex_attention(q, k, v, block_mask=mask)

becomes

    out = scaled_dot_product_attention(q, k, v, attn_mask=constant)

where the block lists and the mask's function depend on sizes alone, so that the mask is the same in every call of these
shapes. It is computed here, once, with the block lists' own meaning: a pair is seen if its block is a full one, or if its
block is a partial one and the function says so.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ras_compile import _torch
from ras_compile._torch import close_vmap, open_vmap
from ras_compile.capture.inputs import GraphInput, describe_inputs
from ras_compile.capture.sizes import expressions
from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.analysis.emit import copied, origin_of
from ras_compile.passes.rules.registry import nodes_in, source_line

LARGEST = 2**30  # entries of a mask: beyond, block lists are worth keeping
# places in the block mask that Dynamo hands over: lengths, then (count, indices) of partial and of full blocks
_PARTIAL, _FULL, _SIZES, _FUNCTION = slice(2, 4), slice(4, 6), slice(-3, -1), -1


def spell_flex_attention(graph: fx.GraphModule, values: Sequence[Any]) -> fx.GraphModule:
    """A copy of a Dynamo graph without `flex_attention`; the graph itself where there is none.

    Raises:
        UnsupportedGraph: a score function, a mask that depends on the values of inputs, or one that is too large.
    """
    if not any(is_flex(node) for node in graph.graph.nodes):
        return graph
    module = fx.GraphModule(graph, copied(graph.graph))
    constants = Constants(module, values, describe_inputs(graph.graph))
    calls = [node for node in module.graph.nodes if is_flex(node)]
    # what makes block lists; none of it is left, as the inner compiler could not trace a transform again
    lists = behind(module.graph, [node for call in calls for node in nodes_in(call.args[4:])])
    for number, node in enumerate(calls):
        replace(module, node, constants, f"flex_mask_{number}")
    for node in reversed(list(module.graph.nodes)):
        if not node.users and node.op != "placeholder" and (node in lists or is_transform(node)):
            module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return module


def is_flex(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.higher_order.flex_attention


def is_transform(node: fx.Node) -> bool:
    """Whether a node belongs to a `torch.func` transform, such as the vmap over a mask's positions."""
    return node.op == "call_function" and _torch.is_transform(node.target)


def writes_into(node: fx.Node) -> fx.Node | None:
    """The value that a node writes into, as Dynamo's graphs spell it; None for most nodes."""
    method = node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")
    return node.all_input_nodes[0] if method or node.target is operator.setitem else None


def behind(graph: fx.Graph, wanted: Sequence[fx.Node]) -> set[fx.Node]:
    """``wanted``, all that they are computed from, and what writes into any of it."""
    writers = [(node, base) for node in graph.nodes if isinstance(base := writes_into(node), fx.Node)]
    needed: set[fx.Node] = set()
    todo = list(wanted)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += [*node.all_input_nodes, *(writer for writer, base in writers if base is node)]
    return needed


def refused(node: fx.Node, reason: str) -> UnsupportedGraph:
    return UnsupportedGraph(f"flex_attention {reason}", op="flex_attention", source=source_line(node))


class Constants:
    """Values of nodes that depend on sizes alone."""

    def __init__(self, module: fx.GraphModule, values: Sequence[Any], inputs: Sequence[GraphInput]) -> None:
        self._module, self._inputs = module, inputs
        placeholders = module.graph.find_nodes(op="placeholder")
        self._given = dict(zip(placeholders, values, strict=True))
        self._known: dict[fx.Node, Any] = {}
        # sizes of transforms that Dynamo spells as symbols
        self._counts = [
            size for node in module.graph.nodes if node.target is open_vmap for size in node.all_input_nodes
        ]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The present sizes of a tensor, which Dynamo may know as symbols."""
        now: dict[Any, Any] = {}
        for placeholder, value in self._given.items():
            if isinstance(value, (int, Tensor)):
                sizes = expressions(placeholder.meta.get("example_value"))
                now.update(zip(sizes, map(int, value.shape if isinstance(value, Tensor) else [value]), strict=False))
        return tuple(int(e.xreplace(now)) for e in expressions(node.meta["example_value"]))

    def of(self, wanted: Any, asker: fx.Node) -> Any:
        """The value of an argument; nodes in it are computed.

        Raises:
            UnsupportedGraph: it depends on a tensor that the user passes.
        """
        needed = behind(self._module.graph, [*nodes_in(wanted), *self._counts])
        pairs = zip(self._inputs, self._given.items(), strict=True)
        read = [given for given, (node, value) in pairs if node in needed and isinstance(value, Tensor)]
        if read:
            named = min(read, key=lambda given: given.weight)  # the first of the user's, else a weight
            text = f"whose mask depends on the values of `{named.path}`; a mask of positions is supported"
            raise refused(asker, text)
        self._run(needed, asker)
        return fx.node.map_arg(wanted, self._known.__getitem__)

    def _run(self, needed: set[fx.Node], asker: fx.Node) -> None:
        """Computes ``needed``, inside the transforms that enclose it; leaves none of them open."""
        interpreter = fx.Interpreter(self._module)
        interpreter.env = self._known
        opened = 0
        try:
            with torch.no_grad():
                for node in self._module.graph.nodes:
                    if node is asker:
                        break
                    border = is_transform(node) and (node.target is open_vmap or not node.all_input_nodes)
                    if node.op == "placeholder" and node in needed:
                        self._known[node] = self._given[node]
                    elif border or (node in needed and node not in self._known):
                        self._known[node] = interpreter.run_node(node)
                    opened += (node.target is open_vmap) - (node.target is close_vmap)
        finally:
            for _ in range(opened):
                close_vmap()


def replace(module: fx.GraphModule, node: fx.Node, constants: Constants, name: str) -> None:
    """Replaces one call."""
    given: Any = node.args
    query, key, value, score, block_mask, scale, options, score_buffers, mask_buffers = given
    body = getattr(module, str(score.target)).graph
    first = next(iter(body.nodes))
    last = body.output_node()
    if score_buffers or last.args[0] not in (first, (first,)):
        raise refused(node, "with a function of the scores; a mask is supported")
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        raise refused(node, "that returns more than the attention itself")
    shape, other = (constants.shape(operand) for operand in (query, key))
    if shape[1] != other[1]:
        raise refused(node, "with fewer heads of keys than of queries")
    function = getattr(module, str(block_mask[_FUNCTION].target))
    parts = constants.of((block_mask[_PARTIAL], block_mask[_FULL], block_mask[_SIZES], mask_buffers), node)
    partial, full, sizes, buffers = parts
    mask = dense_mask(function, partial, full, sizes, buffers, (*map(int, shape[:3]), int(other[2])), node)
    keep = mask.any(dim=-1, keepdim=True)
    with module.graph.inserting_before(node):
        named: dict[str, Any] = {"scale": scale}
        if not mask.all():
            module.register_buffer(name, mask, persistent=False)
            named["attn_mask"] = module.graph.get_attr(name)
        attended = module.graph.call_function(
            torch.nn.functional.scaled_dot_product_attention, (query, key, value), named
        )
        if not keep.all():  # a row that sees nothing is zero
            module.register_buffer(f"{name}_rows", keep, persistent=False)
            rows = module.graph.get_attr(f"{name}_rows")
            attended = module.graph.call_function(torch.where, (rows, attended, 0.0))
    attended.meta = origin_of(node)
    for user in list(node.users):
        user.replace_all_uses_with(attended)
        module.graph.erase_node(user)
    module.graph.erase_node(node)


def dense_mask(
    function: fx.GraphModule, partial: Any, full: Any, sizes: Any, buffers: Any, shape: tuple[int, ...], node: fx.Node
) -> Tensor:
    """bool [B or 1, H or 1, Q, K] of block lists and the mask's function; ``shape`` is (B, H, Q, K)."""
    device = partial[0].device
    grids = [torch.arange(size, device=device) for size in shape]
    where = [grid.view([-1 if dim == place else 1 for dim in range(4)]) for place, grid in enumerate(grids)]
    if math.prod(shape[2:]) > LARGEST:
        raise refused(node, f"with a mask of {shape[2]} x {shape[3]} pairs; up to {LARGEST} are supported")
    seen = torch.as_tensor(function(*where, *buffers)) & spread(blocks(*partial), sizes, shape)
    if full[0] is not None:
        seen = seen | spread(blocks(*full), sizes, shape)
    return seen.contiguous()


def blocks(counts: Tensor, indices: Tensor) -> Tensor:
    """bool [B, H, block rows, block columns]: which blocks the lists name."""
    columns = indices.shape[-1]
    listed = torch.arange(columns, device=indices.device) < counts[..., None]
    found = torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.bool, device=indices.device)
    place = torch.where(listed, indices.long(), columns)  # what is not listed goes to a column of its own
    return found.scatter_(-1, place, True)[..., :columns]


def spread(found: Tensor, sizes: Any, shape: tuple[int, ...]) -> Tensor:
    """Blocks as pairs: [B, H, Q, K]."""
    rows, columns = (
        torch.arange(length, device=found.device) // int(size) for length, size in zip(shape[2:], sizes, strict=True)
    )
    return found[:, :, rows[:, None], columns]
