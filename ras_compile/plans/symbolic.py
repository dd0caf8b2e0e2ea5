"""Graphs and fake tensors whose sizes are expressions in the lengths of the context."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ras_compile._torch import ConstantSource, DimDynamic, FakeTensor, FakeTensorMode, ShapeEnv, pytree
from ras_compile.capture.flex import is_flex, is_transform
from ras_compile.capture.numbers import as_sizes, capture_numbers
from ras_compile.capture.sizes import expression, expressions
from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.analysis.normalize import is_open, normalize
from ras_compile.passes.lowering.interpolate import Point
from ras_compile.passes.rules.registry import named_arguments
from ras_compile.plans.lengths import Lengths

Number = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Symbols:
    """Symbols for lengths, in which sizes of fake tensors are expressed, and what PyTorch assumes of them."""

    def __init__(self, point: Point) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, static_shapes=True)
        sources = [ConstantSource(f"length_{index}") for index in range(len(point))]
        self.symbols = [
            self.env.create_symbol(value, source, DimDynamic.DYNAMIC)
            for value, source in zip(point, sources, strict=True)
        ]
        self.lengths = [
            self.env.create_symintnode(symbol, hint=value, source=source)
            for symbol, value, source in zip(self.symbols, point, sources, strict=True)
        ]

    def fake(self, tensor: Tensor) -> Tensor:
        """A tensor of the same, static, sizes."""
        return self.mode.from_tensor(tensor, static_shapes=True)

    def tensor(self, sizes: Sequence[Any], strides: Sequence[Any], like: Tensor) -> Tensor:
        """A tensor of these sizes and strides, with the type and device of ``like``."""
        with self.mode:
            return torch.empty_strided(list(sizes), list(strides), dtype=like.dtype, device=like.device)

    def holds(self, point: Point) -> bool:
        """Whether everything that was assumed of the lengths is true of these."""
        now = dict(zip(self.symbols, map(sympy.Integer, point), strict=True))
        if any(guard.expr.xreplace(now) != sympy.true for guard in self.env.guards):
            return False
        return all(
            value in self.env.var_to_range[symbol]
            and self.env.replacements.get(symbol, symbol).xreplace(now) == now[symbol]
            for symbol, value in zip(self.symbols, point, strict=True)
        )


class SymbolicGraph:
    """A graph, captured once for all lengths of the context.

    Raises:
        UnsupportedGraph: it cannot be captured so, or a size in it is no affine function of the lengths.

    Attributes:
        sizes: every size, and every number that an op is given, that depends on the lengths.
        cut: for each length whether a size is no sum of its multiples and powers: whether it is halved, say.
        orders: whether tensors of whole numbers depend on the lengths, which may say what stands where.
    """

    def __init__(self, graph: fx.GraphModule, lengths: Lengths, values: Sequence[Any]) -> None:
        if any(is_transform(node) or is_flex(node) for node in graph.graph.nodes):
            raise UnsupportedGraph(
                "function transforms and flex_attention are captured for one length of the context at a time"
            )
        self.lengths, self.base = lengths, lengths.at(values)
        self.symbols = Symbols(self.base)
        self._own = dict(zip(lengths.symbols, self.symbols.symbols, strict=True))
        given = [self._input(*pair) for pair in enumerate(values)]
        told = {place for place, dim in lengths.places if dim is None}
        self.module = capture_numbers(as_sizes(graph, told) if told else graph, given, symbolic=self._ours)
        tensors = [index for index, value in enumerate(given) if isinstance(value, Tensor)]
        pairs = zip(tensors, self.module.graph.find_nodes(op="placeholder"), strict=False)
        self._numbers = {node for index, node in pairs if index in told}
        self._masks = self._masks_of_lengths()
        self._open = self._open_masks(self.base)
        if not self.holds(self.base):
            raise UnsupportedGraph("capturing it has fixed the length of the context")
        self.sizes = self._sizes()
        atoms = {part for e in self.sizes for part in sympy.preorder_traversal(e)}
        self._extremes = sorted((part for part in atoms if type(part).__name__ in ("Max", "Min")), key=str)
        self.cut = [not all(e.is_polynomial(symbol) for e in self.sizes) for symbol in self.symbols.symbols]
        self.orders = self._orders()
        if not any(lengths.sides):
            self._check_affine()

    def _number(self, e: sympy.Expr) -> Any:
        """A number that is an expression in Dynamo's symbols of the lengths."""
        return self.symbols.env.create_symintnode(e.xreplace(self._own), hint=None) if e.free_symbols else int(e)

    def _input(self, index: int, value: Any) -> Any:
        if index not in self.lengths.sizes:
            return self.symbols.fake(value) if isinstance(value, Tensor) else value
        sizes = [self._number(e) for e in self.lengths.sizes[index]]
        if not isinstance(value, Tensor):
            with self.symbols.mode:
                return torch.empty(sizes[0]) if (index, None) in self.lengths.places else sizes[0]
        return self.symbols.tensor(sizes, [self._number(e) for e in self.lengths.strides[index]], value)

    def _ours(self, value: Any) -> Any:
        """A number or a tensor of Dynamo's with sizes in our symbols; None where that knows others than the lengths.

        A tensor stands in its memory as Dynamo's does.
        """
        if isinstance(value, Tensor):
            count = value.untyped_storage().nbytes() // value.element_size()
            sizes, strides = map(self._ours, value.shape), map(self._ours, value.stride())
            with self.symbols.mode:
                memory = torch.empty(self._ours(count), dtype=value.dtype, device=value.device)
                return memory.as_strided(list(sizes), list(strides), self._ours(value.storage_offset()))
        e = expression(value).xreplace(self.lengths.known)
        return self._number(e) if e.free_symbols <= self._own.keys() else None

    def _sizes(self) -> list[sympy.Expr]:
        wanted = set()
        for node in self.module.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Number):
                used = any(not isinstance(user.meta.get("val"), Number) for user in node.users)
                wanted |= {value.node.expr} if used else set()
            else:
                tensors = [item for item in pytree.tree_leaves(value) if isinstance(item, Tensor)]
                wanted |= {expression(size) for tensor in tensors for size in tensor.shape}
        return [e for e in wanted if e.free_symbols & set(self.symbols.symbols)]

    def _orders(self) -> bool:
        depends: set[fx.Node] = set()
        for node in self.module.graph.nodes:
            value = node.meta.get("val")
            sized = isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape)
            if sized or isinstance(value, Number) or depends.intersection(node.all_input_nodes):
                depends.add(node)
        return any(isinstance(v := node.meta.get("val"), Tensor) and not v.is_floating_point() for node in depends)

    def sizes_at(self, point: Point) -> list[int | float]:
        """The sizes of :attr:`sizes` at these lengths."""
        now = dict(zip(self.symbols.symbols, map(sympy.Integer, point), strict=True))
        return [int(found) if found.is_Integer else float(found) for found in (e.xreplace(now) for e in self.sizes)]

    def largest(self, point: Point) -> list[set[int]]:
        """For each maximum and minimum in :attr:`sizes` which of its arguments it is at these lengths."""
        now = dict(zip(self.symbols.symbols, map(sympy.Integer, point), strict=True))
        found = ((e.xreplace(now), [argument.xreplace(now) for argument in e.args]) for e in self._extremes)
        return [{place for place, argument in enumerate(given) if argument == value} for value, given in found]

    def _check_affine(self) -> None:
        """Whether every size is a constant plus multiples of the lengths."""
        own = self.symbols.symbols
        for e in self.sizes:
            if not (e.is_polynomial(*own) and sympy.Poly(e, *own).total_degree() <= 1):
                raise UnsupportedGraph(
                    f"a size in the model is {self.spelled(e)}, no constant plus multiples of lengths"
                )

    def spelled(self, e: sympy.Expr) -> str:
        """A size as the user may write it."""
        names = dict(zip(self.symbols.symbols, map(sympy.Symbol, self.lengths.names), strict=True))
        text = str(e.xreplace(names)).replace("TruncToInt", "int").replace("FloatPow", "pow")
        return re.sub(r"OpaqueUnaryFn_|ToFloat", "", text)

    def holds(self, point: Point) -> bool:
        """Whether the graph is right for these lengths, and the same masks are left out of it as hide nothing."""
        return self.symbols.holds(point) and self._open_masks(point) == self._open

    def cuts(self, point: Point) -> list[bool]:
        """Which slices leave something out at these lengths: one that does not is no op of :meth:`at`."""
        now = dict(zip(self.symbols.symbols, map(sympy.Integer, point), strict=True))
        found = self.module.graph.find_nodes(op="call_function", target=torch.ops.aten.slice.Tensor)
        sizes = [[expressions(each.meta["val"]) for each in (node, node.args[0])] for node in found]
        return [any(a.xreplace(now) != b.xreplace(now) for a, b in zip(*both, strict=True)) for both in sizes]

    def _masks_of_lengths(self) -> dict[fx.Node, list[fx.Node]]:
        """Masks of attention that are computed from nothing but numbers, each with the tensors that it is made of."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in self.module.graph.find_nodes(
            op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
        ):
            mask = named_arguments(node)["attn_mask"]
            if mask is None or mask in found:
                continue
            parts, left = set(), [mask]
            while left:
                one = left.pop()
                if one not in parts and not isinstance(one.meta.get("val"), Number):
                    parts.add(one)
                    left += one.all_input_nodes
            if all(one.op == "call_function" for one in parts):
                found[mask] = [one for one in self.module.graph.nodes if one in parts]
        return found

    def _open_masks(self, point: Point) -> list[bool]:
        """Which of the masks hide nothing at these lengths."""
        return [is_open(self._static(parts, point)[1][mask]) for mask, parts in self._masks.items()]

    def at(self, point: Point) -> fx.GraphModule:
        """The captured graph for these lengths, with static sizes: what :func:`capture` would give."""
        new, _ = self._static(self.module.graph.nodes, point)
        module = fx.GraphModule(self.module, new)
        module.meta["constants"] = self.module.meta["constants"]
        normalize(new)
        module.recompile()
        return module

    def _static(self, nodes: Iterable[fx.Node], point: Point) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
        """Some nodes of the captured graph, in order and with all that they are made of, for these lengths."""
        now = dict(zip(self.symbols.symbols, map(sympy.Integer, point), strict=True))
        mode = FakeTensorMode()
        numbers: dict[Any, Any] = {}  # of each expression once: a graph has few of them, in very many places

        def static(value: Any) -> Any:
            if isinstance(value, Number):
                kind = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(value)]
                expr = value.node.expr
                if (kind, expr) not in numbers:
                    numbers[kind, expr] = kind(expr.xreplace(now))
                return numbers[kind, expr]
            if isinstance(value, Tensor):
                sizes, strides = ([static(part) for part in parts] for parts in (value.shape, value.stride()))
                begin = static(value.storage_offset())
                span = begin + 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
                memory = torch.empty(max(span, 0), dtype=value.dtype, device="meta")  # past the mode, which takes long
                return FakeTensor(mode, memory.as_strided(sizes, strides, begin), value.device)
            return value

        new = fx.Graph()
        known: dict[fx.Node, fx.Node] = {}

        def operand_of(node: fx.Node) -> Any:
            value = node.meta.get("val")
            return static(value) if isinstance(value, Number) else known[node]

        for node in nodes:
            value = node.meta.get("val")
            if isinstance(value, Number) or node in self._numbers:
                continue
            known[node] = new.node_copy(node, operand_of)
            if "val" in node.meta:
                known[node].meta["val"] = pytree.tree_map(static, value)
            if takes_all(known[node]):  # no static capture holds such a slice
                known[node] = known[node].all_input_nodes[0]
        return new, known


def takes_all(node: Any) -> bool:
    """Whether a node is a slice of everything."""
    if node.target is not torch.ops.aten.slice.Tensor:
        return False
    given: list[Any] = [*node.args, *(0, None, None, 1)[len(node.args) - 1 :]]
    operand, dim, start, end, step = given
    size = operand.meta["val"].shape[dim]
    return start in (None, 0) and (end is None or end >= size) and step == 1
