"""A replayed function is the function; here on the CPU with a stand-in for the graph (on a GPU: test_runtime_cuda.py)."""

from __future__ import annotations

import pytest
import torch
from test_cudagraphs import Recorded

import ras_compile
from ras_compile import RASConfig, replay, rows
from ras_compile.replay import Replayed
from ras_compile.rows import RowChooser
from ras_compile.selection import SelectionInfo

pytestmark = pytest.mark.filterwarnings("error::ras_compile.notices.RASWarning")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(replay, "DEVICE", "cpu")
    monkeypatch.setattr(replay, "Graph", Recorded)
    ras_compile.notices._said.clear()


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


@pytest.mark.parametrize("known", [False, True])
def test_rows_are_those_of_the_plain_selection(known: bool, monkeypatch):
    monkeypatch.setattr(rows, "_choose", Replayed(rows.choose))
    chosen = []
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[:, :6] = True
    for cuda_graphs in (True, False):
        torch.manual_seed(0)
        chooser, picks = RowChooser(RASConfig(cuda_graphs=cuda_graphs)), []
        for step in range(8):
            chooser.advance(dense=False)
            latent = torch.randn(2, 4, 4, 6)
            if step:
                info = SelectionInfo(step, None, (4, 6))
                picks.append(chooser.rows(latent, 2, 24, 7, info, lambda: mask if known else None))
            chooser.observe(torch.randn(2, 24, 1, 4), SelectionInfo(step, None, (4, 6)))
        chosen.append(picks)
    assert all(torch.equal(a, b) for a, b in zip(*chosen, strict=True))
    if known:
        assert all(pick.min() >= 6 for pick in chosen[0])
