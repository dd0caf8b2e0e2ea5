"""One plan for equal graphs: what Dynamo captures anew, as some size or stride has changed, is often a graph that was there before.

    length 7           Dynamo's first graph; its plan
    length 9           another graph, in which the length is a symbol
    length 7 again     Dynamo calls that other graph; at this length it computes what the first one does

Were it a plan of its own, a guidance branch would lose its caches and all that is known of its noise, in the middle of the
first picture; and programs that are there would be compiled again. So the plan that was there first serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx

from ras_compile.capture.inputs import GraphInput
from ras_compile.config import RASConfig
from ras_compile.plans.latent import is_fixed
from ras_compile.plans.plan import Plan

made: WeakValueDictionary[Hashable, Plan] = WeakValueDictionary()


def known(
    graph: Callable[[], fx.GraphModule], inputs: Sequence[GraphInput], values: Sequence[Any], config: RASConfig
) -> Plan | None:
    """The plan that was made first for a graph that computes the same from equal inputs; None if there was no such.

    Args:
        graph: gives the captured graph; called if there was a plan for such inputs.
        inputs: description of its inputs, all of which have a path.
    """
    first = made.get(_key(inputs, values, config))
    return first.serving(inputs, values) if first is not None and _equal(first.static_graph(), graph()) else None


def first_of_its_kind(plan: Plan, inputs: Sequence[GraphInput], values: Sequence[Any], config: RASConfig) -> Plan:
    """The plan that :func:`known` gives for a plan's graph; ``plan`` itself, if it is the first one."""
    first = known(plan.static_graph, inputs, values, config)
    if first is None:
        made[_key(inputs, values, config)] = plan
    return first or plan


def _key(inputs: Sequence[GraphInput], values: Sequence[Any], config: RASConfig) -> Hashable:
    tensors = [(given, value) for given, value in zip(inputs, values, strict=True) if isinstance(value, Tensor)]
    # numbers that a plan may rest on are told by what they are now: a buffer may be written later
    rests = [v.tolist() if is_fixed(given, v) else None for given, v in tensors]
    told = [(given.path, given.weight, v.shape, v.stride(), v.dtype, v.device) for given, v in tensors]
    return config, *told, str(rests)


def forget() -> None:
    """From now on, plans are made anew."""
    made.clear()


def _equal(first: fx.GraphModule, second: fx.GraphModule) -> bool:
    """Whether two captured graphs compute the same of equal inputs."""
    constants = first.meta["constants"], second.meta["constants"]
    if [_told(value) for value in constants[0]] != [_told(value) for value in constants[1]]:
        return False
    return all(map(torch.equal, *constants)) and _text(first.graph) == _text(second.graph)


def _told(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device


def _text(graph: fx.Graph) -> list[str]:
    """What a graph computes, as text that is equal for equal graphs; numbers that differ in kind alone are told apart."""
    places = {node: f"%{place}" for place, node in enumerate(graph.nodes)}

    def spelled(node: fx.Node) -> str:
        given = fx.node.map_arg((node.args, node.kwargs), lambda operand: _Named(places[operand]))
        # placeholders have names of their own; whatever a graph holds itself is known by the graph alone
        target = "" if node.op in ("placeholder", "output") else str(node.target)
        own = str(id(graph)) if node.op in ("get_attr", "call_module") else ""
        return f"{node.op} {target} {given} {own}"

    return [spelled(node) for node in graph.nodes]


class _Named(str):
    """A name in the text of a graph, without quotes."""

    __slots__ = ()
    __repr__ = str.__str__
