"""What may happen to a linear's result on its way to a splice: guesses, read off the ops in between.

A guess is an :class:`Epilogue` that the scatter-GEMM knows; `sites.py` finds out by experiment whether it is true. So a
guess too many costs a little time, and one too few a fusion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor, fx

from ras_compile.passes.programs.equals import word

aten = torch.ops.aten
ROOTS = (aten.rsqrt.default, aten.sqrt.default, aten.pow.Tensor_Scalar)
NORMS = (aten.rms_norm.default, aten.layer_norm.default)


@dataclass(frozen=True)
class Epilogue:
    """What happens to one product. Leaves are numbered as the site numbers them."""

    head_dim: int = 0
    norm: str = "none"
    norm_weight: int | None = None
    norm_bias: int | None = None
    eps: float = 0.0
    rope: str = "none"
    cos: int | None = None
    sin: int | None = None  # the same leaf as ``cos``: a complex table
    first: int = 0  # the product's first row in a table that has rows for all products; -1: a table of its own


def hypotheses(live: Sequence[fx.Node], leaves: Sequence[fx.Node], channels: int, first: int) -> Iterator[Epilogue]:
    """What may happen to a product, the likeliest first; each is a guess that has yet to be proved.

    Args:
        live: what depends on the product.
        first: the product's first row among those of all products.
    """
    targets = {node.target for node in live}
    norms = ["none"]
    if targets.intersection((*ROOTS, *NORMS)):
        norms = ["layer", "rms"] if aten.layer_norm.default in targets else ["rms", "layer"]
    scalars = {float(value): None for node in live for value in scalars_of(node)}
    used = [number for number, leaf in enumerate(leaves) if any(user in live for user in leaf.users)]
    shapes = [node.meta["val"].shape for node in live if isinstance(node.meta.get("val"), Tensor)]
    sizes = dict.fromkeys(shape[-1] for shape in shapes if shape)
    heads = [size for size in sizes if channels % size == 0 and size > 1]
    heads += [2 * size for size in sizes if channels % (2 * size) == 0 and 2 * size not in sizes]
    values = [leaf.meta["val"] for leaf in leaves]
    plain = norms == ["none"] and not used
    if plain:
        yield Epilogue()
        return
    for head_dim in heads:
        vectors = [number for number in used if values[number].numel() == head_dim]
        tables = [number for number in used if number not in vectors and values[number].ndim >= 2]
        if len(vectors) + len(tables) != len(used) or len(vectors) > 2 or len(tables) > 4:
            continue
        for norm, rotary in product(norms, ropes(leaves, tables, first)):
            if norm == "none":
                if not vectors:
                    yield replace(rotary, head_dim=head_dim)
                continue
            for eps in scalars or {0.0: None}:
                for weight, bias in [(*vectors, None, None)[:2], (*reversed(vectors), None, None)[:2]][
                    : 1 + (len(vectors) > 1)
                ]:
                    yield replace(rotary, head_dim=head_dim, norm=norm, norm_weight=weight, norm_bias=bias, eps=eps)


def scalars_of(node: fx.Node) -> list[float]:
    """The numbers in a node's arguments that may be a norm's eps."""
    given: Any = node.args
    if node.target is aten.layer_norm.default:
        return [given[4] if len(given) > 4 else 1e-5]
    return [value for value in given if isinstance(value, float) and 0 < value < 0.1]


def ropes(leaves: Sequence[fx.Node], tables: list[int], first: int) -> Iterator[Epilogue]:
    """Rotary embeddings that these tables may be of; none where there is no table."""
    if not tables:
        yield Epilogue()
        return
    equal: dict[object, int] = {}  # the same slice of a table may have been taken twice
    for number in tables:
        leaf = leaves[number]
        equal.setdefault(word(leaf) if leaf.op == "call_function" else leaf, number)
    numbers = list(equal.values())
    pairs = permutations(numbers, 2) if len(numbers) == 2 else [(numbers[0],) * 2] if len(numbers) == 1 else []
    for cos, sin in pairs:
        if (cos == sin) == leaves[cos].meta["val"].is_complex() == leaves[sin].meta["val"].is_complex():
            for rope, start in product(("interleaved", "half"), dict.fromkeys((-1, first))):
                yield Epilogue(rope=rope, cos=cos, sin=sin, first=start)


def arguments(
    epilogue: Epilogue, leaves: Sequence[Any], samples: int, length: int, total: int, do: Callable[..., Any]
) -> tuple | None:
    """What the scatter-GEMM takes for an epilogue, from ``head_dim`` on; None where a table has another shape.

    Args:
        leaves: the site's leaves: nodes, or tensors.
        samples, length, total: B, the product's rows, and those of all products.
        do: ``do(op, leaf, ..)`` is a leaf: makes a node, or calls the op.
    """

    def value(leaf: Any) -> Tensor:
        return leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf

    if epilogue.norm == epilogue.rope == "none":
        return ()
    given: list[Any] = []
    for leaf in (None if number is None else leaves[number] for number in (epilogue.norm_weight, epilogue.norm_bias)):
        given.append(leaf if leaf is None or value(leaf).ndim == 1 else do(aten.reshape.default, leaf, [-1]))
    for part, number in enumerate((epilogue.cos, epilogue.sin)):
        if number is None:
            given.append(None)
            continue
        table = leaves[number]
        if value(table).is_complex():
            table = do(aten.select.int, do(aten.view_as_real.default, table), -1, part)
        shape = table_shape(value(table).shape, epilogue, samples, length, total)
        if shape is None:
            return None
        if tuple(value(table).shape) != shape:
            table = do(aten.reshape.default, table, list(shape))
        if shape[1] != length:
            table = do(aten.slice.Tensor, table, 1, epilogue.first, epilogue.first + length)
        given.append(table)
    weight, bias, cos, sin = given
    return epilogue.head_dim, epilogue.norm, weight, bias, epilogue.eps, epilogue.rope, cos, sin


def table_shape(
    shape: Sequence[int], epilogue: Epilogue, samples: int, length: int, total: int
) -> tuple[int, int, int] | None:
    """A rotary table's shape as [samples or 1, rows, entries], or None where it is something else."""
    wanted = length if epilogue.first < 0 else total
    if shape[-1] not in (epilogue.head_dim, epilogue.head_dim // 2):
        return None
    lead = [size for size in shape[:-1] if size != 1]
    for batch in (1, samples):
        if lead == [size for size in (batch, wanted) if size != 1] and math.prod(lead) == batch * wanted:
            return batch, wanted, shape[-1]
    return None
