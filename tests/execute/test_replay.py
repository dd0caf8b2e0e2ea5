"""A replayed function is the function; here on the CPU with a stand-in for the graph (on a GPU: test_runtime_cuda.py)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from recorded import Recorded

import ras_compile
from ras_compile import RASConfig
from ras_compile.execute import replay
from ras_compile.execute.replay import Replayed
from ras_compile.passes.algebra.tokens import TokenView
from ras_compile.sampling.reuse import continued
from ras_compile.sampling.rows import RowChooser, Selection
from ras_compile.sampling.selection import SelectionInfo, choose, settle
from ras_compile.sampling.velocity import predicted, velocity

pytestmark = pytest.mark.filterwarnings("error::ras_compile.notices.RASWarning")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(replay, "DEVICE", "cpu")
    monkeypatch.setattr(replay, "Graph", Recorded)


def test_it_is_recorded_once_for_each_shape_and_setting():
    def scaled(a, b, factor):
        return a * factor + b, a

    function = Replayed(scaled)
    results = []
    for step in range(4):
        for size in (3, 0, 5):
            for factor in (2.0, 3.0):
                a, b = torch.full((size,), float(step)), torch.ones(size)
                found, copy = function([a.t(), b], factor)
                assert torch.equal(found, a * factor + 1) and torch.equal(copy, a)
                results.append((found, a * factor + 1))
    assert all(torch.equal(found, wanted) for found, wanted in results), "a later call wrote into an earlier result"


def test_a_function_that_cannot_be_captured_runs_with_one_warning(monkeypatch):
    def refuse(*args):
        raise RuntimeError("no capture today")

    monkeypatch.setattr(replay, "Graph", refuse)
    function = Replayed(lambda a: (a + 1,))
    assert function([torch.zeros(2)])[0].tolist() == [1, 1]
    with pytest.warns(ras_compile.RASWarning, match="no capture today"):
        assert function([torch.ones(2)])[0].tolist() == [2, 2]
    assert function([torch.ones(2)])[0].tolist() == [2, 2]


def test_what_is_kept_is_copied_where_it_is_another_object():
    function = Replayed(lambda a, b, factor: (a * factor + b,))
    first, second = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0])
    for kept in (first, first, first, second, second, first):
        for value in (0.0, 3.0):
            (found,) = function([torch.full((2,), value)], 2.0, kept=(kept,))
            assert torch.equal(found, 2 * value + kept)


@pytest.mark.compiles
def test_a_function_is_fused_once_for_all_threads_and_any_strides(monkeypatch):
    compiled, inner = [], replay.compile_inner
    monkeypatch.setattr(replay, "compile_inner", lambda *given: compiled.append(given) or inner(*given))

    def plain(a, b):
        return a.sin() + b.cumsum(0), a.amax(0)

    function = Replayed(plain)

    def calls():
        for _ in range(3):
            a, b = torch.randn(6, 4), torch.randn(4, 6)
            for given in ([a, b.t()], [a.flip(0), b.t().contiguous()], [a.t().contiguous().t(), b.t()]):
                for found, wanted in zip(function(given, fuse=True), plain(*given), strict=True):
                    torch.testing.assert_close(found, wanted)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(calls), pool.submit(calls)]:
            done.result()
    assert len(compiled) == 1


@pytest.mark.compiles
def test_one_tensor_in_two_places_is_two_inputs():
    """What is compiled at a call that happens to be given the same tensor twice is right for those that follow."""
    function = Replayed(lambda a, b: (a - b,))
    first, second = torch.randn(4), torch.randn(4)
    for given in ([first, first], [first, second], [second, first]):
        assert torch.equal(function(given, fuse=True)[0], given[0] - given[1])


def test_a_function_that_cannot_be_fused_runs_as_it_is(monkeypatch):
    def refuse(*given):
        raise RuntimeError("no compiler today")

    monkeypatch.setattr(replay, "compile_inner", refuse)
    function = Replayed(lambda a: (a + 1,))
    assert [function([torch.full((2,), float(step))], fuse=True)[0].tolist() for step in range(3)] == [
        [1, 1],
        [2, 2],
        [3, 3],
    ]


@pytest.mark.compiles
@pytest.mark.parametrize(
    "options", [{}, {"metric": "drift"}, {"focus": 0.4}, {"focus": "high", "metric": "l2norm"}], ids=str
)
@pytest.mark.parametrize("known", [False, True])
def test_rows_are_those_of_the_plain_selection(known: bool, options: dict, monkeypatch):
    """Fused by Inductor and replayed, the choice is that of the functions as they are written: ties included."""
    compiled, inner = [], replay.compile_inner
    selection = Selection({each: Replayed(each) for each in (choose, settle, continued, velocity, predicted)})
    monkeypatch.setattr(replay, "compile_inner", lambda *given: compiled.append(given) or inner(*given))
    chosen, view = [], TokenView((), frozenset({1}), (2, 24, 4), (0, 1, 2), (2, 24, 1), None)
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[:, :6] = True
    for cuda_graphs in (True, False):
        torch.manual_seed(0)
        chooser, picks = RowChooser(RASConfig(cuda_graphs=cuda_graphs, **options), selection), []
        for step in range(8):
            chooser.advance(dense=False)
            latent = torch.randn(1, 4, 4, 6).repeat(2, 1, 1, 1)
            info = SelectionInfo(step, None, (4, 6))
            if step:
                picks.append(chooser.rows(latent, 2, 24, 7, info, lambda: mask if known else None))
            for branch in range(2):
                behind = 3 + branch + step  # tokens of prompts of several lengths
                noise = torch.randint(0, 2, (2, behind + 24, 4)).float()
                chooser.observe(noise, info, replace(view, cuts=((1, behind, 24),)))
        chosen.append(picks)
    assert all(torch.equal(a, b) for a, b in zip(*chosen, strict=True))
    assert len(compiled) == 1
    if known:
        assert all(pick.min() >= 6 for pick in chosen[0])
