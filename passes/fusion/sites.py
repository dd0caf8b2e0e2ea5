"""Splice sites: what stands between linears and a splice, found by experiment.

    y = linear(x, w, b)                                     # "product", possibly several: text | region
    v = cast(rope(norm(view(y)))), cat, permute ..          # "live" nodes: they depend on products
    index_put_(cache, indices(rows), v)

Models write norms, rotary embeddings and permutations in many ways, and captured graphs in many more. So no way of writing
is matched here. The live nodes are *run*, in float64 on random numbers, beside each epilogue that the scatter-GEMM
knows; where the numbers agree, entry by entry and address by address (`addresses`), the site is proved to be that epilogue.
What does not agree is not a site.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ras_compile._torch import pytree
from ras_compile.kernels import epilogue_reference
from ras_compile.notices import fell_back
from ras_compile.passes.analysis.roles import rows_of
from ras_compile.passes.fusion.addresses import WIDER, Target, ancestors, draws_of, evaluate, runs_here, target_of
from ras_compile.passes.fusion.epilogues import Epilogue, arguments, hypotheses

aten = torch.ops.aten
log = logging.getLogger(__name__)

MAX_LIVE = 64  # a longer way from a linear to a splice is no epilogue
MAX_ENTRIES = 1 << 23  # a splice of more, of a few rows of each sample, would be run for seconds
SPLICES = (aten.index_put_.default, aten.copy_.default)


@dataclass
class Site:
    """A splice and the linears that feed it."""

    put: fx.Node
    products: list[fx.Node]
    live: list[fx.Node]
    leaves: list[fx.Node]
    reach: dict[fx.Node, frozenset[int]]  # the products that a live node depends on
    found: list[tuple[Epilogue, Target]] = field(default_factory=list)  # one for each product

    def live_behind(self, index: int) -> list[fx.Node]:
        """What depends on one of the products."""
        return [node for node in self.live if index in self.reach[node]]


def sites(graph: fx.Graph, tokens: int) -> list[Site]:
    """All splices of a sparse program that are proved to be epilogues of linears.

    Args:
        graph: a sparse program of a few active rows: any number of rows has the same sites.
        tokens: how many tokens there are; with less than two, nothing tells them from a context.
    """
    rows = rows_of(graph)
    after: set[fx.Node] = set()  # what depends on a linear
    for node in graph.nodes:
        if node.target is aten.linear.default or after.intersection(node.all_input_nodes):
            after.add(node)
    known: dict[object, list[tuple[Epilogue, Target]] | None] = {}
    result: list[Site] = []
    for put in graph.nodes:
        if put.target not in SPLICES or tokens < 2:
            continue
        site = candidate(put, after)
        if site is None:
            continue
        key = structure(site)
        if key not in known:
            try:
                known[key] = Experiment(site, rows, tokens).run()
            except Exception as error:
                # an op that has no double precision, or does not run on a CPU: the site stays as it is
                fell_back("a splice not fused", error)
                known[key] = None
        site.found = known[key] or []
        if site.found:
            result.append(site)
    return result


def values_of(put: fx.Node) -> Any:
    """What a splice writes."""
    return put.args[2 if put.target is aten.index_put_.default else 1]


def candidate(put: fx.Node, after: set[fx.Node]) -> Site | None:
    """The products, live nodes and leaves behind a splice; None where they have other uses, or are too many."""
    values = values_of(put)
    site = Site(put, [], [], [], {})
    done: set[fx.Node] = set()

    def visit(node: fx.Node) -> bool:
        if node in done:
            return True
        done.add(node)
        if node.target is aten.linear.default:
            site.reach[node] = frozenset([len(site.products)])
            site.products.append(node)
            return True
        if node not in after:
            site.leaves.append(node)
            return True
        if len(site.live) > MAX_LIVE or not runs_here(node) or not all(map(visit, node.all_input_nodes)):
            return False
        site.reach[node] = frozenset().union(
            *(site.reach.get(operand, frozenset()) for operand in node.all_input_nodes)
        )
        site.live.append(node)
        return True

    if not visit(values) or not site.products:
        return None
    inside = {*site.live, put}
    if any(user not in inside for node in (*site.live, *site.products) for user in node.users):
        return None
    return site


def structure(site: Site) -> object:
    """Equal for sites of which one experiment proves all: layers of a model differ in their weights alone."""
    names = {node: f"live {i}" for i, node in enumerate(site.live)}
    names |= {node: f"product {i}" for i, node in enumerate(site.products)}
    names |= {node: f"leaf {i}" for i, node in enumerate(site.leaves)}

    def words(given: object) -> str:
        return str(
            pytree.tree_map(lambda entry: names.get(entry, entry) if isinstance(entry, fx.Node) else entry, given)
        )

    values = [node.meta["val"] for node in (*site.leaves, *site.products, site.put.args[0])]
    metas = [(str(value.dtype), tuple(value.shape), value.stride()) for value in values]
    # Index tensors are shared by the layers: they are compared as nodes.
    indices = words(site.put.args[1]) if site.put.target is aten.index_put_.default else ""
    return (
        str(site.put.target),
        indices,
        str(metas),
        str([(str(n.target), words((n.args, n.kwargs))) for n in site.live]),
    )


class Experiment:
    """Runs one site on random numbers, beside what it may be."""

    def __init__(self, site: Site, rows: fx.Node, tokens: int) -> None:
        self.site, self.rows, self.tokens = site, rows, tokens
        self.samples, self.active = rows.meta["val"].shape
        self.cache: Tensor = site.put.args[0].meta["val"]
        self.generator = torch.Generator().manual_seed(0)

    def run(self) -> list[tuple[Epilogue, Target]] | None:
        """The epilogue and the target of each product, or None."""
        site, samples = self.site, self.samples
        if values_of(site.put).meta["val"].numel() > MAX_ENTRIES:
            log.info("no experiment on the splice %s: too large", site.put.format_node())
            return None
        lengths = []
        for node in site.products:
            value = node.meta["val"]
            length, rest = divmod(value.numel(), samples * value.shape[-1])
            if rest or (samples > 1 and value.shape[0] != samples):
                return None
            lengths.append(length)
        if any(not isinstance(node.meta.get("val"), Tensor) for node in site.leaves):
            return None
        indices = self._indices()
        if indices is None:
            return None
        # Products of a size at which the eps of a norm shows.
        values: dict[fx.Node, Any] = {node: self._draw(node) * 1e-3 for node in site.products}
        values |= {node: self._draw(node) for node in site.leaves}
        evaluate(site.live, values)
        written = values[values_of(site.put)]
        shape = torch.broadcast_shapes(written.shape, self._shape(indices[0]))
        self.flat = written.expand(shape).reshape(-1)
        self.shape = shape
        self.order = self.flat.argsort()
        self.sorted = self.flat[self.order]
        drawn = [values[node].reshape(samples, length, -1) for node, length in zip(site.products, lengths, strict=True)]
        leaves = [values[node] for node in site.leaves]
        firsts = [sum(lengths[:index]) for index in range(len(lengths))]
        found = []
        entries, places = [], []
        for index, y in enumerate(drawn):
            match = self._match(index, y, leaves, firsts[index], sum(lengths))
            if match is None:
                return None
            epilogue, result, rows_at, channels_at = match
            target = self._target(indices, rows_at, channels_at)
            if target is None:
                return None
            found.append((epilogue, target))
            first = self._addresses(indices[0], rows_at)[..., None]
            channels = self._addresses(indices[0], channels_at)
            places.append((first + channels - channels[0]).reshape(-1))
            entries.append(result.reshape(-1))
        # All that is written, and nothing else, at the addresses where it is written.
        place, entry = torch.cat(places), torch.cat(entries)
        address = self._addresses(indices[0], torch.arange(self.flat.numel()))
        if place.numel() != address.numel():
            return None
        (place, by_place), (address, by_address) = place.sort(), address.sort()
        if not torch.equal(place, address) or not close(entry[by_place], self.flat[by_address]):
            return None
        return found

    def _draw(self, node: fx.Node) -> Tensor:
        value = node.meta["val"]
        if not value.dtype.is_floating_point and not value.dtype.is_complex:
            return torch.zeros(value.shape, dtype=value.dtype)
        return torch.randn(value.shape, generator=self.generator, dtype=WIDER.get(value.dtype, value.dtype))

    def _indices(self) -> list[list[Tensor]] | None:
        """The index tensors for several draws of active rows, which together name every token of every sample."""
        if self.site.put.target is aten.copy_.default:
            return [[]]
        nodes = self.site.put.args[1]
        # dims without an index; or what is written is added
        if any(node is None for node in nodes) or len(self.site.put.args) > 3:
            return None
        behind = ancestors(nodes, self.rows)
        if behind is None:
            return None
        self.draws, result = draws_of(self.samples, self.active, self.tokens, self.generator), []
        for draw in self.draws:
            known = {self.rows: draw}
            evaluate(behind, known)
            result.append([known[node] for node in nodes])
        return result

    def _shape(self, indices: list[Tensor]) -> tuple[int, ...]:
        lead = torch.broadcast_shapes(*(index.shape for index in indices)) if indices else ()
        return (*lead, *self.cache.shape[len(indices) :])

    def _addresses(self, indices: list[Tensor], positions: Tensor) -> Tensor:
        """Where the entries at these positions of what is written go, in entries of the cache's memory."""
        digits = torch.unravel_index(positions, self.shape)
        split = len(self.shape) - (self.cache.ndim - len(indices))
        address = torch.zeros_like(positions)
        lead = self.shape[:split]
        for index, stride in zip(indices, self.cache.stride(), strict=False):
            address += index.expand(lead)[digits[:split]] * stride
        for digit, stride in zip(digits[split:], self.cache.stride()[len(indices) :], strict=True):
            address += digit * stride
        return address

    def _match(self, index: int, y: Tensor, leaves: list[Tensor], first: int, total: int):
        """The epilogue whose results are written, with them, and the positions of one column and of one row."""
        for epilogue in hypotheses(self.site.live_behind(index), self.site.leaves, y.shape[-1], first):
            given = arguments(epilogue, leaves, self.samples, y.shape[1], total, lambda op, *args: op(*args))
            if given is None:
                continue
            result = epilogue_reference(y, *given) if given else y
            rows_at, channels_at = self._find(result[..., 0]), self._find(result[0, 0])
            if rows_at is not None and channels_at is not None:
                return epilogue, result, rows_at, channels_at
        return None

    def _find(self, wanted: Tensor) -> Tensor | None:
        """The positions at which these values are written; None where one of them is not."""
        place = torch.searchsorted(self.sorted, wanted.contiguous())
        near = torch.stack([place - 1, place]).clamp(0, self.sorted.numel() - 1)
        best = (self.sorted[near] - wanted).abs().argmin(0, keepdim=True)
        near = near.gather(0, best)[0]
        return self.order[near] if close(self.sorted[near], wanted) else None

    def _target(self, indices: list[list[Tensor]], rows_at: Tensor, channels_at: Tensor) -> Target | None:
        """The addresses of one product as digits."""
        bases = torch.stack([self._addresses(given, rows_at) for given in indices])  # [draws, B, rows]
        channels = self._addresses(indices[0], channels_at)
        moving = (bases != bases[0]).any(0).any(0)  # which rows are active tokens
        first, length = 0, int(moving.sum())
        if length:
            first = int(moving.nonzero()[0])
            if length != self.active or not bool(moving[first : first + length].all()):
                return None
        return target_of(bases, channels, self.draws if length else [], self.tokens, first)


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for the order of operations in double precision."""
    return bool(torch.isfinite(a).all()) and bool(((a - b).abs() <= 1e-10 * a.abs().max() + 1e-18).all())
