"""Which sizes of a Dynamo graph's inputs are lengths of the context: prompts of any length are to share one program.

From the second length on, Dynamo hands over a graph in which the size that has changed is a symbol. A symbol that is a
size of the user's tensors and of nothing that the graph returns is a *length*; the others (a batch) are taken as they are in
the present call. Where latents are packed, `[B, N, C]`, the number of their tokens may be a length, too, and where they are
not, `[B, C, H, W]`, so may their *sides*: all resolutions then share programs. Python numbers whose product is the number of
tokens are sides as well. A *point* has a value for each length.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ras_compile.capture.inputs import GraphInput
from ras_compile.capture.sizes import expression, expressions, held_size, packed_strides
from ras_compile.errors import UnsupportedGraph
from ras_compile.notices import fell_back
from ras_compile.passes.lowering.interpolate import Point

# A video's three sides and a text; of more lengths that change independently, the others are compiled one by one.
MOST = 4
FAR = 5040  # what divides it has the same rest at a length and so far behind it


class Region(enum.Enum):
    """What of the latent may be a length."""

    TOKENS = enum.auto()  # the second size of [B, N, C]
    SIDES = enum.auto()  # what follows the channels in [B, C, H, W] and [B, C, T, H, W]
    NOTHING = enum.auto()


def tell_held_size(graph: fx.Graph, inputs: Sequence[GraphInput]) -> None:
    """Says, below what is not as planned, that a size of the latent is none of the lengths, and why."""
    if (held := held_size(graph)) is not None:
        index, dim, size, line = held
        text = f"{inputs[index].path}.shape[{dim}] stays {size}, as code reads it as a number"
        fell_back("a plan for each length or size", UnsupportedGraph(text, source=line))


def _guards(examples: Sequence[Any]) -> list[sympy.Basic]:
    """What Dynamo has assumed of its symbols."""
    sizes = (size for example in examples if isinstance(example, Tensor) for size in example.shape)
    symbolic: Any = next((size for size in sizes if isinstance(size, torch.SymInt)), None)
    return [] if symbolic is None else [guard.expr for guard in symbolic.node.shape_env.guards]


def _pinned(guards: Sequence[sympy.Basic], known: Mapping[sympy.Symbol, int]) -> set[sympy.Symbol]:
    """Symbols that something assumed holds where they are, as a side is for which a model has code of its own."""
    alone = ((guard, *guard.free_symbols) for guard in guards if guard.is_Equality and len(guard.free_symbols) == 1)
    return {s for guard, s in alone if s in known and guard.xreplace({s: sympy.Integer(known[s] + FAR)}) == sympy.false}


def _tied(guards: Sequence[sympy.Basic], known: Mapping[sympy.Symbol, int]) -> dict[sympy.Symbol, sympy.Symbol]:
    """Lengths that are one, as a text's and that of its positions are: equal ones with which what Dynamo assumed is always true.

        text + picture == positions + pixels     holds for all lengths where text is positions, and picture is pixels

    It is no more than a guess: every call is asked whether its sizes are those that its lengths say (:meth:`Lengths.fits`).
    """
    tied: dict[sympy.Symbol, sympy.Symbol] = {}
    for guard in guards:
        first: dict[int, sympy.Symbol] = {}
        equal = {
            symbol: first.setdefault(known[symbol], tied.get(symbol, symbol))
            for symbol in sorted(guard.free_symbols & known.keys(), key=str)
        }
        if guard.xreplace(equal) == sympy.true:
            tied |= {symbol: other for symbol, other in equal.items() if other != symbol}
    return tied


def _told_in_numbers(
    guards: Sequence[sympy.Basic], sizes: Mapping[int, Sequence[sympy.Expr]], inputs: Sequence[GraphInput]
) -> dict[sympy.Symbol, sympy.Expr]:
    """Sizes of tensors that are products of Python numbers, as the tokens are of a height and a width that are told beside them."""
    numbers = {e for index, found in sizes.items() if inputs[index].size and inputs[index].argument for e in found}
    pairs = (pair for guard in guards if guard.is_Equality for pair in (guard.args, guard.args[::-1]))
    return {
        size: told
        for size, told in pairs
        if size.is_Symbol and size not in numbers and not told.is_Symbol and set() != told.free_symbols <= numbers
    }


class Lengths:
    """The lengths of one graph, for calls that agree in everything else. Made by :meth:`of`.

    Args:
        symbols: Dynamo's symbols of the lengths.
        sizes: for each input that depends on them, its sizes (of a tensor) or itself (a number) as expressions.
        strides: likewise, a tensor's strides.
        guards: what Dynamo has assumed of the lengths.
        sides: for each length how many sides of the latent it is: two where height and width are one symbol, none if none are told.
        known: Dynamo's other symbols as expressions in the lengths.
        names: what the user calls the inputs; by it a reason tells which length it is of.
    """

    def __init__(
        self,
        symbols: Sequence[sympy.Symbol],
        sizes: dict[int, list[sympy.Expr]],
        strides: dict[int, list[sympy.Expr]],
        guards: Sequence[Any],
        sides: Point = (),
        known: Mapping[sympy.Symbol, sympy.Expr] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.known, self.sides = known or {}, sides or (0,) * len(symbols)
        self.symbols, self.sizes, self.strides, self._guards = list(symbols), sizes, strides, list(guards)
        self.places: list[tuple[int, int | None]] = [  # an input, and which of its sizes; None: a number itself
            next(
                (index, dim if index in strides else None)
                for index in (*strides, *sizes)
                for dim, size in enumerate(sizes[index])
                if size == symbol
            )
            for symbol in symbols
        ]
        self.names = [
            (names[index] if names else "input") + ("" if dim is None else f".shape[{dim}]")
            for index, dim in self.places
        ]

    @classmethod
    def of(
        cls,
        graph: fx.GraphModule,
        inputs: Sequence[GraphInput],
        values: Sequence[Any],
        numbers: Sequence[int],
        region: Region = Region.NOTHING,
    ) -> Lengths | None:
        """The lengths of a Dynamo graph; None where there are none, or more than can be followed.

        Args:
            numbers: positions of integers that are no sizes: they are tensors among ``values``.
            region: which sizes of tensors count as lengths although the graph returns them; they are sizes of one that is
                given and one that is returned, and there have to be such.
        """
        examples = [node.meta.get("example_value") for node in graph.graph.find_nodes(op="placeholder")]
        known: dict[sympy.Symbol, int] = {}
        sizes: dict[int, list[sympy.Expr]] = {}
        for index, (example, value) in enumerate(zip(examples, values, strict=True)):
            if index in numbers or inputs[index].weight or not isinstance(example, (Tensor, int, torch.SymInt)):
                continue
            sizes[index] = expressions(example)
            now = value.shape if isinstance(value, Tensor) else [value]
            known.update({e: int(v) for e, v in zip(sizes[index], now, strict=True) if e.is_Symbol})
        guards = _guards(examples)
        tied: dict[sympy.Symbol, sympy.Expr] = {**_tied(guards, known), **_told_in_numbers(guards, sizes, inputs)}
        sizes = {index: [e.xreplace(tied) for e in found] for index, found in sizes.items()}
        returned = [
            [e.xreplace(tied) for e in expressions(node.meta.get("example_value"))]
            for node in graph.graph.output_node().all_input_nodes
        ]
        fixed = {symbol for found in returned for e in found for symbol in e.free_symbols}
        tensors = [index for index in sizes if isinstance(values[index], Tensor)]
        sides: list[sympy.Expr] = []
        moved: set[sympy.Expr] = set()  # lengths of the latent
        if region is Region.TOKENS:
            given = {sizes[index][1] for index in tensors if len(sizes[index]) == 3}
            tokens = {e for e in given & {found[1] for found in returned if len(found) == 3} if e.free_symbols}
            if not tokens:
                return None
            sides = sorted((e for found in tokens if not found.is_Symbol for e in found.free_symbols), key=str)
            moved = {symbol for found in tokens for symbol in found.free_symbols}
        elif region is Region.SIDES:
            grids = [found[2:] for found in returned if len(found) > 3]
            there = {symbol for found in grids for e in found for symbol in e.free_symbols}
            latents = [sizes[index] for index in tensors if len(sizes[index]) > 3]
            latent = next((found for found in latents if there & set(found[2:])), [])
            if not latent:
                return None
            sides = latent[2:]
            fixed.add(latent[1])  # the channels
            moved = {e for e in sides if e.is_Symbol}
        fixed = (fixed - moved) | _pinned(guards, known)
        symbols = [e for index in tensors for e in sizes[index] if e.is_Symbol] + [e for e in sides if e.is_Symbol]
        symbols = [e for e in symbols if e not in fixed]
        symbols = sorted(dict.fromkeys(symbols), key=lambda symbol: symbol not in moved)[:MOST]
        if not symbols or (moved and moved.isdisjoint(symbols)):
            return None
        # an integer argument that is as large as a length (of a prompt, given beside it) is taken for that length
        same: dict[Any, Any] = {
            e: next((length for length in symbols if known[length] == known[e]), sympy.Integer(known[e]))
            for index in sizes.keys() - set(tensors)
            for e in sizes[index]
            if e.is_Symbol and e not in symbols
        }
        same = {**{e: sympy.Integer(v) for e, v in known.items() if e not in symbols}, **same}
        same = {e: sympy.Integer(known[e]) if e in fixed else length for e, length in same.items()}
        same |= {e: other.xreplace(same) for e, other in tied.items()}
        sizes = {index: [e.xreplace(same) for e in sizes[index]] for index in sizes}
        sizes = {index: found for index, found in sizes.items() if any(e.free_symbols for e in found)}
        strides = {
            index: [expression(stride).xreplace(same) for stride in examples[index].stride()]
            for index in tensors
            if index in sizes
        }
        for index in strides:  # Dynamo may have seen a view of what came here packed
            if list(values[index].stride()) == packed_strides(values[index].shape):
                strides[index] = list(map(sympy.sympify, packed_strides(sizes[index])))
        free = {symbol for found in (*sizes.values(), *strides.values()) for e in found for symbol in e.free_symbols}
        if not free <= set(symbols):
            return None
        guards = [guard.xreplace(same) for guard in guards]
        names = [given.path for given in inputs]
        return cls(symbols, sizes, strides, guards, tuple(map(sides.count, symbols)), same, names)

    def at(self, values: Sequence[Any]) -> Point:
        """The lengths of a call."""
        return tuple(int(values[index] if dim is None else values[index].shape[dim]) for index, dim in self.places)

    def key_without_lengths(self, values: Sequence[Any], users: Sequence[int]) -> Hashable:
        """What calls have in common that differ in their lengths alone; which sizes are one length is part of that."""
        return tuple(self.places), tuple(self._key_of(index, values[index]) for index in users)

    def _key_of(self, index: int, value: Any) -> Hashable:
        if not isinstance(value, Tensor):
            return None if index in self.sizes else value
        if index not in self.sizes:
            return value.shape, value.stride(), value.dtype, value.device
        return tuple(
            None if e.free_symbols else size for e, size in zip(self.sizes[index], value.shape, strict=True)
        ), (value.dtype, value.device)

    def fits(self, values: Sequence[Any], point: Point) -> bool:
        """Whether the inputs of a call have the sizes and strides that the lengths want."""
        for index in self.sizes:
            value = values[index]
            if isinstance(value, Tensor):
                sizes, strides = self.described(index, point)
                if tuple(value.shape) != sizes or tuple(value.stride()) != strides:
                    return False
            elif value != self.number(index, point):
                return False
        return True

    def described(self, index: int, point: Point) -> tuple[Point, Point]:
        """Sizes and strides of a tensor among the inputs."""
        now = dict(zip(self.symbols, map(sympy.Integer, point), strict=True))
        sizes, strides = ([int(e.xreplace(now)) for e in found[index]] for found in (self.sizes, self.strides))
        return tuple(sizes), tuple(strides)

    def number(self, index: int, point: Point) -> int:
        """An integer among the inputs."""
        return int(self.sizes[index][0].xreplace(dict(zip(self.symbols, map(sympy.Integer, point), strict=True))))

    def allows(self, point: Point) -> bool:
        """Whether Dynamo could have handed over this graph for these lengths."""
        now = dict(zip(self.symbols, map(sympy.Integer, point), strict=True))
        return all(length > 1 for length in point) and not any(
            guard.xreplace(now) == sympy.false for guard in self._guards
        )
