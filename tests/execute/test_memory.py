"""What generations keep for the next one goes with the compiled model, on request, and beyond the budget."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from pipelines import draw_sd3, sd3
from recorded import Recorded
from tiny import EAGER, LATENT, TEXT, kinds, model, run

import ras_compile
from ras_compile.execute import cudagraphs, memory, replay
from ras_compile.execute.homes import listed
from ras_compile.plans.plan import Plan

pytestmark = pytest.mark.usefixtures("quick_collections")

WIDE = torch.randn(2, 4, 8, 16)
OTHERS: weakref.WeakSet[memory.Keeper] = weakref.WeakSet()  # of models that tests before have left


@pytest.fixture(autouse=True)
def fresh():
    gc.collect()
    OTHERS.update(memory.keepers)


def compiled_model(**options):
    plain = model()
    options = {**EAGER, "metric": "std", "noise_reuse": "hold", **options}  # the fewest graphs
    return plain, torch.compile(plain, backend="ras", options=options)


def keepers() -> list[memory.Keeper]:
    return [keeper for keeper in listed(memory.keepers) if keeper not in OTHERS]


def kept() -> list[weakref.ref]:
    """The cache tensors that are kept at present."""
    gc.collect()
    slots = [slots for keeper in keepers() for slots in keeper.held if slots]
    return [weakref.ref(cache) for found in slots for cache in found["caches"]]


def alive(refs) -> int:
    gc.collect()
    return sum(ref() is not None for ref in refs)


def test_caches_stay_for_the_next_generation():
    _, compiled = compiled_model()
    run(compiled, LATENT, TEXT)
    assert alive(kept()) == 5 and sum(keeper.bytes for keeper in keepers()) > 0
    run(compiled, LATENT, TEXT)
    assert alive(kept()) == 5


@pytest.fixture
def captured(monkeypatch):
    """Graphs that stand in for CUDA's, by weak references."""
    graphs = []

    class Graph(Recorded):
        def __init__(self, *given) -> None:
            super().__init__(*given)
            graphs.append(weakref.ref(self))

    for module in (cudagraphs, replay):
        monkeypatch.setattr(module, "DEVICE", "cpu")
        monkeypatch.setattr(module, "Graph", Graph)
    return graphs


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_they_go_with_the_compiled_model(cuda_graphs, captured):
    """Though the weights live on."""
    plain, compiled = compiled_model(cuda_graphs=cuda_graphs)
    run(compiled, LATENT, TEXT)
    run(compiled, LATENT, TEXT)
    refs = kept()
    assert refs and bool(alive(captured)) == cuda_graphs
    del compiled
    torch._dynamo.reset()
    assert alive(refs) == 0
    assert next(plain.parameters()) is not None


def test_all_goes_with_the_model_itself(captured):
    """What Dynamo compiled stays with the code of the model's class."""
    plain, compiled = compiled_model()
    run(compiled, LATENT, TEXT)
    run(compiled, LATENT, TEXT)
    refs = kept()
    assert refs and alive(captured) == 3, "the dense program, the sparse one, the selection"
    del plain, compiled
    assert alive(refs) == alive(captured) == 0
    assert not any(keeper.bytes for keeper in keepers())


def test_graphs_go_at_release(captured):
    _, compiled = compiled_model()
    for _ in range(2):
        run(compiled, LATENT, TEXT)
        run(compiled, LATENT, TEXT)
        assert alive(captured) == 3
        ras_compile.release(compiled)
        assert alive(captured) == 0


def test_release_while_a_call_runs(monkeypatch):
    """The call is finished, and the next one begins anew."""
    _, compiled = compiled_model()
    wanted, real, calls = run(compiled, LATENT, TEXT), Plan.run, []

    def released(*given):
        results = real(*given)
        calls.append(given[1])
        if calls[-1] != "dense" and len(calls) == 4:
            other = threading.Thread(target=ras_compile.release, args=(compiled,))
            other.start()
            other.join()
        return results

    monkeypatch.setattr(Plan, "run", released)
    run(compiled, LATENT, TEXT)
    assert [call == "dense" for call in calls] == [True, True, False, False, True, True]
    assert torch.equal(run(compiled, LATENT, TEXT), wanted)


def test_a_collection_that_grows_is_listed_again():
    class Growing:
        tries = 0

        def __iter__(self):
            self.tries += 1
            yield 1
            if self.tries < 3:
                raise RuntimeError("Set changed size during iteration")

    assert listed(Growing()) == [1]


def test_release():
    plain, compiled = compiled_model()
    wanted = run(compiled, LATENT, TEXT)
    refs = kept()
    ras_compile.release(compiled)
    assert refs and alive(refs) == 0 and not kept()
    assert ras_compile.trace(compiled) == []
    assert torch.equal(run(compiled, LATENT, TEXT), wanted) and kinds(compiled) == "ddssss"


def test_detach_releases():
    pipe = sd3()
    pipe.set_progress_bar_config(disable=True)
    with ras_compile.attach(pipe, **EAGER):
        draw_sd3(pipe, steps=3)
        refs = kept()
    assert refs and alive(refs) == 0


def test_release_in_the_middle_begins_anew():
    _, compiled = compiled_model()
    wanted = run(compiled, LATENT, TEXT)
    run(compiled, LATENT, TEXT, steps=3)
    ras_compile.release(compiled)
    assert torch.equal(run(compiled, LATENT, TEXT), wanted) and kinds(compiled) == "ddssss"


def test_release_leaves_other_models_alone():
    _, first = compiled_model()
    second = torch.compile(type(model())(width=24).eval(), backend="ras", options=EAGER)
    run(first, LATENT, TEXT)
    refs = kept()
    run(second, LATENT, TEXT)
    ras_compile.release(second)
    assert alive(refs) == len(refs) > 0
    with pytest.raises(TypeError, match="compiled transformer or a handle"):
        ras_compile.release(object())


def test_beyond_the_budget_the_least_recently_used_goes():
    _, compiled = compiled_model(cache_budget=0)
    run(compiled, LATENT, TEXT)
    small = kept()
    run(compiled, WIDE, TEXT)
    assert small and alive(small) == 0 and kept()


def test_within_the_budget_all_stay():
    _, compiled = compiled_model(cache_budget=2**30)
    run(compiled, LATENT, TEXT)
    small = kept()
    run(compiled, WIDE, TEXT)
    assert alive(small) == len(small) < len(kept())


def test_what_runs_is_never_taken():
    """Two resolutions in turns, one step of each, without a byte to spare."""
    _, compiled = compiled_model(cache_budget=0)
    wanted = [run(compiled, latent, TEXT) for latent in (LATENT, WIDE)]
    latents, steps = [LATENT, WIDE], 6
    turn, results = [threading.Semaphore(1), threading.Semaphore(0)], [None, None]

    def loop(who: int) -> None:
        latent = latents[who]
        with torch.no_grad():
            for step in range(steps):
                turn[who].acquire()
                time = torch.full((2,), 1 - step / steps)
                latent = latent - compiled(latent, time, TEXT) / steps
                turn[1 - who].release()
        results[who] = latent

    threads = [threading.Thread(target=loop, args=(who,)) for who in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found, right) for found, right in zip(results, wanted, strict=True))


def test_a_bad_budget():
    with pytest.raises(ras_compile.ConfigError, match="cache_budget"):
        ras_compile.RASConfig(cache_budget=-1)
