"""Making graphs: nodes that carry what they give on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from ras_compile._torch import FakeTensorMode, OpOverload, schema_of
from ras_compile.errors import UnsupportedGraph, first_line
from ras_compile.passes.analysis.roles import Role
from ras_compile.passes.rules.registry import source_line


class Emitter:
    """Makes nodes, where the graph inserts them, and runs each one on fake tensors, so that it carries ``meta["val"]``.

    Args:
        mode: that of the fake tensors; None runs on whatever tensors the operands carry.
    """

    def __init__(self, mode: FakeTensorMode | None, graph: fx.Graph | None = None) -> None:
        self.graph, self.mode = fx.Graph() if graph is None else graph, mode
        self.origin: fx.Node | None = None
        # Programs of one model repeat most of what is run here: its fake results stay with the mode, as long as that.
        self._known: dict[tuple[Callable, str], Any] = {} if mode is None else vars(mode).setdefault("_ras_known", {})

    @classmethod
    def of(cls, graph: fx.Graph) -> Emitter:
        """Adds nodes to a graph whose nodes carry values."""
        return cls(_mode(graph), graph)

    def placeholder(self, name: str, value: torch.Tensor, role: Role = Role.INPUT) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"], node.meta["role"] = value, role
        return node

    def __call__(self, target: Callable, *args, **kwargs) -> fx.Node:
        try:
            value = self._value(target, args, kwargs)  # first: what cannot run is no node
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            source = None if self.origin is None else source_line(self.origin)
            reason = f"{target} cannot run at the sparse sizes: {first_line(error)}"
            raise UnsupportedGraph(reason, op=str(target), source=source) from error
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        if self.origin is not None:
            node.meta.update(origin_of(self.origin), dense=self.origin.name)
        return node

    def like(self, node: fx.Node, target: Callable, *args, **kwargs) -> fx.Node:
        """A call that has all but its value from another node's ``meta``: what that one is known to be for."""
        made = self(target, *args, **kwargs)
        made.meta = {**node.meta, "val": made.meta["val"]}
        return made

    def instead(self, node: fx.Node, target: Callable, *args, **kwargs) -> fx.Node:
        """Puts a call in the place of a node, which goes."""
        with self.graph.inserting_before(node):
            made = self.like(node, target, *args, **kwargs)
        self.replace(node, made)
        return made

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        """Puts ``by`` in the place of a node, which goes. What is made of it has the strides that it has from then on."""
        changed = [] if described(node.meta["val"]) == described(by.meta["val"]) else [by]
        node.replace_all_uses_with(by, delete_user_cb=lambda user: user is not by)
        self.graph.erase_node(node)
        while changed:
            for user in changed.pop().users:
                if user.op == "call_function" and "val" in user.meta:
                    value = self._value(user.target, user.args, user.kwargs)
                    if described(value) != described(user.meta["val"]):
                        user.meta["val"] = value
                        changed.append(user)

    def _value(self, target: Callable, args: tuple, kwargs: dict) -> Any:
        """The op's fake result. Layers repeat: what an op that writes nowhere gave on such operands, it gives again."""
        fake = isinstance(self.mode, FakeTensorMode)  # the values of real tensors differ
        repeats = fake and isinstance(target, OpOverload) and not schema_of(target).is_mutable
        key = target, repr(fx.node.map_arg((args, kwargs), lambda operand: described(operand.meta["val"])))
        if repeats and key in self._known:
            return self._known[key]
        values = fx.node.map_arg((args, kwargs), lambda operand: operand.meta["val"])
        with self.mode or nullcontext(), torch.no_grad():
            result = target(*values[0], **values[1])
        if repeats:
            self._known[key] = result
        return result


def copied(graph: fx.Graph, known: dict[fx.Node, fx.Node] | None = None, results: slice = slice(None)) -> fx.Graph:
    """A copy of a graph.

    Args:
        known: is filled with the copy of each node.
        results: which of its results the copy returns.
    """
    new = fx.Graph()
    returned = new.graph_copy(graph, {} if known is None else known)
    new.output(returned if results == slice(None) else tuple(returned[results]))
    return new


def sweep(graph: fx.Graph) -> None:
    """Takes out what nothing uses and what has no effect. `eliminate_dead_code` would ask all nodes of a graph for effects, and
    look whether it is in order, which is done once, after the last pass."""
    for node in reversed(graph.nodes):
        if not node.users and not node.is_impure():
            graph.erase_node(node)


def origin_of(node: fx.Node) -> dict[str, Any]:
    """What a node's meta says of the user's code that it comes from."""
    return {key: node.meta[key] for key in ("stack_trace", "nn_module_stack", "source_fn_stack") if key in node.meta}


def described(value: Any) -> Any:
    """All that an op's fake result may depend on."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.stride(), value.storage_offset(), value.device
    return [described(item) for item in value] if isinstance(value, (tuple, list)) else value


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The mode of the fake tensors that a graph's nodes carry.

    Raises:
        UnsupportedGraph: they carry none.
    """
    mode = _mode(graph)
    if mode is None:
        raise UnsupportedGraph("a graph without tensors")
    return mode


def _mode(graph: fx.Graph) -> FakeTensorMode | None:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and hasattr(value, "fake_mode"):
            return value.fake_mode
    return None
