"""Repeated blocks of a Dynamo graph: captured once, and written out for each of them.

A transformer's layers are the same code at other weights. Dynamo says which module a node comes from; where the nodes of
entries of a `ModuleList` agree in everything but their operands, the graph is captured with one opaque call for each of them,
the block alone is captured once, and a copy of it takes the place of each call. The result is what capturing the whole graph
gives, for a fraction of the time.

A call returns tensors that share no memory, neither with each other nor with what it was given: then writes outside of the
blocks mean what they did. A block therefore ends before the views at its end, and is none if it hands on others.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ras_compile.passes.analysis.emit import described, origin_of, sweep
from ras_compile.passes.programs.aliases import apart, memories

FEWEST_NODES = 8  # shorter blocks are not worth a call
_ENTRY = re.compile(r"(?:\.|\[)['\"]?\d+['\"]?\]?$")  # the path of an entry of a ModuleList: blocks.0, blocks[0]
_LEVELS = 3  # lists in lists
_numbers = itertools.count()
_results: dict[int, list[Tensor]] = {}  # what the calls of a block return, by its number, while it is captured
_lengths: dict[
    str, Any
] = {}  # symbolic numbers that a Dynamo graph uses, by the capture and what they are, while it lasts


class NotRepeated(Exception):
    """A graph, or a block of it, that must be captured whole; the text says why."""


@torch.library.custom_op("ras_compile::repeated_block", mutates_args=())
def block(operands: list[Tensor], number: int) -> list[Tensor]:
    """A block that has yet to be written out: it can be traced, not run."""
    raise NotImplementedError("a block stands for its nodes while a graph is captured; it computes nothing")


@block.register_fake
def _(operands: list[Tensor], number: int) -> list[Tensor]:
    return list(map(_like, _results[number]))


def _like(value: Tensor) -> Tensor:
    """A tensor that stands in its memory as ``value`` does: a block may return a part of what it has made."""
    count = value.untyped_storage().nbytes() // value.element_size()
    memory = torch.empty(count, dtype=value.dtype, device=value.device)
    return memory.as_strided(value.shape, value.stride(), value.storage_offset())


_CALL = torch.ops.ras_compile.repeated_block.default


@dataclass
class Block:
    """Stretches of a Dynamo graph that differ in their operands alone."""

    number: int  # what the calls name it by
    stretches: list[list[fx.Node]] = field(default_factory=list)  # the nodes of each
    # of each stretch the values from outside, in order of their first use
    operands: list[list[fx.Node]] = field(default_factory=list)
    # places of the nodes whose values are used outside, by any of the stretches
    outputs: list[int] = field(default_factory=list)
    lengths: Sequence[str] = ()  # what is looked up while it is captured

    def module(self) -> fx.GraphModule:
        """The block alone, as a Dynamo graph."""
        graph, nodes = fx.Graph(), self.stretches[0]
        env: dict[fx.Node, fx.Node] = {}
        for index, operand in enumerate(self.operands[0]):
            env[operand] = graph.placeholder(f"operand_{index}")
            env[operand].meta["example_value"] = operand.meta["example_value"]
        for node in nodes:
            env[node] = graph.node_copy(node, env.__getitem__)
        graph.output(tuple(env[nodes[place]] for place in self.outputs))
        return fx.GraphModule(nn.Module(), graph)


def shortened(
    graph: fx.GraphModule, symbolic: Callable[[Any], Any] | None = None
) -> tuple[fx.GraphModule, list[Block]]:
    """The Dynamo graph with a call in place of every stretch of a repeated block, and the blocks.

    Args:
        symbolic: see :func:`~ras_compile.capture.export.capture`.

    Raises:
        NotRepeated: there is none, or the graph changes a mode.
    """
    nodes, numbers = list(graph.graph.nodes), dict[str, Any]()
    if symbolic is not None:
        nodes, numbers = _without_numbers(nodes, symbolic)
    for node in nodes:
        if node.op.startswith("call") and "example_value" not in node.meta and node.target is not operator.setitem:
            raise NotRepeated(f"{node.target} returns no value: it may change a mode")
    blocks = max((_blocks(nodes, level) for level in range(_LEVELS)), key=_saved)
    if not blocks:
        raise NotRepeated("no two modules of a list agree")
    starts = {stretch[0]: (found, at) for found in blocks for at, stretch in enumerate(found.stretches)}
    inside = {node for found in blocks for stretch in found.stretches for node in stretch}
    # what has the symbols as sizes
    telling = [node for node in nodes if node.op == "placeholder" and not _static(node)]
    for found in blocks:
        outputs = [found.stretches[0][place] for place in found.outputs]
        if symbolic is None and not all(map(_static, outputs)):
            raise NotRepeated("a block's sizes are symbols")
        results = _examples(outputs)
        _results[found.number] = results if symbolic is None else list(map(symbolic, results))
        if numbers:
            found.operands = [[*dict.fromkeys([*operands, *telling])] for operands in found.operands]
        found.lengths = list(numbers)
    _lengths.update(numbers)

    short = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node in starts:
            found, at = starts[node]
            call = short.call_function(_CALL, ([env[v] for v in found.operands[at]], found.number))
            call.meta = origin_of(node)
            for index, place in enumerate(found.outputs):
                env[found.stretches[at][place]] = short.call_function(_item, (call, index))
        elif node not in inside:
            env[node] = short.node_copy(node, env.__getitem__)
    return fx.GraphModule(graph, short), blocks


def _item(results: Sequence[Tensor], index: int) -> Tensor:
    return results[index]


def _known(number: str) -> Any:
    return _lengths[number]


def _without_numbers(nodes: Iterable[fx.Node], symbolic: Callable[[Any], Any]) -> tuple[list[fx.Node], dict[str, Any]]:
    """A Dynamo graph's nodes in which each user of a symbolic number looks it up, and the numbers by what is looked up.

    Else the first of some blocks would compute a number for all of them.
    """
    new, env = fx.Graph(), dict[fx.Node, fx.Node]()
    capture = next(_numbers)  # another thread may capture another graph meanwhile
    numbers, spelled = dict[str, Any](), dict[fx.Node, str]()
    for node in nodes:
        value = node.meta.get("example_value")
        number = symbolic(value) if isinstance(value, torch.SymInt) else None
        if number is not None:
            spelled[node] = f"{capture}: {number}"
            numbers[spelled[node]] = number

        def given(operand: fx.Node, user: fx.Node = node) -> fx.Node:
            if operand not in spelled:
                return env[operand]
            look = new.call_function(_known, (spelled[operand],))
            look.meta = {**user.meta, "example_value": operand.meta["example_value"]}
            return look

        if number is None or node.op == "placeholder":
            env[node] = new.node_copy(node, given)
    return list(new.nodes), numbers


def written_out(captured: fx.GraphModule, blocks: Sequence[Block], capture: Callable[..., fx.GraphModule]) -> None:
    """Puts a copy of a block's captured graph in the place of each call.

    Args:
        captured: the captured graph of what `shortened` returned.
        capture: captures a Dynamo graph with fake inputs.

    Raises:
        NotRepeated: a block has constants, or returns other tensors than its stretches do.
    """
    calls: dict[Any, list[fx.Node]] = {}
    for call in captured.graph.find_nodes(op="call_function", target=_CALL):
        calls.setdefault(call.args[1], []).append(call)
    for found in blocks:
        same = calls.get(found.number, [])
        given = [_values(call.args[0]) for call in same]
        if any(described(other) != described(given[0]) for other in given):
            raise NotRepeated("a block is called with other tensors than Dynamo saw")
        if not same:
            continue
        inner = capture(found.module(), given[0])
        returned, operands = (
            _values(inner.graph.output_node().args[0]),
            _values(inner.graph.find_nodes(op="placeholder")),
        )
        if not apart(returned, operands):
            raise NotRepeated("a block returns tensors that share memory")
        if described(returned) != described(_results[found.number]):
            raise NotRepeated("a block returns other tensors alone than among the others")
        if inner.graph.find_nodes(op="get_attr") or len(inner.graph.find_nodes(op="placeholder")) != len(given[0]):
            raise NotRepeated("a block has constants")
        for call in same:
            _write_out(captured.graph, call, inner.graph)
    sweep(captured.graph)


def _write_out(graph: fx.Graph, call: fx.Node, inner: fx.Graph) -> None:
    operands: Any = call.args[0]
    env = dict(zip(inner.find_nodes(op="placeholder"), operands, strict=True))
    with graph.inserting_before(call):
        for node in inner.nodes:
            if node.op == "call_function":
                env[node] = graph.node_copy(node, env.__getitem__)
    returned: Any = inner.output_node().args[0]
    for item in list(call.users):
        item.replace_all_uses_with(env[returned[item.args[1]]])
        graph.erase_node(item)
    graph.erase_node(call)


def _values(nodes: Any) -> list[Any]:
    return [node.meta["val"] if isinstance(node, fx.Node) else None for node in nodes]


def forget(blocks: Sequence[Block]) -> None:
    """Nothing captures these blocks any more."""
    for found in blocks:
        _results.pop(found.number, None)
        for number in found.lengths:
            _lengths.pop(number, None)


def _saved(blocks: Sequence[Block]) -> int:
    return sum((len(found.stretches) - 1) * len(found.stretches[0]) for found in blocks)


def _blocks(nodes: Sequence[fx.Node], level: int) -> list[Block]:
    """The repeated blocks among entries of lists that stand in ``level`` other lists."""
    found: dict[Any, Block] = {}
    for path, group in itertools.groupby(nodes, key=lambda node: _entry(node, level)):
        if path is None:
            continue
        stretch = _ending_in_memory_of_its_own(list(group))
        if len(stretch) < FEWEST_NODES:
            continue
        spelled = _spelled(stretch)
        if spelled is None:
            continue
        key, operands, outputs = spelled
        same = found.setdefault(key, Block(next(_numbers)))
        same.stretches.append(stretch)
        same.operands.append(operands)
        same.outputs = sorted({*same.outputs, *outputs})
    return [same for same in found.values() if len(same.stretches) > 1 and _returnable(same)]


def _returnable(block: Block) -> bool:
    """Whether a call can return what a block does."""
    outputs = [block.stretches[0][place] for place in block.outputs]
    return all(map(_plain, outputs)) and apart(_examples(outputs), _examples(block.operands[0]))


def _ending_in_memory_of_its_own(stretch: list[fx.Node]) -> list[fx.Node]:
    """The stretch up to its last node that is neither a view nor a write."""
    for count in range(len(stretch), 0, -1):
        *before, last = stretch[:count]
        if memories(_examples([last])) and apart(_examples([last]), _examples([*before, *last.all_input_nodes])):
            return stretch[:count]
    return []


def _examples(nodes: Iterable[fx.Node]) -> list[Any]:
    return [node.meta.get("example_value") for node in nodes]


def _entry(node: fx.Node, level: int) -> str | None:
    """Path of the entry of a list that a node comes from."""
    if node.op not in ("call_function", "call_method"):
        return None
    paths = [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()]
    entries = [path for path in paths if _ENTRY.search(path)]
    return entries[level] if level < len(entries) else None


def _spelled(stretch: Sequence[fx.Node]) -> tuple[Any, list[fx.Node], set[int]] | None:
    """``(key, operands, outputs)``: equal keys are equal blocks, called from the same line.

    None where something but tensors comes in.
    """
    places = {node: place for place, node in enumerate(stretch)}
    operands: dict[fx.Node, int] = {}

    def reference(node: fx.Node) -> Any:
        return _Reference(
            *(("own", places[node]) if node in places else ("given", operands.setdefault(node, len(operands))))
        )

    words = []
    for node in stretch:
        arguments = fx.node.map_arg((node.args, node.kwargs), reference)
        value = repr(described(node.meta.get("example_value")))
        words.append((node.op, node.target, repr(arguments), value, node.meta.get("stack_trace")))
    if not all(map(_plain, operands)):
        return None
    given = repr([described(operand.meta["example_value"]) for operand in operands])
    outputs = {place for node, place in places.items() if any(user not in places for user in node.users)}
    return (tuple(words), given), list(operands), outputs


@dataclass(frozen=True)
class _Reference:
    kind: str
    place: int


def _static(node: fx.Node) -> bool:
    """Whether a node is no tensor of symbolic sizes."""
    value = node.meta.get("example_value")
    return not isinstance(value, Tensor) or all(isinstance(n, int) for n in (*value.shape, *value.stride()))


def _plain(node: fx.Node) -> bool:
    """Whether a node is a tensor with the values that its memory holds."""
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and not (value.is_conj() or value.is_neg())
