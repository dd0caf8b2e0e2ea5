"""What a sparse call costs the host once everything is compiled and captured: counted, not timed."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch
from recorded import Recorded
from tiny import TinyDiT
from torch.utils._python_dispatch import TorchDispatchMode

import ras_compile
from ras_compile.backend import CompiledGraph
from ras_compile.dispatch import dispatcher
from ras_compile.execute import cudagraphs, replay

OPTIONS = {"inner_backend": "eager", "sample_ratio": 0.5, "warmup_steps": 2, "reset_interval": None}


class Silent(Recorded):
    """A graph whose replay is nothing to the host."""

    def replay(self) -> None:
        pass


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    monkeypatch.setattr(cudagraphs, "DEVICE", "cpu")
    monkeypatch.setattr(cudagraphs, "Graph", Silent)
    monkeypatch.setattr(replay, "DEVICE", "cpu")
    monkeypatch.setattr(replay, "Graph", Silent)


def sparse_calls(layers: int, steps: int = 9, **options):
    """Runs two generations, the second one step by step: a generator over its sparse calls, which it makes when asked."""
    compiled = torch.compile(TinyDiT(layers=layers).eval(), backend="ras", options={**OPTIONS, **options})
    latent, text = torch.randn(2, 4, 8, 12), torch.randn(2, 3, 6)
    for last in (False, True):
        with torch.no_grad(), ras_compile.generation(num_steps=steps) as gen:
            for step in range(steps):
                gen.step()
                time = torch.full((2,), 1 - step / steps)
                compiled(latent.clone(), time, text)
                if last and step > 5:
                    yield
    assert [record.kind for record in ras_compile.trace(compiled)] == ["dense"] * 2 + ["sparse"] * (steps - 2)


def instructions(layers: int, monkeypatch) -> int:
    """How many instructions of Python a steady call runs, from where Dynamo hands over."""
    counts: list[int] = []
    real = CompiledGraph.__call__

    def counted(graph, *values):
        def note(frame, event, arg):
            frame.f_trace_opcodes = True
            counts[-1] += event == "opcode"
            return note

        counts.append(0)
        sys._getframe().f_trace_opcodes = True  # Python 3.12 looks for this of any frame when tracing begins
        sys.settrace(note)
        try:
            return real(graph, *values)
        finally:
            sys.settrace(None)

    calls = sparse_calls(layers)
    next(calls)  # by now all is compiled and captured, which takes long where each instruction is counted
    with monkeypatch.context() as patch:
        patch.setattr(CompiledGraph, "__call__", counted)
        list(calls)
    return min(counts)


def test_no_python_runs_for_each_weight(monkeypatch):
    few, many = instructions(1, monkeypatch), instructions(9, monkeypatch)
    assert few > 0 and many - few < 32, "8 layers are 32 weights"


@pytest.mark.parametrize(
    ("options", "launches"),
    [
        # at once, being of one dtype: latent, time and text; then the rows; before them the noise and the counts they come from
        ({"metric": "std"}, {"_foreach_copy_ of 3": 1, "copy_": 1 + 2, "clone": 1 + 2}),
        # before them the noise, the one before and the rates, at once, and the counts; what is remembered leaves, too
        ({"metric": "drift", "noise_reuse": "hold"}, {"_foreach_copy_ of 3": 1 + 1, "copy_": 1 + 1, "clone": 1 + 4}),
    ],
    ids=str,
)
def test_what_a_step_launches(options, launches, monkeypatch):
    """Each operation here is a launch on a device: inputs are copied in at once, and what leaves is cloned."""
    seen: list[Counter] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view:
                name = func.overloadpacket.__name__
                if "foreach" in name:  # a launch where all are of one dtype
                    name = (
                        f"{name} of {len(args[0])}" if len({value.dtype for value in args[0]}) == 1 else f"many {name}"
                    )
                seen[-1][name] += 1
            return func(*args, **(kwargs or {}))

    real = dispatcher.Entry.run

    def counted(*args, **kwargs):
        seen.append(Counter())
        with Count():
            return real(*args, **kwargs)

    monkeypatch.setattr(dispatcher.Entry, "run", counted)
    list(sparse_calls(2, **options))
    assert seen[-2] == launches
