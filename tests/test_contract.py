"""The contract, on every model of the zoo: each line is a property, in float64 at 1e-9 with the eager inner backend."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from contract import Subject, active_mask, by_model, error, of_zoo
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import NOT_RUN, ZOO

from ras_compile.branches import Slots
from ras_compile.passes.emit import fake_mode
from ras_compile.passes.errors import UnsupportedGraph

aten = torch.ops.aten
TIGHT = 1e-9
EXPERTS = (aten.index.Tensor, aten.scatter_add.default)  # they pick tokens, and work on each alone
SUPPORTED_CLASSES = 71


SUPPORTED = [name for name, case in ZOO.items() if case.refused is None]
REFUSED = [name for name, case in ZOO.items() if case.refused is not None]


@pytest.fixture(autouse=True, scope="module")
def double() -> Iterator[None]:
    """Numbers that become tensors do so in double precision."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


@pytest.fixture(params=by_model(SUPPORTED), scope="module")
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> Subject:
    return of_zoo(name)


def quarter(model: Subject) -> int:
    return max(1, model.frame.tokens // 4)


def test_the_latent_is_found(model: Subject, name: str):
    """The region is the picture, known without being named (but where two inputs are alike: see ``Case.latent``)."""
    assert model.plan.inputs[model.plan.latent].argument == ZOO[name].region


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


def test_a_corrupted_splice_shows(model: Subject):
    """4. The test above can fail: with any one cache corrupted, the outputs leave the oracle's."""
    _, caches = model.dense(model.values)
    values, rows = model.with_latent(model.other_latent()), model.rows(quarter(model))
    each_cache_matters(model, values, rows, caches, model.oracle(values, rows, caches))


def each_cache_matters(model: Subject, values: list, rows: Tensor, caches: list[Tensor], wanted: list[Tensor]) -> None:
    """With any one cache corrupted, the outputs leave the wanted ones."""
    for index, cache in enumerate(caches):
        corrupted = [*caches[:index], cache.roll(1, dims=-1) * 1.5, *caches[index + 1 :]]
        outputs, _ = model.sparse(values, rows, corrupted)
        if error(outputs, wanted) <= 1e3 * TIGHT:  # a product with zeros, such as the first state of a recurrence
            point = model.points[index]
            picked = all(user.target in EXPERTS for user in point.users)
            if picked and error(model.oracle(values, rows, corrupted), wanted) < TIGHT:
                continue
            assert model.matters(point, corrupted[index], values, model.reference(values)) < TIGHT, point


def test_outputs_alias_no_cache(model: Subject):
    """6. What is returned never aliases a cache."""
    slots = Slots()
    with torch.no_grad():
        dense = model.plan.dense(model.values, slots)
        sparse = model.plan.run_sparse(model.values, model.rows(quarter(model)), slots)
    held = {cache.untyped_storage().data_ptr() for cache in slots["caches"]}
    for output in [*dense, *sparse]:
        assert output.untyped_storage().data_ptr() not in held


def flops(program: fx.GraphModule) -> int:
    """Counted FLOPs of a program on fake tensors: products, convolutions and attention."""
    total = 0
    for node in program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        query, key, value = (operand.meta["val"].shape for operand in node.args[:3])
        total += 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    with FlopCounterMode(display=False) as counter, fake_mode(program.graph), torch.no_grad():
        program(*[node.meta["val"] for node in program.graph.find_nodes(op="placeholder")])
    return total + counter.get_total_flops()


def test_sparse_steps_cost_less(model: Subject):
    """The sparse program's counted FLOPs fall with the active rows."""
    dense = flops(model.plan.captured)
    few, most = (flops(model.program(rows)) for rows in (quarter(model), model.frame.tokens - 1))
    assert few < most < dense


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


def test_a_corrupted_frozen_cache_shows(model: Subject):
    frozen = model.frozen
    _, caches = frozen.dense(model.values)
    values, rows = model.with_latent(model.other_latent()), model.rows(quarter(model))
    each_cache_matters(frozen, values, rows, caches, frozen.oracle(values, rows, caches))


def test_a_frozen_context_costs_less(model: Subject):
    """Its tokens are not computed: no more FLOPs than with a fresh one, and fewer where the plan differs."""
    fresh, cheap = (flops(one.program(quarter(model))) for one in (model, model.frozen))
    assert cheap < fresh if model.frozen.plan.sparse.frozen else cheap <= fresh


@pytest.mark.parametrize("name", by_model(REFUSED))
def test_refusal(name: str):
    """6. What cannot be proved is refused with a sentence."""
    with pytest.raises(UnsupportedGraph, match=ZOO[name].refused):
        of_zoo(name)


def test_every_class_is_in_the_zoo():
    import diffusers.models.transformers as transformers

    exported = {
        key for key, kind in vars(transformers).items() if isinstance(kind, type) and issubclass(kind, nn.Module)
    }
    kinds = {case.kind for case in ZOO.values()}
    assert kinds.isdisjoint(NOT_RUN)
    assert exported == kinds | set(NOT_RUN)


def test_how_much_of_the_zoo_is_supported():
    assert len({ZOO[name].kind for name in SUPPORTED}) >= SUPPORTED_CLASSES
