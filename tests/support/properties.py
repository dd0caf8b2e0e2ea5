"""The properties of the contract, as tests of whatever model the importing file gives them: in float64 at 1e-9."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from contract import Subject, active_mask, error

from ras_compile.sampling.branches import Slots

TIGHT = 1e-9


@pytest.fixture(autouse=True, scope="module")
def double() -> Iterator[None]:
    """Numbers that become tensors do so in double precision."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def quarter(model: Subject) -> int:
    return max(1, model.frame.tokens // 4)


def test_identity(model: Subject):
    """1. With every row active the sparse program gives the dense model's output, on inputs it has never seen."""
    _, caches = model.dense(model.values)
    values = model.with_latent(model.other_latent())
    rows = torch.arange(model.frame.tokens).repeat(model.frame.samples, 1)
    outputs, _ = model.sparse(values, rows, caches)
    assert error(outputs, model.reference(values)) < TIGHT


def test_dense_program_is_the_model(model: Subject):
    outputs, _ = model.dense(model.values)
    assert error(outputs, model.reference(model.values)) < TIGHT


@pytest.mark.parametrize("seed", [0, 1])
def test_consistency(model: Subject, seed: int):
    """2. On the inputs of the dense step before, a sparse step returns the dense output, whatever rows are active."""
    dense, caches = model.dense(model.values)
    for active in (1, quarter(model), model.frame.tokens - 1):
        outputs, after = model.sparse(model.values, model.rows(active, seed), caches)
        assert error(outputs, dense) < TIGHT
        assert error(after, caches) < TIGHT


def test_locality(model: Subject):
    """3. Inactive rows return the cached noise; only active patches of the latent are read."""
    dense, caches = model.dense(model.values)
    rows = model.rows(quarter(model))
    latent = model.other_latent()
    outputs, _ = model.sparse(model.with_latent(latent), rows, caches)
    analysis = model.plan.analysis
    read = active_mask(analysis.frame.layout(), model.frame, rows)
    assert 0 < read.float().mean() < 1
    for index in analysis.outputs:
        mask = active_mask(analysis.layouts[analysis.output_nodes[index]], model.frame, rows)
        assert torch.equal(outputs[index][~mask], dense[index][~mask])
        tokens = active_mask(analysis.layouts[analysis.output_nodes[index]], model.frame, rows, context=False)
        assert (outputs[index] != dense[index])[tokens].float().mean() > 0.9
    elsewhere, _ = model.sparse(model.with_latent(torch.where(read, latent, latent + 1)), rows, caches)
    here, _ = model.sparse(model.with_latent(torch.where(read, latent + 1, latent)), rows, caches)
    for index in analysis.outputs:
        assert torch.equal(elsewhere[index], outputs[index])
        assert not torch.equal(here[index], outputs[index])


def test_semantics(model: Subject):
    """4. Two sparse steps in a row equal the oracle: the dense graph with inactive rows from the caches."""
    _, caches = model.dense(model.values)
    for step in (1, 2):
        values = model.with_latent(model.other_latent(seed=step))
        rows = model.rows(quarter(model), seed=step)
        outputs, after = model.sparse(values, rows, caches)
        assert error(outputs, model.oracle(values, rows, caches)) < TIGHT
        caches = after


def test_outputs_alias_no_cache(model: Subject):
    """6. What is returned never aliases a cache."""
    slots = Slots()
    with torch.no_grad():
        dense = model.plan.dense(model.values, slots)
        sparse = model.plan.run_sparse(model.values, model.rows(quarter(model)), slots)
    held = {cache.untyped_storage().data_ptr() for cache in slots["caches"]}
    for output in [*dense, *sparse]:
        assert output.untyped_storage().data_ptr() not in held


def test_frozen_context(model: Subject):
    """With a frozen context 2, 3 and 4 hold as well; the oracle takes the context from the caches, too."""
    frozen = model.frozen
    dense, caches = frozen.dense(model.values)
    rows = model.rows(quarter(model), seed=0)
    same, after = frozen.sparse(model.values, rows, caches)
    assert error(same, dense) < TIGHT
    assert error(after, caches) < TIGHT
    for step in (1, 2):
        values = model.with_latent(model.other_latent(seed=step))
        rows = model.rows(quarter(model), seed=step)
        outputs, after = frozen.sparse(values, rows, caches)
        wanted = frozen.oracle(values, rows, caches)
        assert error(outputs, wanted) < TIGHT
        for index in model.plan.analysis.outputs:
            node = model.plan.analysis.output_nodes[index]
            mask = active_mask(model.plan.analysis.layouts[node], model.frame, rows, context=False)
            old = caches[frozen.plan.sparse.splice(node)]
            assert torch.equal(outputs[index][~mask], old[~mask])
        caches = after
