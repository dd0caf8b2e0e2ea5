"""First calls of several threads at the same time: each compiles, one after the other."""

from __future__ import annotations

import contextvars
import gc
import threading

import pytest
import torch
from tiny import LATENT, TEXT, TinyDiT, run

import ras_compile
from ras_compile.history import past_of
from ras_compile.plans.plan import Plan
from ras_compile.sampling.models import modules_of

pytestmark = pytest.mark.usefixtures("quick_collections")

OPTIONS = {"inner_backend": "eager", "sample_ratio": 0.5, "warmup_steps": 2, "unsupported": "error"}


@pytest.mark.parametrize("one_model", [True, False])
@pytest.mark.parametrize("round", range(3))
def test_first_calls_in_two_threads(one_model, round):
    torch._dynamo.reset()
    torch.manual_seed(round)
    models = [TinyDiT(width=32, layers=3).eval()]
    models = models * 2 if one_model else [*models, TinyDiT(width=32, layers=3).eval()]
    compiled = [torch.compile(model, backend="ras", dynamic=False, options=OPTIONS) for model in models]
    given = [(torch.randn(2, 4, 8, side), torch.rand(2), torch.randn(2, 3, 6)) for side in (12, 16)]
    gate, results, errors = threading.Barrier(2), {}, []

    def work(index: int) -> None:
        gate.wait()
        try:
            with torch.no_grad(), ras_compile.generation(num_steps=4) as gen:
                for _ in range(4):
                    gen.step()
                    results.setdefault(index, compiled[index](*given[index]))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    with torch.no_grad():
        for index, model in enumerate(models):
            torch.testing.assert_close(results[index], model(*given[index]))


def test_what_a_thread_drew_is_told_when_it_has_ended():
    """The plans, by which the grid and the costs are known, too."""
    compiled = torch.compile(TinyDiT(8, 1).eval(), backend="ras", options=OPTIONS)

    def work() -> None:
        with torch.no_grad():
            run(compiled, LATENT, TEXT)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    del thread
    gc.collect()
    calls = past_of(modules_of(compiled)).calls
    assert len(calls) == 6 and all(plan is not None and plan.analysis.frame.grid == (4, 6) for _, plan in calls)


def test_calls_of_one_generation_at_the_same_time_are_refused(monkeypatch):
    torch._dynamo.reset()
    compiled = torch.compile(TinyDiT().eval(), backend="ras", options=OPTIONS)
    given, told, real = (torch.randn(2, 4, 8, 12), torch.rand(2), torch.randn(2, 3, 6)), [], Plan.run

    def call() -> None:
        try:
            with torch.no_grad():
                compiled(*given)
        except ras_compile.ConfigError as error:
            told.append(str(error))

    def run(*args):
        monkeypatch.setattr(Plan, "run", real)
        other = threading.Thread(target=contextvars.copy_context().run, args=(call,))
        other.start()
        other.join()
        return real(*args)

    def fail(*args):
        monkeypatch.setattr(Plan, "run", real)
        raise RuntimeError("the device is lost")

    with torch.no_grad(), ras_compile.generation() as gen:
        gen.step()
        wanted = compiled(*given)
        gen.step()
        monkeypatch.setattr(Plan, "run", run)
        torch.testing.assert_close(compiled(*given), wanted)
        assert len(told) == 1 and "let them take turns" in told[0]
        monkeypatch.setattr(Plan, "run", fail)
        with pytest.raises(RuntimeError, match="lost"):
            compiled(*given)
        gen.step()
        other = threading.Thread(target=contextvars.copy_context().run, args=(call,))  # of another thread, and dense
        other.start()
        other.join()
        torch.testing.assert_close(compiled(*given), wanted)
    assert len(told) == 1
