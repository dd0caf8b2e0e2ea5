"""Graphs on disk: what pickle can write of them, and how they are read again."""

from __future__ import annotations

import hashlib
import importlib
import operator
import pickle
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from ras_compile._torch import (
    FakeTensor,
    FakeTensorMode,
    OperatorBase,
    OpOverload,
    memory_key,
    set_source,
    source_of,
)

_VALUES = ("example_value", "val")  # notes on what a node returns: tensors without values
HASHED = 2**20  # bytes of tensors that are hashed
# Where functions are found that do not say where they are from.
_HOMES = (
    "torch",
    "torch._C._nn",
    "torch.nn.functional",
    "torch.special",
    "torch.linalg",
    "torch.fft",
    "operator",
    "builtins",
    "math",
)


class Unkeepable(Exception):
    """Something that cannot be written to disk."""


# A graph becomes a list of nodes, in which nodes stand by their places, functions by their names and tensors by their sizes.


class _Node(int):
    """The place of a node."""


@dataclass(frozen=True)
class _Function:
    """Where a function is found."""

    module: str
    name: str


@dataclass(frozen=True)
class _Tensor:
    """What is known of a tensor without values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    parameter: bool
    memory: int  # a number for what it shows; tensors of one number share memory
    offset: int
    elements: int  # of that memory


def written(graph: fx.GraphModule, metas: Collection[str] = ()) -> list[tuple]:
    """A graph as values that can be pickled.

    Args:
        graph: it may call graphs that it holds.
        metas: what is kept of the notes on nodes.

    Raises:
        Unkeepable: it has symbolic sizes, or holds tensors.
    """
    places = {node: _Node(place) for place, node in enumerate(graph.graph.nodes)}
    memory: dict[int, int] = {}

    def leaf(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return places[value]
        if isinstance(value, FakeTensor):
            return _described(value, memory)
        if isinstance(value, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, nn.Module)):
            raise Unkeepable(f"a graph holds a {type(value).__name__}")
        return _named(value) if isinstance(value, OperatorBase) else value

    once: dict[str, Any] = {}  # equal values are written once
    parts: set[Any] = set()  # and so are graphs
    found = []
    for node in graph.graph.nodes:
        part: Any = None  # of a placeholder its source, of a graph that is held its nodes
        if node.op == "get_attr":
            held = operator.attrgetter(node.target)(graph)
            if not isinstance(held, fx.GraphModule):
                raise Unkeepable(f"a graph holds a {type(held).__name__}")
            part = None if node.target in parts else written(held, metas)
            parts.add(node.target)
        elif node.op == "placeholder":
            part = source_of(node)
        elif node.op == "call_module":
            raise Unkeepable("a graph calls a module")
        target = _named(node.target) if node.op == "call_function" else node.target
        meta = {}
        for key in metas:
            if key in node.meta:
                value = node.meta[key]
                meta[key] = map_aggregate(value, leaf) if key in _VALUES else once.setdefault(repr(value), value)
        args, kwargs = map_aggregate((node.args, node.kwargs), leaf)
        found.append((node.op, node.name, target, args, kwargs, meta, part))
    return found


def read(nodes: Iterable[tuple]) -> fx.GraphModule:
    """The graph of :func:`written`."""
    graph = fx.Graph()
    made: list[fx.Node] = []
    mode = FakeTensorMode()
    memory: dict[int, Tensor] = {}

    def leaf(value: Any) -> Any:
        if isinstance(value, _Node):
            return made[value]
        if isinstance(value, _Function):
            return _found(value)
        return _made(value, mode, memory) if isinstance(value, _Tensor) else value

    held = nn.Module()
    for op, name, target, args, kwargs, meta, part in nodes:
        args, kwargs = map_aggregate((args, kwargs), leaf)
        if op == "get_attr" and target not in dict(held.named_children()):
            held.add_module(target, read(part))
        node = graph.create_node(op, _found(target) if op == "call_function" else target, args, kwargs, name)
        node.meta = {key: map_aggregate(value, leaf) if key in _VALUES else value for key, value in meta.items()}
        if op == "placeholder" and part is not None:
            set_source(node, part)
        made.append(node)
    return fx.GraphModule(held, graph)


def pickled(content: Any) -> bytes:
    """
    Raises:
        Unkeepable: it holds what cannot be pickled.
    """
    try:
        return pickle.dumps(content, protocol=5)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise Unkeepable(str(error)) from error


def unpickled(content: bytes) -> Any:
    """What :func:`pickled` wrote. It can run code, as compiled programs do: `load` reads folders that are trusted alone."""
    return pickle.loads(content)


def text(graph: fx.GraphModule) -> str:
    """All of a graph of ops that tells what it computes: equal for graphs that are the same but for the values of their inputs.

    Raises:
        Unkeepable: it holds graphs, or large tensors.
    """
    lines = []
    for node in graph.graph.nodes:
        seen: Any = ""
        if node.op == "placeholder":
            value = node.meta.get("val")
            seen = (
                (tuple(value.shape), value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else value
            )
        elif node.op == "get_attr":
            seen = values_of([operator.attrgetter(node.target)(graph)])
        elif node.op not in ("call_function", "output"):
            raise Unkeepable(f"a graph has the operation {node.op}")
        lines.append(f"{node.op} {node.name} {node.target} {node.args} {node.kwargs} {seen} {node.meta.get('role')}")
    return "\n".join(lines)


def values_of(tensors: Sequence[Any]) -> str:
    """A hash of the values of some tensors.

    Raises:
        Unkeepable: they are no plain tensors, or large.
    """
    digest, size = hashlib.sha256(), 0
    for value in tensors:
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer) or value.layout is not torch.strided:
            raise Unkeepable(f"a graph holds a {type(value).__name__}")
        size += value.nbytes
        if size > HASHED:
            raise Unkeepable("a graph holds large tensors")
        digest.update(f"{tuple(value.shape)} {value.dtype} {value.device}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _described(value: FakeTensor, memory: dict[int, int]) -> _Tensor:
    """
    Raises:
        Unkeepable: a size is a symbol.
    """
    offset: Any = value.storage_offset()
    sizes = (*value.shape, *value.stride(), offset)
    if not all(type(size) is int for size in sizes) or value.layout is not torch.strided:
        raise Unkeepable("a graph has sizes that vary")
    number = memory.setdefault(memory_key(value), len(memory))
    elements = value.untyped_storage().nbytes() // value.element_size()
    return _Tensor(
        tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad, isinstance(value, nn.Parameter),
        number, offset, elements,
    )  # fmt: skip


def _made(told: _Tensor, mode: FakeTensorMode, memory: dict[int, Tensor]) -> Tensor:
    if told.memory not in memory:
        memory[told.memory] = torch.empty(told.elements, dtype=told.dtype, device="meta")
    flat = memory[told.memory]
    flat = flat if flat.dtype == told.dtype else flat.view(told.dtype)
    value = FakeTensor(mode, flat.as_strided(told.size, told.stride, told.offset), told.device)
    if told.parameter:
        return nn.Parameter(value, requires_grad=told.requires_grad)
    return value.requires_grad_() if told.requires_grad else value


@cache
def _found(told: _Function) -> Any:
    return operator.attrgetter(told.name)(importlib.import_module(told.module))


def _named(target: Any) -> Any:
    """A function, by where it is found.

    Raises:
        Unkeepable: it is found nowhere.
    """
    name = getattr(target, "__name__", None) or type(target).__name__
    homes = [getattr(target, "__module__", None), *_HOMES]
    names = [getattr(target, "__qualname__", name), name]
    if isinstance(target, OperatorBase):
        higher = not isinstance(target, OpOverload)
        homes, names = ["torch"], [f"ops.higher_order.{target.name()}" if higher else f"ops.{target}"]
    for home in filter(None, homes):
        for each in names:
            told = _Function(home, each)
            try:
                if _found(told) is target:
                    return told
            except (ImportError, AttributeError):
                continue
    raise Unkeepable(f"a graph calls {target}, which no name leads to")
