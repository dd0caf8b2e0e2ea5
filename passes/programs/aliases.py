"""Which values share memory: the one alias analysis, for all passes and for the spec.

A view shows memory of its operand, an op that writes in place returns what it has written into, and a call of a repeated block
writes into those operands that the block writes into. What an op's schema says is taken as it is. Some ops return a view in
one call and a copy in the next, and their schemas do not say so: who asks with ``may=True`` takes them for views.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ras_compile._torch import FakeTensorMode, OpOverload, memory_key, pytree, schema_of
from ras_compile.passes.rules.collectives import COLLECTIVES
from ras_compile.passes.rules.registry import nodes_in

# Ops that may return views of operands, or an operand itself, though their schemas do not say so.
MAY_BE_VIEWS = frozenset(
    f"aten::{name}"
    for name in (
        "_unsafe_view", "alpha_dropout", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "cartesian_prod",
        "conj_physical", "contiguous", "dropout", "einsum", "feature_alpha_dropout", "feature_dropout", "flatten", "meshgrid",
        "reshape", "sum_to_size", "to", "type_as",
    )
)  # fmt: skip
INVOKE = torch.ops.higher_order.invoke_subgraph


def subgraph(call: fx.Node) -> fx.GraphModule | None:
    """The repeated block that a node calls; None for other nodes."""
    if call.op != "call_function" or call.target is not INVOKE:
        return None
    owner, block = call.graph.owning_module, call.args[0]
    assert owner is not None and isinstance(block, fx.Node)
    found = operator.attrgetter(str(block.target))(owner)
    assert isinstance(found, fx.GraphModule)
    return found


def writes(node: fx.Node) -> list[fx.Node]:
    """The operands that a node writes into."""
    block = subgraph(node)
    if block is not None:
        given = zip(block.graph.find_nodes(op="placeholder"), node.args[2:], strict=True)
        return [operand for inner, operand in given if isinstance(operand, fx.Node) and written(inner)]
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return []
    return _given(node, _marks(node.target)[1])


def shows(node: fx.Node, *, may: bool = False) -> list[fx.Node]:
    """The operands whose memory a node's result shows: those of a view, and those that an op writes into and returns."""
    target = node.target
    if target is operator.getitem:
        return node.all_input_nodes[:1]
    if node.op != "call_function" or not isinstance(target, OpOverload):
        return []
    shown, _, silent = _marks(target)
    if shown or not (may and silent):
        return _given(node, shown)
    given = node.all_input_nodes
    return [] if target is torch.ops.aten.einsum.default and len(given) > 1 else given  # products are new


Marks = tuple[tuple[int, str], ...]


@functools.cache
def _marks(target: OpOverload) -> tuple[Marks, Marks, bool]:
    """Places and names of the arguments that an op's schema says its results show, of those that it is said to write into, and
    whether it may return a view though its schema does not say so."""
    schema = schema_of(target)
    marked = [(place, one) for place, one in enumerate(schema.arguments) if one.alias_info is not None]
    shown = [(place, one.name) for place, one in marked if any(result.alias_info for result in schema.returns)]
    written = [(place, one.name) for place, one in marked if one.alias_info.is_write]
    return tuple(shown), tuple(written), schema.name in MAY_BE_VIEWS


def _given(node: fx.Node, marks: Marks) -> list[fx.Node]:
    """The nodes that a node is given for the marked arguments of its op."""
    if not marks:
        return []
    args = node.args
    return nodes_in([args[place] if place < len(args) else node.kwargs.get(name) for place, name in marks])


def is_view(node: fx.Node) -> bool:
    """Whether a node only shows its operand's memory, and neither reads nor writes it."""
    return bool(shows(node)) and not writes(node)


def root(node: fx.Node) -> fx.Node:
    """The value that owns the memory which a node shows; of one that shows several, that of the first."""
    while shown := shows(node):
        node = shown[0]
    return node


def roots(node: fx.Node) -> set[fx.Node]:
    """All values whose memory a node may show, itself if it has memory of its own."""
    shown = shows(node, may=True)
    return set().union(*map(roots, shown)) if shown else {node}


def viewers(node: fx.Node) -> Iterator[fx.Node]:
    """A value and all that shows its memory."""
    stack, seen = [node], {node}
    while stack:
        shown = stack.pop()
        yield shown
        found = [user for user in shown.users if user not in seen and shown in shows(user)]
        seen.update(found)
        stack += found


def written(node: fx.Node) -> bool:
    """Whether some node writes into this one or a view of it."""
    return any(shown in writes(user) for shown in viewers(node) for user in shown.users)


def movable(node: fx.Node) -> bool:
    """Whether a node gives the same wherever it stands: it writes nothing, draws nothing, and reads nothing that is written.

    Collectives stay in their order: what one process moves by its own measurements, another one may leave where it is.
    """
    if node.target is not operator.getitem and not isinstance(node.target, OpOverload) or node.target in COLLECTIVES:
        return False
    if writes(node) or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return False
    return is_view(node) or not any(written(root(operand)) for operand in node.all_input_nodes)


def is_input(node: fx.Node) -> bool:
    """Whether a value may be an input of the graph, or a view of one."""
    return any(memory.op != "call_function" for memory in roots(node))


def overlaps_itself(value: Tensor) -> bool:
    """Whether entries of a value share memory (an expanded tensor), so that it cannot be written in place."""
    return any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True))


def memories(values: Any) -> list[int]:
    """The memory of each tensor among some values, as a number: what is seen where a graph has been run."""
    return [memory_key(leaf) for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def run_on_fakes(graph: fx.GraphModule, values: Iterable[Any]) -> tuple[list[Any], Any]:
    """Runs a graph on new fake tensors of the sizes and strides of ``values``; returns them, and what it returns."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        given = [
            torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) if isinstance(v, Tensor) else v
            for v in values
        ]
        return given, fx.Interpreter(graph).run(*given)


def apart(returned: Iterable[Any], given: Iterable[Any]) -> bool:
    """Whether tensors share no memory, neither with each other nor with some others."""
    found = memories(list(returned))
    return len(found) == len({*found}.difference(memories(list(given))))


def fills(value: Tensor) -> bool:
    """Whether a tensor is all that its memory holds."""
    return value.untyped_storage().nbytes() == value.numel() * value.element_size()
