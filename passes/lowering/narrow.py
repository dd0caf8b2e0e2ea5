"""Caches in a type of one byte: what is kept of a token is rounded, with a scale of its own for each row of entries.

    dense:   k -> (round(k / s), s)                                        with s = max |k| over a row / largest number
    sparse:  splice(k_cache, rows, round(k / s)); splice(s_cache, rows, s); sdpa(q, k_cache * s_cache, ..)

A row is what a token has along one dimension that no token counts: a head's entries of a key or value. A dense step computes with
its own values and rounds what it leaves behind; a sparse one reads all tokens as they are kept, its active ones among them. With
a scale for each row float8 is off by 2.5 % of a row's size and int8 by 0.6 %, where the entries of a row are alike (normally
distributed; root mean square); where one of them is 20 times the others, float8 stays as it is and int8 is off by 5 %. One
scale for a whole tensor has no such bound: tokens and heads that are small beside others would be lost.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from ras_compile.passes.algebra.layout import Frame, atoms_of
from ras_compile.passes.analysis.emit import Emitter, fake_mode, sweep
from ras_compile.passes.analysis.roles import Role, of_role
from ras_compile.passes.analysis.splices import SparsePlan
from ras_compile.passes.lowering.inplace import part_of
from ras_compile.passes.programs.aliases import root, writes

aten = torch.ops.aten

DTYPES = {"float8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
FEWEST = 8  # entries of a row: with fewer, its scale would take what rounding saves
TINY = 1e-12  # the scale of a row of zeros

Rows = Mapping[int, int]  # for each splice that is rounded, the dimension along which its rows lie


def rounded_rows(sparse: SparsePlan, frame: Frame) -> dict[int, int]:
    """Which splices may be kept rounded: all that have rows of entries; what the model returns is kept as it is."""
    found = {}
    for index, splice in enumerate(sparse.splices):
        value: Tensor = splice.node.meta["val"]
        free = [
            dim
            for dim, factors in enumerate(splice.layout.dims)
            if value.shape[dim] >= FEWEST
            and not any(frame.counts_tokens(atom) or frame.counts_pictures(atom) for atom in atoms_of(factors))
        ]
        if free and not splice.is_output and value.is_floating_point() and value.element_size() > 1:
            found[index] = free[-1]
    return found


def cache_bytes(sparse: SparsePlan, rows: Rows) -> int:
    """Bytes of the caches of one branch, of which some are rounded."""
    total = 0
    for index, node in enumerate([*(splice.node for splice in sparse.splices), *sparse.frozen]):
        value: Tensor = node.meta["val"]
        if index in rows:
            total += value.numel() + value.numel() // value.shape[rows[index]] * torch.float32.itemsize
        else:
            total += value.numel() * value.element_size()
    return total


def round_dense(program: fx.GraphModule, sparse: SparsePlan, rows: Rows, dtype: torch.dtype) -> fx.GraphModule:
    """Lets a dense program leave caches rounded, in place; their scales come behind all that it returned, in order."""
    emit = Emitter.of(program.graph)
    last = program.graph.output_node()
    results = list(last.args[0])
    kept = [index for index, splice in enumerate(sparse.splices) if not splice.is_output]
    place = len(results) - len(kept) - len(sparse.frozen)
    with program.graph.inserting_before(last):
        for at, index in enumerate(kept, place):
            if index in rows:
                results[at], scale = _rounded(emit, results[at], rows[index], dtype)
                results.append(scale)
    last.args = (tuple(results),)
    sweep(program.graph)  # a clone, say, that was to be the cache
    return program


def round_sparse(program: fx.GraphModule, rows: Rows, dtype: torch.dtype) -> fx.GraphModule:
    """Lets a sparse program keep caches rounded, in place; it takes their scales behind all other inputs, in order."""
    graph, emit = program.graph, Emitter.of(program.graph)
    caches = of_role(graph, Role.CACHE)
    for index, dim in rows.items():
        cache = caches[index]
        value: Tensor = cache.meta["val"]
        with fake_mode(graph):
            narrow = torch.empty_like(value, dtype=dtype)
            size = [1 if at == dim else n for at, n in enumerate(value.shape)]
            scales = torch.empty(size, dtype=torch.float32, device=value.device)
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            scale = emit.placeholder(f"scale_{index}", scales, Role.CACHE)
        order = {node: at for at, node in enumerate(graph.nodes)}
        puts = [node for node in graph.nodes if any(root(target) is cache for target in writes(node))]
        readers = [user for user in cache.users if order[user] > order[puts[-1]]]
        cache.meta["val"] = narrow
        for put in puts:
            _splice_rounded(emit, put, dim, scale, dtype)
        with graph.inserting_before(puts[-1].next):
            whole = emit(aten._to_copy.default, cache, dtype=torch.float32)
            whole = emit(aten.mul.Tensor, whole, scale)
            whole = emit(aten._to_copy.default, whole, dtype=value.dtype)
        for reader in readers:
            reader.replace_input_with(cache, whole)
    sweep(graph)  # views of what was written before
    return program


def _rounded(emit: Emitter, value: fx.Node, dim: int, dtype: torch.dtype) -> tuple[fx.Node, fx.Node]:
    """``(what is kept, its scales)`` of a value whose rows lie along ``dim``."""
    wide = emit(aten._to_copy.default, value, dtype=torch.float32)
    size = emit(aten.amax.default, emit(aten.abs.default, wide), [dim], True)
    scale = emit(aten.clamp.default, emit(aten.div.Tensor, size, LARGEST[dtype]), TINY)
    exact = emit(aten.div.Tensor, wide, scale)
    if not dtype.is_floating_point:
        exact = emit(aten.round.default, exact)
    return emit(aten._to_copy.default, exact, dtype=dtype), scale


def _splice_rounded(emit: Emitter, put: fx.Node, dim: int, scale: fx.Node, dtype: torch.dtype) -> None:
    """Rounds what a splice writes, and writes its scales beside it."""
    part = part_of(put.args[0])
    assert part is not None
    where = part.order.index(dim)
    with put.graph.inserting_before(put):
        target, target_scale = _view(emit, put.args[0], part.cache), _view(emit, put.args[0], scale)
        if put.target is aten.copy_.default:
            value, scales = _rounded(emit, put.args[1], where, dtype)
            rest: tuple = ()
        else:
            given = put.args[2].meta["val"]
            along = where + given.ndim - len(part.order)  # behind the indices, which broadcast to other dimensions
            value, scales = _rounded(emit, put.args[2], along, dtype)
            rest = (put.args[1],)
        emit.like(put, put.target, target_scale, *rest, scales)
        made = emit.like(put, put.target, target, *rest, value)
    put.replace_all_uses_with(made)
    put.graph.erase_node(put)


def _view(emit: Emitter, view: fx.Node, memory: fx.Node) -> fx.Node:
    """The same view of other memory."""
    if view.op == "placeholder":
        return memory
    return emit.like(view, view.target, _view(emit, view.args[0], memory), *view.args[1:])
