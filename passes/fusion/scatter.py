"""Fusion: a linear that only feeds a splice, through norm and rotary embedding or not, writes straight into the cache.

    y = linear(x, w, b)                                  # [B, A, N]
    v = permute(rope(rms_norm(view(y))))
    index_put_(permute(cache), (batch, rows), v)

becomes

    ras_compile::scatter_linear(view(cache), x, w, b, rows, ...)

because a GEMM may put its output tiles anywhere, so that the product need not go through memory twice. Which splices are
such, `sites.py` finds out. Where several linears feed one splice (text | region), each becomes an op of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from ras_compile.passes.fusion.epilogues import Epilogue, table_shape
from ras_compile.passes.fusion.group import GroupChoice
from ras_compile.passes.fusion.sites import Site, Target, sites
from ras_compile.passes.programs.emit import Emitter
from ras_compile.passes.programs.roles import rows_of

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)

Choice = Callable[[list[tuple]], bool]  # asked with the arguments of a site's ops (fake tensors): are they worth it?


@dataclass(frozen=True)
class Fusion:
    """What the fusion of a sparse program has to know.

    Attributes:
        tokens: how many tokens the region has.
        probe: the same program for a few active rows, at least two, on which sites are found; None: the program itself.
        pays: says of a site's ops whether they are faster than what they replace; None: all are.
        dtypes: the dtypes that are fused.
        gather_pays: as ``pays``, for gathers before linears.
        attention_pays: as ``pays``, for attention of the active tokens.
        grouped: says so of a launch of several, see `group.py`; None: there are no such launches.
    """

    tokens: int
    probe: fx.Graph | None = None
    pays: Choice | None = None
    dtypes: Sequence[torch.dtype] = HALF
    gather_pays: Choice | None = None
    attention_pays: Choice | None = None
    grouped: GroupChoice | None = None

    @cached_property
    def sites(self) -> list[Site]:
        """Those of the probe: found once for programs of any number of active rows."""
        assert self.probe is not None
        return sites(self.probe, self.tokens)


def fuse_scatter_linear(graph: fx.Graph, fusion: Fusion) -> int:
    """Replaces every `linear -> ... -> splice` of a sparse program; returns how many linears there were.

    It does not fire where the linear's result has another use, where what happens to it is no epilogue of the kernel, or
    where dtypes differ (a custom op is not under autocast). Where a site does not pay, but might in a group, its ops are
    added beside the splice and marked as offered: `group_scatter_linear` takes one or the other away.
    """
    tokens, dtypes, pays = fusion.tokens, fusion.dtypes, fusion.pays
    probe = fusion.probe or graph
    twins = dict(zip(probe.nodes, graph.nodes, strict=True))
    if any(a.target != b.target for a, b in twins.items() if a.op == "call_function"):
        return 0  # no number of active rows gives another program; never seen
    rows = rows_of(graph)
    samples = rows.meta["val"].shape[0]
    emit = Emitter.of(graph)
    answers: dict[object, bool] = {}
    numbers: dict[object, fx.Node] = {}
    count = 0
    for site in fusion.sites if fusion.probe else sites(graph, tokens):
        put = twins[site.put]
        products, leaves = [twins[node] for node in site.products], [twins[node] for node in site.leaves]
        lengths = [node.meta["val"].numel() // (samples * node.meta["val"].shape[-1]) for node in products]
        operands = [put.args[0], *(operand for node in products for operand in node.all_input_nodes)]
        kinds = {operand.meta["val"].dtype for operand in operands} | {node.meta["val"].dtype for node in products}
        if len(kinds) != 1 or not kinds <= set(dtypes) or any(not writable(target) for _, target in site.found):
            continue
        with graph.inserting_before(put):
            made = []
            for node, length, (epilogue, target) in zip(products, lengths, site.found, strict=True):
                cache = addressed(emit, put.args[0], target, samples, node.meta["val"].shape[-1])
                if cache is None:
                    break
                view, grid_dims = cache
                x, weight, bias = (*node.args, None)[:3]
                if tuple(x.meta["val"].shape) != (samples, length, x.meta["val"].shape[-1]):
                    x = emit(aten.reshape.default, x, [samples, length, x.meta["val"].shape[-1]])
                where = row_numbers(graph, emit, target, length, tokens, rows, numbers)
                args = (
                    view,
                    x,
                    weight,
                    bias,
                    where,
                    grid_dims,
                    *more(emit, epilogue, leaves, samples, length, sum(lengths)),
                )
                made.append((node, args))
        if len(made) != len(products):
            continue  # what was emitted has no user, and goes with the dead code
        offered = not worth(made, pays, answers)
        if offered and fusion.grouped is None:
            continue
        with graph.inserting_before(put):
            for node, args in made:
                fused = graph.call_function(torch.ops.ras_compile.scatter_linear.default, args)
                fused.meta = {**node.meta, "val": None, "site": put, "ops": len(made)}
                if offered:
                    fused.meta["offered"] = node
        if not offered:
            graph.erase_node(put)
            count += len(made)
    graph.eliminate_dead_code()
    return count


def worth(made: list[tuple[fx.Node, tuple]], pays: Choice | None, answers: dict[object, bool]) -> bool:
    """Whether a site's ops pay; those of other layers are of the same sizes, and asked about once."""
    if pays is None:
        return True
    ops = [fx.node.map_arg(args, lambda operand: operand.meta["val"]) for _, args in made]
    key = str([[(t.dtype, tuple(t.shape), t.stride()) if isinstance(t, Tensor) else t for t in args] for args in ops])
    if key not in answers:
        answers[key] = pays(ops)
    return answers[key]


def row_numbers(
    graph: fx.Graph,
    emit: Emitter,
    target: Target,
    length: int,
    tokens: int,
    rows: fx.Node,
    known: dict[object, fx.Node],
) -> fx.Node:
    """The rows that a product goes to, [B or 1, length]: `before | before + active tokens | after`; one node for all sites."""
    if target.tokens and target.before == target.after == 0:
        return rows
    key = (target.tokens, target.before, target.after, length)
    if key in known:
        return known[key]
    with graph.inserting_before(next(node for node in graph.nodes if node.op == "call_function")):
        if target.tokens:
            numbers = (rows, target.before, tokens, target.after)
        else:  # the whole of a segment beside the region, the same for all samples
            none = emit(aten.slice.Tensor, emit(aten.slice.Tensor, rows, 0, 0, 1), 1, 0, 0)
            numbers = (none, length, 0, 0)
        result = emit(torch.ops.ras_compile.row_numbers.default, *numbers)
    known[key] = result
    return result


def more(emit: Emitter, epilogue: Epilogue, leaves: list[fx.Node], samples: int, length: int, total: int) -> tuple:
    """The op's arguments for an epilogue, in the order of its schema."""

    def vector(number: int | None) -> fx.Node | None:
        if number is None:
            return None
        leaf = leaves[number]
        return leaf if leaf.meta["val"].ndim == 1 else emit(aten.reshape.default, leaf, [-1])

    def table(number: int | None, part: int) -> fx.Node | None:
        if number is None:
            return None
        leaf = leaves[number]
        if leaf.meta["val"].is_complex():
            leaf = emit(aten.select.int, emit(aten.view_as_real.default, leaf), -1, part)
        shape = table_shape(leaf.meta["val"].shape, epilogue, samples, length, total)
        assert shape is not None
        if tuple(leaf.meta["val"].shape) != shape:
            leaf = emit(aten.reshape.default, leaf, list(shape))
        if shape[1] == length:
            return leaf
        return emit(aten.slice.Tensor, leaf, 1, epilogue.first, epilogue.first + length)

    if epilogue.norm == epilogue.rope == "none":
        return ()
    return (
        epilogue.head_dim, epilogue.norm, vector(epilogue.norm_weight), vector(epilogue.norm_bias), epilogue.eps,
        epilogue.rope, table(epilogue.cos, 0), table(epilogue.sin, 1),
    )  # fmt: skip


def writable(target: Target) -> bool:
    """Whether the kernel has as many strides."""
    return len(target.rows) <= 3 and len(target.channels) <= 3


def addressed(emit: Emitter, cache: fx.Node, target: Target, samples: int, channels: int) -> tuple[fx.Node, int] | None:
    """The cache as [B, *grid, *channels], made of slices, views and a permutation; None where no view is it.

    Each (size, stride) of the target lies in the dimension of the cache whose stride is next below it; larger ones go on
    in the dimension above. The digits of one dimension have to fill it without gaps, or a slice of it.
    """
    value: Tensor = cache.meta["val"]
    dims = sorted((d for d in range(value.ndim) if value.shape[d] > 1), key=value.stride, reverse=True)
    offset, starts = target.offset, {}
    for dim in dims:
        starts[dim], offset = divmod(offset, value.stride(dim))
    if offset:
        return None
    digits = [(samples, target.sample)] if samples > 1 else []
    wanted = [*digits, *target.rows, *target.channels]
    kinds = [0] * len(digits) + [1] * len(target.rows) + [2] * len(target.channels)
    parts: list[tuple[int, int, int, int]] = []  # (dim, stride, size, place in the order that is wanted)
    order: list[tuple[int, int]] = []  # (kind, rank) of each part
    for rank, ((size, stride), kind) in enumerate(zip(wanted, kinds, strict=True)):
        pieces = []
        while size > 1:
            found = next((d for d in dims if value.stride(d) <= stride and stride % value.stride(d) == 0), None)
            if found is None:
                return None
            dim = found
            room = value.shape[dim] * value.stride(dim) // stride
            taken = min(size, room)
            if taken < 2 or size % taken:
                return None
            pieces.append((dim, stride, taken))
            size, stride = size // taken, stride * taken
        for piece in reversed(pieces):
            parts.append((*piece, len(parts)))
            order.append((kind, rank))
    shape: list[int] = []
    places: list[int] = []  # for each dim of the view, which part it is
    view = cache
    for dim in range(value.ndim):
        own = sorted((part for part in parts if part[0] == dim), key=lambda part: -part[1])
        length = math.prod(part[2] for part in own)
        expected = value.stride(dim)
        for _, stride, size, _ in reversed(own):
            if stride != expected:
                return None
            expected *= size
        start = starts.get(dim, 0)
        if start + length > value.shape[dim]:
            return None
        if length != value.shape[dim]:
            view = emit(aten.slice.Tensor, view, dim, start, start + length)
        shape += [part[2] for part in own]
        places += [part[3] for part in own]
    lead = [] if samples > 1 else [1]
    grid = sum(kind == 1 for kind, _ in order)
    # A grid or channels of one entry still have a dimension.
    shape = [*shape, *([1] if grid == 0 else []), *([1] if channels == 1 else [])]
    if lead or list(view.meta["val"].shape) != shape:
        view = emit(aten.view.default, view, [*lead, *shape])
    at = len(lead)
    wanted_order = [*range(at)]
    by_part = {part: index + at for index, part in enumerate(places)}
    batch = [by_part[i] for i, (kind, _) in enumerate(order) if kind == 0]
    rows = [by_part[i] for i, (kind, _) in enumerate(order) if kind == 1] or [at + len(places)]
    last = [by_part[i] for i, (kind, _) in enumerate(order) if kind == 2] or [at + len(shape) - 1]
    wanted_order += [*batch, *rows, *last]
    if wanted_order != sorted(wanted_order):
        view = emit(aten.permute.default, view, wanted_order)
    return view, len(rows)


__all__ = ["Fusion", "fuse_scatter_linear"]
