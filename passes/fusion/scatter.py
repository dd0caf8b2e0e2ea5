"""Scatter-GEMMs: a linear that only feeds a splice, through norm and rotary embedding or not, writes straight into the cache.

    y = linear(x, w, b)                                  # [B, A, N]
    v = permute(rope(rms_norm(view(y))))
    index_put_(permute(cache), (batch, rows), v)

becomes

    ras_compile::scatter_linear(view(cache), x, w, b, rows, ...)

because a GEMM may put its output tiles anywhere, so that the product need not go through memory twice. Which splices are
such, `sites.py` finds out. Where several linears feed one splice (text | region), each becomes an op of its own. Those that are
too small to pay alone may pay together, in one launch (`group.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from ras_compile.kernels.arguments import MOST_RUNS, ScatterArguments
from ras_compile.passes.analysis.emit import Emitter, sweep
from ras_compile.passes.analysis.roles import rows_of
from ras_compile.passes.fusion.addresses import Target
from ras_compile.passes.fusion.choices import Asked
from ras_compile.passes.fusion.epilogues import arguments
from ras_compile.passes.fusion.group import GroupChoice, Op, join
from ras_compile.passes.fusion.sites import Site, sites

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)

Choice = Callable[[list[tuple]], bool]  # asked with the arguments of a site's ops (fake tensors): are they worth it?
OneChoice = Callable[[tuple], bool]  # asked with those of one op


@dataclass(frozen=True)
class Fusion:
    """What the fusion of a sparse program has to know."""

    tokens: int  # how many tokens the region has
    # the same program for a few active rows, at least two, on which sites are found; None: the program itself
    probe: fx.Graph | None = None
    pays: Choice | None = None  # says of a site's ops whether they are faster than what they replace; None: all are
    dtypes: Sequence[torch.dtype] = HALF  # the dtypes that are fused
    gather_pays: OneChoice | None = None  # as ``pays``, for gathers before linears
    attention_pays: OneChoice | None = None  # as ``pays``, for attention of the active tokens
    # says so of a launch of several, see `group.py`; None: there are no such launches
    grouped: GroupChoice | None = None

    @cached_property
    def sites(self) -> list[Site]:
        """Those of the probe: found once for programs of any number of active rows."""
        assert self.probe is not None
        return sites(self.probe, self.tokens)


def fuse_scatter_linear(graph: fx.Graph, fusion: Fusion) -> int:
    """Replaces every `linear -> ... -> splice` of a sparse program that pays; returns how many linears there were.

    It does not fire where the linear's result has another use, where what happens to it is no epilogue of the kernel, or
    where dtypes differ (a custom op is not under autocast). A splice that does not pay alone stays until a launch of several
    takes it in.
    """
    writer, pays = Writer(graph, fusion), Asked(fusion.pays)
    ops: list[Op] = []
    for found in fusion.sites if fusion.probe else sites(graph, fusion.tokens):
        site = writer.twin(found)
        offered = [] if site is None else writer.ops(site)
        if offered and pays([op.arguments for op in offered]):
            for op in offered:
                op.write(graph)
            graph.erase_node(site.put)
        ops += offered
    if fusion.grouped is not None:
        join(graph, ops, fusion.grouped)
    sweep(graph)
    return sum(op.written for op in ops)


class Writer:
    """Makes the arguments of a program's scatter-GEMMs. What is not used in the end goes with the dead code."""

    def __init__(self, graph: fx.Graph, fusion: Fusion) -> None:
        self.graph, self.tokens, self.dtypes = graph, fusion.tokens, set(fusion.dtypes)
        self.emit, self.rows = Emitter.of(graph), rows_of(graph)
        self.samples = self.rows.meta["val"].shape[0]
        self.names = {node.name: node for node in graph.nodes}
        self.numbers: dict[object, fx.Node] = {}

    def twin(self, site: Site) -> Site | None:
        """The site of this program that is like one of a program with another number of active rows.

        Both are made by the same steps, so that their nodes have the same names. None where another pass has taken one of them.
        """
        for node in (site.put, *site.live, *site.products):
            twin = self.names.get(node.name)
            if twin is None or twin.target != node.target:
                return None
            if [operand.name for operand in twin.all_input_nodes] != [operand.name for operand in node.all_input_nodes]:
                return None
        products, leaves = ([self.names[node.name] for node in nodes] for nodes in (site.products, site.leaves))
        return Site(self.names[site.put.name], products, [], leaves, {}, site.found)

    def ops(self, site: Site) -> list[Op]:
        """The scatter-GEMMs that may take a splice's place, one for each of its linears; none where one of them cannot be."""
        put, products, samples = site.put, site.products, self.samples
        operands = [put.args[0], *products, *(operand for node in products for operand in node.all_input_nodes)]
        kinds = {operand.meta["val"].dtype for operand in operands}
        if len(kinds) != 1 or not kinds <= self.dtypes or not all(writable(target) for _, target in site.found):
            return []
        lengths = [node.meta["val"].numel() // (samples * node.meta["val"].shape[-1]) for node in products]
        result: list[Op] = []
        with self.graph.inserting_before(put):
            for node, length, (epilogue, target) in zip(products, lengths, site.found, strict=True):
                cache = addressed(self.emit, put.args[0], target, samples, node.meta["val"].shape[-1])
                if cache is None:
                    return []
                x, weight, bias = (*node.args, None)[:3]
                shape = (samples, length, x.meta["val"].shape[-1])
                if tuple(x.meta["val"].shape) != shape:
                    x = self.emit(aten.reshape.default, x, list(shape))
                where = self.row_numbers(target, length)
                tail = arguments(epilogue, site.leaves, samples, length, sum(lengths), self.emit)
                assert tail is not None  # as in the experiment
                result.append(
                    Op(ScatterArguments(cache[0], x, weight, bias, where, cache[1], *tail), put, result, node)
                )
        return result

    def row_numbers(self, target: Target, length: int) -> fx.Node:
        """The rows that a product goes to, [B or 1, length]: `before | before + active tokens | after`; one node for all sites."""
        if target.tokens and target.before == target.after == 0:
            return self.rows
        key = (target.tokens, target.before, target.after, length)
        if key not in self.numbers:
            rows, emit = self.rows, self.emit
            with self.graph.inserting_before(next(node for node in self.graph.nodes if node.op == "call_function")):
                if target.tokens:
                    numbers = (rows, target.before, self.tokens, target.after)
                else:  # the whole of a segment beside the region, the same for all samples
                    none = emit(aten.slice.Tensor, emit(aten.slice.Tensor, rows, 0, 0, 1), 1, 0, 0)
                    numbers = (none, length, 0, 0)
                self.numbers[key] = emit(torch.ops.ras_compile.row_numbers.default, *numbers)
        return self.numbers[key]


def writable(target: Target) -> bool:
    """Whether the kernel has as many strides."""
    return max(len(target.rows), len(target.channels)) <= MOST_RUNS


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
