"""A plan of a small joint block: what its programs return and keep, run eagerly."""

from __future__ import annotations

import copy
import weakref
from contextlib import nullcontext

import pytest
import torch
from joint import captured
from torch import Tensor

import ras_compile
from ras_compile._torch import FakeTensorMode
from ras_compile.capture.inputs import GraphInput
from ras_compile.config import RASConfig
from ras_compile.errors import ConfigError, UnsupportedGraph
from ras_compile.passes.spec import legal
from ras_compile.plans import plan as plans
from ras_compile.plans.plan import Plan
from ras_compile.sampling.branches import Slots

NAMES = ("latent", "text", "position")


def made(**options) -> tuple[Plan, list[Tensor]]:
    """The plan, and inputs of a call."""
    graph, drawn = copy.deepcopy(captured()), torch.Generator().manual_seed(1)
    nodes = graph.graph.find_nodes(op="placeholder")[
        : len(NAMES)
    ]  # then those of the weights, which are constants of it
    values = [torch.randn(node.meta["val"].shape, generator=drawn) for node in nodes]
    inputs = [GraphInput(name, name) for name in NAMES]
    return Plan(graph, inputs, values, RASConfig.from_options({"inner_backend": "eager", **options})), values


def test_a_dense_call_returns_what_the_model_does_and_keeps_copies():
    plan, values = made()
    slots = Slots()
    wanted, outputs = plan.bare(values), plan.dense(values, slots)
    assert all(map(torch.equal, outputs, wanted)) and plan.noise == 0 and plan.latent == 0
    outputs[0].zero_()
    assert torch.equal(plan.cached_noise(slots), wanted[0]), "who got the noise may write it"
    assert plan.cached_noise({}) is None


def test_the_caches_before_are_free_when_a_dense_program_begins(monkeypatch):
    plan, values = made()
    slots = Slots()
    plan.dense(values, slots)
    seen, run = [weakref.ref(cache) for cache in slots["caches"]], plan.run
    alive = []
    monkeypatch.setattr(
        plan, "run", lambda *given: alive.extend(each for each in seen if each() is not None) or run(*given)
    )
    plan.dense(values, slots)
    assert seen and not alive and slots["caches"]


def test_a_sparse_call_computes_its_rows_and_returns_copies():
    plan, values = made()
    slots = Slots()
    before = plan.dense(values, slots)
    other = [torch.randn_like(values[0]), *values[1:]]
    some = plan.run_sparse(other, torch.tensor([[1, 4], [0, 2]]), slots)
    changed = (plan.noise_view(some[0]) != plan.noise_view(before[0])).flatten(2).any(-1)
    assert changed.tolist() == [[row in rows for row in range(6)] for rows in ([1, 4], [0, 2])]
    every = plan.run_sparse(other, torch.arange(6).repeat(2, 1), slots)
    for found, wanted in zip(every, plan.bare(other), strict=True):
        torch.testing.assert_close(found, wanted)
    every[0].zero_()
    assert plan.cached_noise(slots).any()


def test_what_is_on_the_host_and_how_large_caches_are():
    plain, _ = made()
    assert plain.hosted == []
    hosted, _ = made(cache_device="cpu")
    assert hosted.hosted == [0, 1], "keys and values, and not the noise, which is returned"
    whole = plain.cost.cache_bytes
    assert whole == sum(4 * splice.node.meta["val"].numel() for splice in plain.sparse.splices)


@pytest.mark.parametrize("kind", ["float8", "int8"])
def test_rounded_caches_on_a_cpu_ask_no_gpu(kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    plan, values = made(cache_dtype=kind)
    slots = Slots()
    assert torch.equal(plan.dense(values, slots)[0], plan.bare(values)[0])


def test_where_the_spec_is_asked_of_every_pass_programs_of_one_and_of_all_rows_are_checked_too(monkeypatch):
    checked = []
    monkeypatch.setattr(legal, "EVERY_PASS", True)
    monkeypatch.setattr(legal, "check_program", checked.append)
    made()
    rows = [node.meta["val"].shape[1] for program in checked for node in program.graph.nodes if node.name == "rows"]
    assert len(checked) == 3 and sorted(rows) == [1, 6], "dense, of one row (a quarter of six, too), and of all"


@pytest.mark.parametrize("noted", [[], ["a kernel that has yet to be timed"]], ids=["all timed", "one is not"])
@pytest.mark.parametrize("told", [False, True])
def test_kernels_are_compiled_before_the_first_is_timed(monkeypatch, noted, told):
    """A program that was prepared while times were postponed is not the one that is chosen by them; who is told times nothing."""
    calls, made = [], Plan.__new__(Plan)
    made.chosen = (lambda choice, *ops: True) if told else None
    monkeypatch.setattr(Plan, "prepared", lambda self, active, outlined: calls.append((active, outlined)) or len(calls))
    monkeypatch.setattr(plans, "postponed", lambda: nullcontext(noted))
    monkeypatch.setattr(plans, "build", calls.append)
    assert made.build(4, outline_blocks=False) == len(calls)
    once = [(4, False)]
    assert calls == ([*once, noted, *once] if noted and not told else once)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({}, "a quarter"), ({"cache_budget": 2**29}, 2**29), ({"cache_device": "cpu"}, None)],
    ids=str,
)
def test_what_caches_may_take(monkeypatch, options, wanted):
    """Caches on the host have no budget of the device's, unless somebody gives one."""
    monkeypatch.setattr(plans, "default_budget", lambda device: f"a quarter of {device}".removesuffix(" of cpu"))
    given: list = []
    keeper = plans.Keeper
    monkeypatch.setattr(plans, "Keeper", lambda *them: given.append(them) or keeper(them[0], them[1], None))
    plan, _ = made(**options)
    assert [them[2] for them in given] == [wanted] and given[0][0] is plan
    assert plan.graph_slots == 0, "without CUDA graphs there is nothing beside them"


@pytest.mark.parametrize(
    ("number", "kind", "allowed"),
    [((8, 6), "float8", False), ((8, 9), "float8", True), ((9, 0), "float8", True), ((8, 6), "int8", True)],
    ids=str,
)
def test_float8_needs_a_gpu_that_has_it(monkeypatch, number, kind, allowed):
    plan, values = made()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: number)
    with FakeTensorMode():
        there = [torch.empty(value.shape, device="cuda") for value in values]
    config = RASConfig(cache_dtype=kind, cuda_graphs=False, cache_budget=2**20)
    again = lambda: Plan(plan.captured, plan.inputs, there, config, like=plan)  # noqa: E731
    if allowed:
        assert again().analysis is plan.analysis
    else:
        with pytest.raises(ConfigError, match=r"compute capability 8.9 or later, and this one has 8.6"):
            again()


@pytest.mark.parametrize("context", ["frozen", "fresh"])
def test_a_context_that_cannot_be_frozen_is_computed_afresh(monkeypatch, context):
    proved = []

    def prove(self):
        proved.append(self.sparse.live is None)
        if len(proved) == 1:
            raise UnsupportedGraph("not at these sizes")

    monkeypatch.setattr(Plan, "prove", prove)
    if context == "fresh":
        with pytest.raises(UnsupportedGraph, match="not at these sizes"):
            made(context=context)
        return
    with pytest.warns(ras_compile.RASWarning, match="context is computed afresh .* not at these sizes"):
        plan, _ = made(context=context)
    assert proved == [False, True] and plan.sparse.live is None


def test_caches_on_the_host_are_brought_along_by_their_places(monkeypatch):
    carried = []

    def carrying(device, caches):
        carried.append(caches)
        return nullcontext()

    monkeypatch.setattr(plans.kernels, "carrying", carrying)
    plan, values = made(cache_device="cpu")
    monkeypatch.setattr(Plan, "program", lambda self, active, inputs: lambda *given: given)
    caches = [torch.zeros(1) for _ in plan.sparse.splices]
    given = plan.run(2, values, [torch.tensor([[0, 1]]), *caches], Slots())
    plan.run("dense", values, [], Slots())
    assert [list(map(id, them)) for them in carried] == [list(map(id, caches[:2])), []]
    assert [id(value) for value in given[-len(caches) :]] == list(map(id, caches))
