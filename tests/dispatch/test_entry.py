"""What an entry does with a decision: which program, what is told afterwards, and what happens where one raises."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ras_compile.capture.inputs import GraphInput
from ras_compile.config import RASConfig
from ras_compile.dispatch import dispatcher
from ras_compile.dispatch.dispatcher import Entry


class Told:
    """Writes down what it is called for: in place of a plan, of a state, and of what a plan says to the other processes."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.calls: list[tuple] = []
        self.error = error
        self.failing = ("dense", "run_sparse")

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> Any:
            self.calls.append((name, *given))
            if name in self.failing and self.error is not None:
                raise self.error
            return [name]

        return call


def entry(monkeypatch, *, rows=None, time=None, spread=False, error=None, group=None) -> tuple[Entry, Told, Any]:
    told = Told(error)
    decision = SimpleNamespace(
        rows=rows, time=time, slots={"half": "written"}, spare=None, kind="sparse", active=2, reason=""
    )
    monkeypatch.setattr(Entry, "info", lambda *given: SimpleNamespace(tokens=8, group=group))
    monkeypatch.setattr(Entry, "state_of", lambda *given: told)
    monkeypatch.setattr(dispatcher, "agree", lambda *given: None)
    told.decide = lambda *given: decision  # type: ignore[attr-defined]  # the one answer that is no list
    frame = SimpleNamespace(samples=1, tokens=8, grid=(8,), group=group)
    plan: Any = SimpleNamespace(  # as much of one as is asked for
        dense=told.dense, run_sparse=told.run_sparse, bare=told.bare, noise=0, noise_view="view", latent=0,
        cached_noise=lambda slots: "noise", analysis=SimpleNamespace(frame=frame),
        spread=SimpleNamespace(share=told.share) if spread else None,
    )  # fmt: skip
    made = Entry(plan, [GraphInput("latent", "latent")], ["the latent"], [0], RASConfig())
    return made, told, decision


def names(told: Told) -> list[str]:
    return [name for name, *_ in told.calls]


ROWS = torch.tensor([[0, 1]])


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, ["dense", "record"]),
        ({"rows": ROWS}, ["run_sparse", "record"]),
        ({"time": 0.5}, ["dense", "record", "extrapolate"]),
        ({"time": 0.5, "spread": True}, ["dense", "record", "extrapolate"]),  # each process has computed all
        ({"rows": ROWS, "spread": True}, ["run_sparse", "record"]),  # nothing was made of the noise
        ({"rows": ROWS, "time": 0.5}, ["run_sparse", "record", "extrapolate"]),
        ({"rows": ROWS, "time": 0.5, "spread": True}, ["run_sparse", "record", "extrapolate", "share"]),
    ],
    ids=str,
)
def test_a_step_is_run_told_and_shared(monkeypatch, given, wanted):
    made, told, _ = entry(monkeypatch, **given)
    assert made.run([], [], [], None) == wanted[:1] and names(told) == wanted


def test_without_memory_a_step_is_dense_keeps_nothing_and_is_told(monkeypatch):
    freed = []
    monkeypatch.setattr(dispatcher, "free_memory", lambda: freed.append(True))
    made, told, decision = entry(monkeypatch, rows=ROWS, time=0.5, error=torch.OutOfMemoryError("none"))
    with pytest.warns(UserWarning, match="no memory left for the caches"):
        assert made.run([], [], [], None) == ["bare"]
    assert names(told) == ["run_sparse", "bare", "record"] and freed and not decision.slots
    assert told.calls[-1][3:] == (None, None), "no noise, and no output that another step could rest on"
    assert (decision.kind, decision.rows, decision.active) == ("dense", None, 8) and "no memory" in decision.reason


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), ValueError("wrong")], ids=repr)
def test_a_step_that_raises_has_failed(monkeypatch, error):
    made, told, decision = entry(monkeypatch, error=error)
    with pytest.raises(type(error)):
        made.run([], [], [], None)
    assert told.calls[1:] == [("fail", decision)]


def test_a_step_that_lacks_memory_even_without_caches_has_failed(monkeypatch):
    made, told, decision = entry(monkeypatch, error=torch.OutOfMemoryError("none"))
    told.failing = ("dense", "bare")
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="no memory left"):
        made.run([], [], [], None)
    assert told.calls[2:] == [("fail", decision)] and names(told)[:2] == ["dense", "bare"]


def test_among_several_processes_no_step_is_run_again_by_one_alone(monkeypatch):
    error = torch.OutOfMemoryError("none")
    made, told, _ = entry(monkeypatch, error=error, group=SimpleNamespace(name="all", size=2, rank=0))
    monkeypatch.setattr(dispatcher, "disconnected", lambda error, group: ConnectionError(group.name))
    with pytest.raises(ConnectionError, match="all") as raised:
        made.run([], [], [], None)
    assert names(told) == ["dense", "fail"] and raised.value.__cause__ is error


def test_an_entry_agrees_with_the_other_processes_and_tells_branches_by_what_the_user_gave(monkeypatch):
    """Neither the latent nor the time tells branches apart, nor do sizes, which Dynamo hands over beside their tensors."""
    agreed = []
    monkeypatch.setattr(dispatcher, "agree", lambda *given: agreed.append(given))
    names = [("latent", False), ("timestep", False), ("text", False), (None, True), ("count", True)]
    inputs = [GraphInput(name, name or "s0", size=size) for name, size in names]
    frame = SimpleNamespace(samples=2, tokens=6, grid=(2, 3), group=None)
    plan: Any = SimpleNamespace(analysis=SimpleNamespace(frame=frame), latent=0)
    values, config = ["the latent", torch.tensor(0.5), "the text", 7, 3], RASConfig()
    made = Entry(plan, inputs, values, range(5), config)
    assert agreed == [(plan, inputs, values, config)]
    assert made.timestep == 1 and made.context(values) == ("the text", 3)
    assert 0 < made.used <= time.monotonic()
    plan.identity, plan.latent_view, plan.spread, plan.cost = "plan", "view", "spread", "cost"
    told = made.info(values, ["a weight"])
    assert (told.graph, told.latent, told.context, told.timestep) == ("plan", values[0], ("the text", 3), values[1])
    assert (told.batch, told.tokens, told.grid, told.view, told.spread) == (2, 6, (2, 3), "view", "spread")
    assert told.weights == ["a weight"] and told.cost is not None and told.cost() == "cost"
    another = SimpleNamespace(
        **vars(plan) | {"analysis": SimpleNamespace(frame=SimpleNamespace(samples=1, tokens=4, grid=(4,), group=None))}
    )
    other: Any = made.with_plan(another).info(values, [])
    assert (other.batch, other.tokens, other.grid) == (1, 4, (4,)) and made.info(values, []).tokens == 6


@pytest.mark.parametrize("count", [0, 1, 2, 3, 6])
def test_a_transformer_s_state_is_looked_up_once_and_anew_for_other_weights(monkeypatch, count):
    looked: list[list] = []
    states: list[Told] = []  # the entry refers to them weakly

    def state_for(weights, config):
        looked.append(weights)
        states.append(Told())
        return states[-1]

    monkeypatch.setattr(dispatcher, "state_for", state_for)
    monkeypatch.setattr(dispatcher, "agree", lambda *given: None)
    frame = SimpleNamespace(samples=1, tokens=4, grid=(4,), group=None)
    plan: Any = SimpleNamespace(analysis=SimpleNamespace(frame=frame), latent=0)
    made = Entry(plan, [GraphInput("latent", "latent")], ["the latent"], [0], RASConfig())
    weights = [torch.zeros(1) for _ in range(count)]
    first = made.state_of(weights)
    assert (made.state_of(weights) is first) == (count > 0) and len(looked) == (1 if count else 2)
    for place in {0, count // 2, count - 1} if count else ():
        other = [torch.zeros(1) if index == place else weight for index, weight in enumerate(weights)]
        assert made.state_of(weights) is states[-1]
        assert made.state_of(other) is states[-1] and looked[-1] is other
        made.state_of(weights)
    del first
    states.clear()
    before = len(looked)
    made.state_of(weights)
    assert len(looked) == before + 1, "a state that is gone is no state"
