"""`cache_reuse="forecast"`: what the sparse programs find in their caches, against lines that are drawn by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from recorded import Recorded
from tiny import EAGER, LATENT, TEXT, kinds, model
from torch import Tensor

import ras_compile
from ras_compile.execute import cudagraphs, memory
from ras_compile.execute.slopes import GAIN, SLOPES, Slopes, disjoint
from ras_compile.plans.plan import Plan

CLOSE = dict(atol=1e-9, rtol=0)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


class Watched:
    """Writes down, call by call: the branch, the caches before and after, and which of them are those of what is returned."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list[tuple[int, list[Tensor] | None, list[Tensor]]] = []
        self.returned: set[int] = set()
        real = Plan.run, Plan.dense, Plan.run_sparse
        given: list[list[Tensor] | None] = []

        def run(plan, active, values, state, *more):
            given.append([cache.clone() for cache in state[1:]] if state else None)
            return real[0](plan, active, values, state, *more)

        def note(plan, slots):
            self.plan = plan
            self.returned = {index for index, splice in enumerate(plan.sparse.splices) if splice.is_output}
            self.calls.append((id(slots), given[-1], [cache.clone() for cache in slots["caches"]]))

        def dense(plan, values, slots, spare=None):
            results = real[1](plan, values, slots, spare)
            note(plan, slots)
            return results

        def sparse(plan, values, rows, slots):
            results = real[2](plan, values, rows, slots)
            note(plan, slots)
            return results

        monkeypatch.setattr(Plan, "run", run)
        monkeypatch.setattr(Plan, "dense", dense)
        monkeypatch.setattr(Plan, "run_sparse", sparse)

    def of(self, branch: int) -> list[tuple[list[Tensor] | None, list[Tensor]]]:
        """The calls of a branch, by order of appearance."""
        names = list(dict.fromkeys(name for name, _, _ in self.calls))
        return [(before, after) for name, before, after in self.calls if name == names[branch]]


def drawn(compiled, steps=10, texts=(TEXT,), moving=True) -> None:
    """A loop over latents that lie on no line; where they do not move, those of sparse steps do."""
    latents = torch.randn(steps, *LATENT.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad(), ras_compile.generation(num_steps=steps) as gen:
        for step in range(steps):
            gen.step()
            still = not moving and step < 3
            for text in texts:
                compiled(
                    latents[0 if still else step].to(text),
                    torch.full((2,), 0.5 if still else 1 - step / steps).to(text),
                    text,
                )


OPTIONS = {**EAGER, "sample_ratio": 0.25, "reset_steps": (3, 6, 9), "cache_reuse": "forecast"}


def made(**options):
    return torch.compile(model().double(), backend="ras", options={**OPTIONS, **options})


@pytest.mark.parametrize(
    ("warmup", "resets", "wanted", "cuda_graphs"),
    [(1, (3, 6, 9), "dssdssdssd", False), (3, (5, 8), "dddssdssds", True)],
)
def test_caches_go_on_along_the_line_of_the_last_two_dense_steps(warmup, resets, wanted, cuda_graphs, monkeypatch):
    """For each of two branches, in two generations one after the other; where nothing changes, they keep every bit."""
    monkeypatch.setattr(cudagraphs, "DEVICE", "cpu")
    monkeypatch.setattr(cudagraphs, "Graph", Recorded)
    compiled = made(warmup_steps=warmup, reset_steps=resets, cuda_graphs=cuda_graphs)
    texts, watched = (TEXT.double(), TEXT.double().flip(0)), Watched(monkeypatch)
    for _ in range(2):
        watched.calls.clear()
        drawn(compiled, texts=texts)
        assert kinds(compiled)[::2] == wanted
        for branch in range(2):
            calls = watched.of(branch)
            assert len(calls) == 10 and watched.returned == {4}
            for place in range(4):
                line_of(wanted, [(None if before is None else before[place], after[place]) for before, after in calls])
            for (before, _), (_, last) in zip(calls[1:], calls, strict=False):
                assert before is None or torch.equal(before[4], last[4]), "what is returned stays"
    keeper, told = watched.plan.kept, watched.plan.cost.cache_bytes
    assert 2 * keeper.branch_bytes < 2 * told == keeper.bytes, "slopes count where caches do"
    watched.calls.clear()
    drawn(compiled, texts=texts, moving=False)
    (_, left), (before, _) = watched.of(1)[2:4]
    assert (before is None) == (warmup == 1)
    for found, cache in zip(before or left, left, strict=True):
        assert torch.equal(found.view(torch.int64), cache.view(torch.int64))
    ras_compile.release(compiled)
    assert keeper.bytes == 0


def line_of(wanted: str, calls: list[tuple[Tensor | None, Tensor]]) -> None:
    """Looks at one cache over a generation."""
    slope, dense, ahead, moved = None, 0, 0.0, 0
    left, computed = calls[0][1], torch.zeros_like(calls[0][1], dtype=torch.bool)
    for step, kind in enumerate(wanted):
        before, after = calls[step]
        last = calls[step - 1][1]
        if kind == "d":
            if step:
                base = last if slope is None else last - ahead * slope
                assert not computed.all()
                torch.testing.assert_close(base[~computed], left[~computed], **CLOSE)
                slope = (after - base) / (step - dense)
            dense, left, computed, ahead = step, after, torch.zeros_like(computed), 0.0
        elif slope is None:
            assert torch.equal(before, last), "there is no line yet"
        else:
            torch.testing.assert_close(before, last + GAIN * slope, **CLOSE)
            assert not torch.equal(before, last)
            ahead, moved = ahead + GAIN, moved + 1
        if kind == "s":
            computed |= before != after
    assert moved >= 4


def test_held_caches_are_those_that_were_left(monkeypatch):
    compiled, watched = made(cache_reuse="hold", warmup_steps=1), Watched(monkeypatch)
    drawn(compiled, texts=(TEXT.double(),))
    calls = watched.of(0)
    pairs = [(before, last) for (before, _), (_, last) in zip(calls[1:], calls, strict=False) if before is not None]
    assert len(pairs) == 6 and all(torch.equal(*pair) for both in pairs for pair in zip(*both, strict=True))
    assert not any(SLOPES in slots for keeper in memory.keepers for slots in keeper.held)


def test_no_line_leads_over_a_change_of_the_weights(monkeypatch):
    plain = model().double()
    compiled, watched = (
        torch.compile(plain, backend="ras", options={**OPTIONS, "reset_steps": ()}),
        Watched(monkeypatch),
    )
    with torch.no_grad(), ras_compile.generation(num_steps=6) as gen:
        for step in range(6):
            gen.step()
            if step == 3:
                plain.qkv[0].weight.mul_(1.5)
            compiled((1 + step) * LATENT.double(), torch.full((2,), 1 - step / 6).double(), TEXT.double())
    assert kinds(compiled) == "ddsdss"
    calls = watched.of(0)
    assert not torch.equal(calls[2][0][0], calls[1][1][0])
    for step in (4, 5):
        assert all(map(torch.equal, calls[step][0], calls[step - 1][1]))


def slopes(*dense: tuple[int, list[Tensor]], returned=()) -> Slopes:
    """What dense calls at some steps have told."""
    made, last = Slopes(), None
    for step, caches in dense:
        made.step = step
        made.remember(last, returned)
        made.compare(caches)
        last = caches
    return made


def moved(told: Slopes, step: int, *caches: Tensor) -> list[Tensor]:
    told.step = step
    told.go_on(caches)
    return list(caches)


def test_a_line_has_the_length_of_its_steps():
    told = slopes((2, [torch.tensor([1.0])]), (6, [torch.tensor([5.0])]))
    (cache,) = moved(told, 7, torch.tensor([5.0]))
    assert cache.item() == 5.75
    moved(told, 7, cache)
    assert cache.item() == 5.75, "a second call in a step"
    moved(told, 9, cache)
    assert cache.item() == 7.25


def test_two_dense_calls_in_a_step_are_one_point():
    one, two, three = (torch.tensor([value]) for value in (1.0, 2.0, 8.0))
    told = slopes((0, [one]), (1, [two]), (1, [three]))
    assert moved(told, 2, three.clone())[0].item() == 8.75
    assert not slopes((1, [one]), (1, [two])).bytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_slope_of_zero_changes_no_bit(dtype):
    cache = torch.tensor([-0.0, 0.0, 1.0, -3.0], dtype=dtype)
    told = slopes((0, [cache]), (1, [cache.clone()]))
    (found,) = moved(told, 2, cache.clone())
    assert torch.equal(found.view(torch.uint8), cache.view(torch.uint8))


def test_no_memory_goes_on_twice():
    whole, number, noise = torch.zeros(4, 6), torch.zeros(2, dtype=torch.int64), torch.zeros(3)
    narrow = torch.zeros(2).to(torch.float8_e4m3fn)

    def caches():
        base = whole.clone()
        held = noise.clone()
        return base, [base[:, :3], base[:, 3:], base.t(), base[:, 2:4], number.clone(), held, held[1:], narrow]

    first, second = caches(), caches()
    second[0].add_(1)
    second[1][5].add_(1)
    told = slopes((0, first[1]), (1, second[1]), returned=[5])
    moved(told, 2, *second[1])
    assert torch.equal(second[0], torch.full((4, 6), 1.75)) and torch.equal(second[1][5], torch.ones(3))
    assert told.bytes == whole.nbytes


def test_parts_of_one_memory_are_disjoint_where_they_share_no_entry():
    """Beside a count of the entries; in doubt they are not, which must be rare."""
    drawn, sure = torch.Generator().manual_seed(0), [0, 0]

    def some(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=drawn))

    for _ in range(400):
        base = torch.arange(48).view([(48,), (4, 12), (2, 3, 8), (2, 2, 3, 4)][some(0, 4)])
        parts = []
        for _ in range(2):
            part = base
            for dim in range(part.dim()):
                start = some(0, part.shape[dim])
                part = part.narrow(dim, start, some(1, part.shape[dim] - start + 1))
            parts.append(part.transpose(0, -1) if some(0, 2) else part)
        shared = bool(torch.isin(*[part.flatten() for part in parts]).any())
        found = disjoint(*parts)
        assert not (found and shared)
        sure[0] += not shared
        sure[1] += found
    assert sure[0] > 50 and sure[1] > 0.8 * sure[0]


@pytest.mark.parametrize("dim", [-1, 2, 3])
def test_keys_and_values_of_one_product_are_disjoint(dim):
    width = {-1: (2, 5, 2, 4, 3), 2: (2, 5, 3, 2, 4), 3: (2, 5, 2, 3, 4)}[dim]
    parts = torch.empty(width).unbind(dim)
    for one, other in itertools.permutations(parts, 2):
        assert disjoint(one.transpose(1, 2), other) and not disjoint(one, one.transpose(1, 2))
