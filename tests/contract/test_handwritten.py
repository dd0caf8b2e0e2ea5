"""The contract on models that nobody else's library has: each is held to the same properties and the same oracle."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from contract import Subject, by_model, error, subject
from handwritten import MODELS
from properties import (  # noqa: F401  (the properties, run here on these models)
    TIGHT,
    double,
    quarter,
    test_consistency,
    test_dense_program_is_the_model,
    test_frozen_context,
    test_identity,
    test_locality,
    test_outputs_alias_no_cache,
    test_semantics,
)
from zoo import redraw

from ras_compile import UnsupportedGraph
from ras_compile.passes.analysis.cost import cost

SUPPORTED = [name for name, case in MODELS.items() if case.refused is None]
REFUSED = [name for name, case in MODELS.items() if case.refused is not None]


@lru_cache(maxsize=2)
def made(name: str) -> Subject:
    case = MODELS[name]
    torch._dynamo.reset()
    torch.manual_seed(0)
    return subject(redraw(case.build()).eval().double(), case.inputs())


@pytest.fixture(params=by_model(SUPPORTED), scope="module")
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str, double: None) -> Subject:  # noqa: F811
    return made(name)


def test_a_sparse_step_is_cheaper(model: Subject, name: str):
    """The region is the one that the model has, and the contractions of a sparse step fall with the rows."""
    case = MODELS[name]
    assert model.frame.tokens == case.tokens
    price = cost(model.plan.analysis, model.plan.sparse)
    assert price.flop_ratio(quarter(model)) < case.ratio
    assert price.flop_ratio(1) <= price.flop_ratio(quarter(model)) < price.flop_ratio(model.frame.tokens) <= 1.01


def test_a_corrupted_splice_shows(model: Subject, name: str):
    """As in the contract; a splice that is there for want of a finer rule may be idle, never all of them."""
    _, caches = model.dense(model.values)
    values, rows = model.with_latent(model.other_latent()), model.rows(quarter(model))
    wanted = model.oracle(values, rows, caches)
    gaps = []
    for index, cache in enumerate(caches):
        corrupted = [*caches[:index], cache.roll(1, dims=-1) * 1.5, *caches[index + 1 :]]
        gaps.append(error(model.sparse(values, rows, corrupted)[0], wanted))
    assert sum(gap < 1e3 * TIGHT for gap in gaps) == MODELS[name].idle, gaps


@pytest.mark.parametrize("refused", by_model(REFUSED))
def test_what_is_refused_says_why(refused: str, double: None):  # noqa: F811
    with pytest.raises(UnsupportedGraph, match=MODELS[refused].refused):
        made(refused)


def test_the_example_runs(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import handwritten_dit

    torch._dynamo.reset()
    handwritten_dit.main()
    printed = capsys.readouterr().out
    assert "192 tokens, grid 12 x 16" in printed
    for step, kind in enumerate("dddsssdssssd"):
        calls = [line.split() for line in printed.splitlines() if line.startswith(f"step {step:2d} ")]
        assert [call[2] for call in calls] == ["cond", "uncond"]
        assert all(call[3].startswith(kind) for call in calls)
    assert 0 < float(printed.split()[-1]) < 0.05
