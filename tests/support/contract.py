"""The contract's oracle and its properties, shared by every model: see the numbered tests in test_contract.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ras_compile.capture.inputs import GraphInput
from ras_compile.config import RASConfig
from ras_compile.dispatch.dispatcher import worth_tracing
from ras_compile.dispatch.traced import inputs_of, specialise
from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.algebra.layout import Clipped, Concat, Frame, Layout
from ras_compile.plans.plan import Plan
from ras_compile.preview import record_call
from ras_compile.sampling.branches import Slots


@dataclass
class Subject:
    """A model under test: its plan, and inputs as the captured graph takes them."""

    plan: Plan
    values: list[Any]

    @property
    def frame(self) -> Frame:
        return self.plan.analysis.frame

    def with_latent(self, latent: Tensor) -> list[Any]:
        return [latent if index == self.plan.latent else value for index, value in enumerate(self.values)]

    @property
    def latent(self) -> Tensor:
        return self.values[self.plan.latent]

    def other_latent(self, seed: int = 1) -> Tensor:
        """A later latent of the same run: the old one moved by about as much as it is large."""
        generator = torch.Generator().manual_seed(seed)
        return self.latent + torch.randn(self.latent.shape, generator=generator, dtype=torch.float64).to(self.latent)

    @cached_property
    def frozen(self) -> Subject:
        """The same model with a frozen context."""
        plan = self.plan
        frozen = Plan(plan.captured, plan.inputs, self.values, replace(plan.config, context="frozen"))
        assert frozen.sparse.live is not None, "its context can be frozen"
        return Subject(frozen, self.values)

    def program(self, active: int) -> fx.GraphModule:
        """The sparse program for ``active`` rows, as the eager inner backend runs it. Not to be changed."""
        program = self.plan.program(active, self.values)
        assert isinstance(program, fx.GraphModule)
        return program

    def rows(self, active: int, seed: int = 2) -> Tensor:
        """Random active rows, others for each sample: int64 [B, active]."""
        generator = torch.Generator().manual_seed(seed)
        picks = [torch.randperm(self.frame.tokens, generator=generator)[:active] for _ in range(self.frame.samples)]
        return torch.stack([pick.sort().values for pick in picks])

    def sparse(self, values: list[Any], rows: Tensor, caches: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """``(outputs, caches)`` of a sparse step that starts from copies of ``caches``."""
        slots = {"caches": [cache.clone() for cache in caches]}
        with torch.no_grad():
            outputs = self.plan.run_sparse(values, rows, slots)
        return outputs, slots["caches"]

    def dense(self, values: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """``(outputs, caches)`` of a dense step."""
        slots = Slots()
        with torch.no_grad():
            outputs = self.plan.dense(values, slots)
        return outputs, [cache.clone() for cache in slots["caches"]]

    def reference(self, values: list[Any]) -> list[Tensor]:
        """The outputs of the captured graph itself."""
        with torch.no_grad():
            return list(self.plan.captured(*self.plan.tensors(values)))

    @property
    def points(self) -> list[fx.Node]:
        """The nodes whose values are caches: splice points, then what a frozen context keeps."""
        return [*(splice.node for splice in self.plan.sparse.splices), *self.plan.sparse.frozen]

    def matters(self, node: fx.Node, value: Tensor, values: list[Any], wanted: Sequence[Tensor]) -> float:
        """How far the dense graph's outputs move when the value of a node is replaced by ``value``."""
        keep = {node: (value, torch.zeros(value.shape, dtype=torch.bool))}
        with torch.no_grad():
            return error(_Overwrite(self.plan.captured, keep).run(*self.plan.tensors(values)), wanted)

    def oracle(self, values: list[Any], rows: Tensor, caches: Sequence[Tensor]) -> list[Tensor]:
        """The full dense graph in which, at every splice point, the inactive rows are overwritten from the cache."""
        sparse = self.plan.sparse
        fresh = [active_mask(s.layout, self.frame, rows, context=sparse.live is None) for s in sparse.splices]
        fresh += [torch.zeros(node.meta["val"].shape, dtype=torch.bool) for node in sparse.frozen]
        keep = {node: pair for node, *pair in zip(self.points, caches, fresh, strict=True)}
        with torch.no_grad():
            return list(_Overwrite(self.plan.captured, keep).run(*self.plan.tensors(values)))


class _Overwrite(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, keep: dict[fx.Node, Sequence[Tensor]]) -> None:
        super().__init__(module)
        self.keep = keep

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if node in self.keep:
            cache, mask = self.keep[node]
            mixed = torch.where(mask.to(value.device), value, cache)
            value = torch.empty_like(value).copy_(mixed)  # with the strides that it had
        return value


def active_mask(layout: Layout, frame: Frame, rows: Tensor, context: bool = True) -> Tensor:
    """Which entries of a tensor are fresh in a sparse step: those of active rows, and of the ``context`` if it is fresh.

    Written from the meaning of a layout, entry by entry, and not from the compiler's index tensors.
    """
    weights, weight = {}, 1
    for atom, size in reversed(frame.region):
        weights[atom], weight = weight, weight * size
    token = torch.zeros(layout.shape, dtype=torch.int64)
    plain = torch.zeros(layout.shape, dtype=torch.bool)
    sample = torch.zeros(layout.shape, dtype=torch.int64)
    placed: dict[Any, Tensor] = {}  # of tokens that stand in an order, which entry of it each is
    for index, dim in enumerate(layout.dims):
        shape = [-1 if k == index else 1 for k in range(len(layout.dims))]
        entries = [_entry(list(dim), k, weights, frame.batch) for k in range(layout.shape[index])]
        token += torch.tensor([e[0] for e in entries]).reshape(shape)
        plain |= torch.tensor([e[1] for e in entries]).reshape(shape)
        sample += torch.tensor([e[2] for e in entries]).reshape(shape)
        for order in {order for e in entries for order in e[3]}:
            part = torch.tensor([e[3].get(order, 0) for e in entries]).reshape(shape)
            placed[order] = placed.get(order, torch.zeros_like(token)) + part
    for order, entry in placed.items():
        left = order.places[entry]
        for atom, size in reversed(order.base):
            token += left % size * weights[atom] * ~plain
            left = left // size
    rows = rows.cpu()
    active = torch.zeros(frame.samples, frame.tokens, dtype=torch.bool)
    active.scatter_(1, rows, True)
    if not context:
        return active[sample, torch.where(plain, 0, token)] & ~plain
    return plain | active[sample, torch.where(plain, 0, token)]


def _entry(factors: list, place: int, weights: dict, batch: object) -> tuple[int, bool, int, dict]:
    """``(part of the token number, carries no token, sample, parts of places in orders)`` of one entry of a dimension."""
    token, plain, sample = 0, False, 0
    placed: dict[Any, int] = {}
    for factor in reversed(factors):
        place, digit = divmod(place, factor.size)
        if isinstance(factor, Concat):
            for segment in factor.segments:
                size = 1
                for inner in segment:
                    size *= inner.size
                if digit < size:
                    inside = _entry(list(segment), digit, weights, batch)
                    carries = bool(inside[3]) or any(getattr(inner, "atom", None) in weights for inner in segment)
                    token, plain, sample = token + inside[0], plain or inside[1] or not carries, sample + inside[2]
                    placed |= inside[3]
                    break
                digit -= size
        elif isinstance(factor, Clipped):
            inside = _entry(list(factor.inner), digit, weights, batch)
            token, plain, sample = token + inside[0], plain or inside[1], sample + inside[2]
        elif factor.atom is not None and factor.atom.order is not None:
            placed[factor.atom.order] = placed.get(factor.atom.order, 0) + digit * factor.atom.stride
        elif factor.atom in weights:
            token += digit * weights[factor.atom]
        elif factor.atom is not None and factor.atom == batch:
            sample += digit
    return token, plain, sample, placed


def subject(module: nn.Module, inputs: dict, *, exact: bool = True, **options: Any) -> Subject:
    """Captures one call of ``module`` and makes its plan (eager unless ``inner_backend`` says otherwise).

    With ``exact`` everything is in double precision, also what the model itself casts to single precision.
    """
    config = RASConfig.from_options({"inner_backend": "eager", "unsupported": "error", **options})
    try:
        graph, described, values = record_call(module, inputs)
        return planned(graph, described, values, config, exact)
    except UnsupportedGraph as error:
        if not worth_tracing(error, tree_leaves(inputs)):
            raise
    leaves = tree_leaves(((), inputs))
    made = specialise(module, (), inputs, leaves, config)
    graph, leaves = made.trace.graph, inputs_of(made.trace, leaves)
    given = [pair for pair in zip(made.inputs, leaves, strict=True) if isinstance(pair[1], Tensor)]
    given += [(GraphInput(None, "constant", weight=True), constant) for constant in graph.meta.pop("constants")]
    return planned(graph, [pair[0] for pair in given], [pair[1] for pair in given], config, exact)


def by_model(names: Iterable[str]) -> list:
    """Parameters that keep the tests of one model in one process, also those of several files: it is captured once."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]


@lru_cache(maxsize=2)
def of_zoo(name: str) -> Subject:
    """The subject of a class of diffusers, everything in double precision: numbers that become tensors, too.

    Tests share it: none changes it.
    """
    from zoo import ZOO, redraw

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        case = ZOO[name]
        return subject(redraw(case.build()).eval().double(), case.inputs(), latent=case.latent)
    finally:
        torch.set_default_dtype(default)


def planned(
    graph: fx.GraphModule, inputs: list[GraphInput], values: Sequence[Any], config: RASConfig, exact: bool
) -> Subject:
    """The subject of a graph that is still to be captured."""
    if exact:
        widen(graph)
        values = [widest(value) for value in values]
    return Subject(Plan(graph, inputs, values, config), list(values))


WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def widest(value: Any) -> Any:
    """A tensor in double precision, or a dtype that names it; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(WIDER.get(value.dtype, value.dtype))
    return WIDER.get(value, value) if isinstance(value, torch.dtype) else value


def widen(graph: fx.GraphModule) -> None:
    """Takes a Dynamo graph's own casts to fp32 away: models keep some parts in it, and the contract is tested in fp64."""
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.args = torch.utils._pytree.tree_map(widest, node.args)
                node.kwargs = torch.utils._pytree.tree_map(widest, node.kwargs)
                if node.op == "call_method" and node.target == "float":
                    node.target = "double"
            module.recompile()
    graph.double()


def error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """max|a - b| / max|b| over several tensors; infinite where something is not finite."""
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        if not b.numel():
            continue
        a, b = (value.to(torch.float64) if value.dtype == torch.bool else value for value in (a, b))
        scale = b.abs().max().item()
        gap = (a - b).abs().max().item()
        worst = max(worst, gap / scale if scale else gap) if torch.isfinite(a).all() else float("inf")
    return worst
