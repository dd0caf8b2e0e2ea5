"""What goes wrong around a picture must not go wrong in it: each fault is put in on purpose (docs/reliability.md has the table)."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from recorded import Recorded
from tiny import EAGER, LATENT, TEXT, kinds, model, run
from torch import Tensor

import ras_compile
from ras_compile import notices
from ras_compile.config import RASConfig
from ras_compile.execute import cudagraphs, inner, memory, replay
from ras_compile.kernels import tiles
from ras_compile.plans import plan as plans
from ras_compile.plans.plan import Plan

pytestmark = pytest.mark.usefixtures("quick_collections")
NO_MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB."
RUN = "ddssss"


def compiled(plain=None, **options):
    return torch.compile(model() if plain is None else plain, backend="ras", options={**EAGER, **options})


def picture(drawn, text: Tensor = TEXT) -> Tensor:
    return run(drawn, LATENT, text)


def counted() -> dict[str, int]:
    return {fallback.what: fallback.count for fallback in notices.fallbacks()}


# Memory.


@pytest.mark.parametrize("step", [0, 1, 2, 4])
def test_no_memory_for_the_caches_of_a_step(monkeypatch, step):
    """That step runs dense, and so does the next, which makes the caches again; it is said once, and all is as before then."""
    plain = model()
    drawn = compiled(plain)
    wanted = picture(drawn)
    calls, real = [], Plan.run

    def full(self, *given):
        calls.append(given)
        if len(calls) == step + 1:
            raise torch.OutOfMemoryError(NO_MEMORY)
        return real(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "run", full)
        with pytest.warns(ras_compile.RASWarning, match="no memory left for the caches") as told:
            found = picture(drawn)
    assert len(told) == 1 and torch.isfinite(found).all()
    assert counted() == {"a step run dense and without caches, for which there was no memory": 1}
    record = ras_compile.trace(drawn)[step]
    assert (record.kind, record.reason) == ("dense", "there was no memory for the caches")
    assert kinds(drawn)[step + 1 : step + 2] == "d", "nothing was kept"
    assert torch.equal(picture(drawn), wanted) and kinds(drawn) == RUN


def test_never_any_memory_for_caches(monkeypatch):
    """Every step runs dense, and the picture is the model's own."""
    plain = model()
    drawn = compiled(plain)

    def full(self, *given):
        raise torch.OutOfMemoryError(NO_MEMORY)

    monkeypatch.setattr(Plan, "run", full)
    with pytest.warns(ras_compile.RASWarning, match="no memory left") as told:
        found = picture(drawn)
    assert len(told) == 1 and kinds(drawn) == "dddddd"
    torch.testing.assert_close(found, run(plain, LATENT, TEXT))


def test_no_memory_for_the_model_itself(monkeypatch):
    """Then the error is PyTorch's own, and the next picture is right."""
    drawn = compiled()
    wanted = picture(drawn)

    def full(self, *given):
        raise torch.OutOfMemoryError(NO_MEMORY)

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "run", full)
        patch.setattr(Plan, "bare", full)
        with pytest.raises(torch.OutOfMemoryError), pytest.warns(ras_compile.RASWarning):
            picture(drawn)
    assert torch.equal(picture(drawn), wanted) and kinds(drawn) == RUN


def test_what_nobody_needs_is_given_up_for_a_step_that_lacks_memory(monkeypatch):
    drawn, real = compiled(), Plan.run
    run(drawn, torch.randn(2, 4, 8, 16), TEXT)
    (keeper,) = [keeper for keeper in memory.listed(memory.keepers) if keeper.bytes][-1:]
    assert keeper.bytes

    def full(self, *given):
        monkeypatch.setattr(Plan, "run", real)
        raise torch.OutOfMemoryError(NO_MEMORY)

    monkeypatch.setattr(Plan, "run", full)
    with pytest.warns(ras_compile.RASWarning, match="no memory left"):
        picture(drawn)
    assert keeper.bytes == 0


def test_no_memory_for_a_graph(monkeypatch):
    """The program runs without one; on a CPU, with graphs that stand in for CUDA's."""
    for module in (cudagraphs, replay):
        monkeypatch.setattr(module, "DEVICE", "cpu")
        monkeypatch.setattr(module, "Graph", Recorded)
    plain = model()
    wanted = picture(compiled(plain, cuda_graphs=False))

    def full(*given):
        raise torch.OutOfMemoryError(NO_MEMORY)

    monkeypatch.setattr(cudagraphs, "Graph", full)
    drawn = compiled(plain, cuda_graphs=True)
    with pytest.warns(ras_compile.RASWarning, match="without a CUDA graph, capturing it failed: CUDA out of memory"):
        pictures = [picture(drawn) for _ in range(3)]
    assert all(torch.equal(found, wanted) for found in pictures) and kinds(drawn) == RUN
    assert "a program run without a CUDA graph" in counted()


# Compilers.


def test_an_inner_compiler_that_refuses_repeated_blocks(monkeypatch):
    """A step down: they are compiled one by one; the next step down is in `test_backend.py`."""
    plain, refused = model(), []
    wanted = picture(compiled(plain))

    def refuse(program, inputs, config):
        refused.append(program)
        raise NotImplementedError("no blocks today")

    monkeypatch.setattr(plans, "compile_inner", refuse)
    monkeypatch.setattr(plans, "compile_or_run", lambda make, inputs, config: make())
    drawn = compiled(plain, inner_backend="inductor")
    torch.testing.assert_close(picture(drawn), wanted)
    assert len(refused) == 2 and counted()["blocks compiled one by one"] == 2 and kinds(drawn) == RUN


@pytest.fixture
def breaking():
    """An inner backend whose programs raise what the list says: by the order in which they are made, at their calls in turn."""
    from torch._dynamo.backends import registry

    errors: list[list[Exception | None]] = []

    def compile(graph, inputs):
        mine = errors.pop(0) if errors else []

        def program(*given):
            error = mine.pop(0) if mine else None
            if error is not None:
                graph(*given)  # what it writes is written
                raise type(error)(*error.args)  # anew: the parameter would keep the frames, and with them the model
            return graph(*given)

        return program

    registry.register_backend(compile, name="breaking")
    yield errors
    registry._BACKENDS.pop("breaking", None)
    registry._COMPILER_FNS.pop("breaking", None)


@pytest.mark.parametrize("errors", [[[ValueError("no")]], [[], [ValueError("no")]], [[], [None, ValueError("no")]]])
def test_a_program_that_raises_while_it_runs(breaking, errors):
    """The dense one, or the sparse one at its first call or a later one: from then on it runs op by op, and that is said once."""
    plain = model()
    wanted = picture(compiled(plain))
    breaking.extend([list(calls) for calls in errors])
    drawn = compiled(plain, inner_backend="breaking")
    with pytest.warns(
        ras_compile.RASWarning, match=r"runs uncompiled.*'breaking' fails on it \(ValueError: no\)"
    ) as told:
        pictures = [picture(drawn) for _ in range(2)]
    assert len(told) == 1 and counted() == {"a program run op by op": 1}
    assert all(torch.equal(found, wanted) for found in pictures) and kinds(drawn) == RUN


def test_a_program_that_raises_while_it_runs_is_one_error_on_demand(breaking):
    breaking.append([ValueError("no")])
    with pytest.raises(ras_compile.UnsupportedGraph, match=r"'breaking' fails on it \(ValueError: no\)"):
        picture(compiled(inner_backend="breaking", unsupported="error"))


def test_a_program_that_raises_for_want_of_memory_is_no_defect(breaking):
    breaking.append([torch.OutOfMemoryError(NO_MEMORY)])
    with pytest.warns(ras_compile.RASWarning, match="no memory left for the caches"):
        picture(compiled(inner_backend="breaking"))
    assert "a program run op by op" not in counted()


def test_an_error_of_the_model_itself_is_raised_as_it_is():
    """What raises op by op, too, is no defect of the compiler: the next call is tried as before."""
    runs = []

    def broken(*given):
        runs.append(given)
        raise IndexError("index 9 is out of range" if len(runs) % 2 else "the same")

    program = inner.Program(broken, lambda: broken, RASConfig())
    for _ in range(2):
        with pytest.raises(IndexError, match="the same"):
            program(1)
    assert runs == [(1,)] * 4 and not counted()


# Numbers.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("metric", ["std", "drift"])
def test_noise_that_is_no_number(value, metric):
    """It stays in the picture that it came into."""
    drawn = compiled(metric=metric)
    wanted = picture(drawn)
    broken = TEXT.clone()
    broken[0, 0, 0] = value
    assert not torch.isfinite(picture(drawn, broken)).all()
    assert torch.equal(picture(drawn), wanted) and kinds(drawn) == RUN


# Exceptions.


class Stop:
    """Raises at the n-th call of a function of the library, from now on; counts them."""

    FOLDER = os.path.join(os.path.dirname(ras_compile.__file__), "")

    def __init__(self, error: type[BaseException], at: int | None) -> None:
        self.error, self.at, self.calls = error, at, 0

    def __call__(self, frame, event, given) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(Stop.FOLDER):
            self.calls += 1
            if self.calls == self.at:
                raise self.error("stopped here")

    def __enter__(self) -> Stop:
        sys.setprofile(self)
        return self

    def __exit__(self, *given) -> None:
        sys.setprofile(None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_an_exception_at_any_point_of_a_step(error, step):
    """At each call of a function of ours, in a dense step, the first sparse one and another: the next picture is right."""
    drawn = compiled()
    wanted = picture(drawn)
    picture(drawn)

    def broken(at: int | None) -> int:
        latent = LATENT
        with torch.no_grad():
            for number in range(step + 1):
                time = torch.full((1,), 1 - number / 6).expand(2)  # as `run` gives it
                if number < step:
                    latent = latent - drawn(latent, time, TEXT) / 6
        with torch.no_grad(), Stop(error, at) as stop:
            drawn(latent, time, TEXT)
        return stop.calls

    points, raised = broken(None), 0
    assert points > 30
    for at in range(1 + step, points + 1, 3):
        try:
            broken(at)
        except error:  # Python passes over one in a generator that goes
            raised += 1
        assert torch.equal(picture(drawn), wanted), f"after an exception at the {at}th call of {points}"
        # the first call may be the very call that the stopped picture began with, and is told with it
        assert kinds(drawn)[-len(RUN) :] == RUN
    assert raised > 10


# Files.

KILLED = """
import os, sys
from ras_compile.kernels.tiles import Timings
mine = Timings("cpu")
mine.learn({"before": [1.0]})
os.replace = lambda *given: os._exit(9)
mine.learn({"lost": [2.0]})
"""


def test_a_process_that_is_killed_while_it_writes(tmp_path, monkeypatch):
    """What was written before stays, and others go on."""
    monkeypatch.setenv("RAS_COMPILE_CACHE_DIR", str(tmp_path))
    assert subprocess.run([sys.executable, "-P", "-c", KILLED]).returncode == 9
    here = tiles.Timings("cpu")
    assert here.known == {"before": [1.0]}
    here.learn({"after": [3.0]})
    assert tiles.Timings("cpu").known == {"before": [1.0], "after": [3.0]}


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    """Nothing is left of the file that could not be written, and what was known stays known."""
    monkeypatch.setenv("RAS_COMPILE_CACHE_DIR", str(tmp_path))
    here = tiles.Timings("cpu")
    here.learn({"before": [1.0]})

    def full(handle, *given):
        os.close(handle)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tiles.os, "fdopen", full)
        here.learn({"more": [2.0]})
    assert here.known == {"before": [1.0], "more": [2.0]} and tiles.Timings("cpu").known == {"before": [1.0]}
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".lock"]
    assert counted() == {"timings of kernels kept by this process alone": 1}


# Threads, tasks, copies.


@pytest.mark.parametrize("round", range(3))
def test_first_pictures_of_four_threads_are_those_of_one(round):
    torch.manual_seed(0)
    plain = model()
    wanted = picture(compiled(plain))
    torch._dynamo.reset()
    drawn, gate, found, errors = compiled(plain), threading.Barrier(4), [], []

    def work() -> None:
        gate.wait()
        try:
            found.append(picture(drawn))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(found) == 4
    assert all(torch.equal(one, wanted) for one in found), "a thread's second call was of another graph than its first"


def test_pictures_of_asyncio_tasks_are_those_drawn_alone():
    """Two tasks take turns at every step, on one model."""
    drawn = compiled()
    texts = [TEXT, TEXT + 1]
    wanted = [picture(drawn, text) for text in texts]
    kinds_seen = []

    async def draw(text: Tensor) -> Tensor:
        latent = LATENT
        with ras_compile.generation(num_steps=6) as gen:
            for step in range(6):
                with torch.no_grad():
                    gen.step()
                    latent = latent - drawn(latent, torch.full((2,), 1 - step / 6), text) / 6
                await asyncio.sleep(0)
            kinds_seen.append(kinds(drawn))
        return latent

    async def both() -> list[Tensor]:
        return await asyncio.gather(*map(draw, texts))

    found = asyncio.run(both())
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert kinds_seen == [RUN, RUN]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda plain: pickle.loads(pickle.dumps(plain))], ids=["deep", "pickle"]
)
def test_a_copy_in_the_middle_of_a_picture(copied):
    """The picture goes on as if there were none, and the copy draws its own from the start."""
    plain = model()
    plain.compile(backend="ras", options=EAGER)
    wanted = picture(plain)
    latent, twins = LATENT, []
    with torch.no_grad():
        for step in range(6):
            latent = latent - plain(latent, torch.full((2,), 1 - step / 6), TEXT) / 6
            if step == 3:
                twins.append(copied(plain))
    assert torch.equal(latent, wanted) and kinds(plain) == RUN
    (twin,) = twins
    twin.compile(backend="ras", options=EAGER)
    assert torch.equal(picture(twin), wanted) and kinds(twin) == RUN


# Many pictures.


def living() -> tuple[int, int]:
    """Tensors and objects that are alive."""
    gc.collect()
    objects = gc.get_objects()
    return sum(isinstance(found, Tensor) for found in objects if type(found).__module__ == "torch"), len(objects)


def test_two_hundred_pictures_without_growth():
    drawn = compiled()
    for _ in range(5):
        picture(drawn)
    tensors, objects = living()
    for _ in range(200):
        picture(drawn)
    after_tensors, after_objects = living()
    assert after_tensors <= tensors and after_objects - objects < 200, (
        after_tensors - tensors,
        after_objects - objects,
    )


def test_a_hundred_sizes_under_a_budget():
    """The caches of all sizes together never pass the budget by more than those of the picture that is being drawn."""

    class Owner:
        graph_slots = 0

        def release_graphs(self) -> None:
            pass

    class Slots(dict):
        pass

    from ras_compile.execute.homes import Home

    budget, home = 1000, Home()
    owners, kept = [], []
    for size in range(1, 101):
        owner, slots, key = Owner(), Slots(caches=[size]), Owner()
        keeper = memory.Keeper(owner, size, budget)
        home.spare[key] = {"graph": [slots]}  # a finished generation has left it
        keeper.use(slots)
        owners.append((owner, key))
        kept.append(keeper)
        assert sum(keeper.bytes for keeper in kept) <= budget + size
    alive = [keeper.branch_bytes for keeper in kept if keeper.bytes]
    assert alive == [*range(alive[0], 101)], "those used last stay"
    assert sum(alive) <= budget


def test_some_sizes_under_a_budget():
    """The same with pictures; and the first size is right again when it comes back."""
    drawn = compiled(cache_budget=60_000)
    wanted = picture(drawn)
    for width in range(8, 24, 2):
        run(drawn, torch.randn(2, 4, 8, width), TEXT)
        keepers = [keeper for keeper in memory.listed(memory.keepers) if keeper.bytes]
        largest = max(keeper.bytes for keeper in keepers)
        assert sum(keeper.bytes for keeper in keepers) <= 60_000 + largest
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(picture(drawn), wanted) and kinds(drawn) == RUN
