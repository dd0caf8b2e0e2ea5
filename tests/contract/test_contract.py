"""The contract, on every model of the zoo: each line is a property, in float64 at 1e-9 with the eager inner backend."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
from contract import Subject, by_model, error, of_zoo
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
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from zoo import NOT_RUN, ZOO

from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.analysis.emit import fake_mode

aten = torch.ops.aten
EXPERTS = (aten.index.Tensor, aten.scatter_add.default)  # they pick tokens, and work on each alone
SUPPORTED_CLASSES = 71


SUPPORTED = [name for name, case in ZOO.items() if case.refused is None]
REFUSED = [name for name, case in ZOO.items() if case.refused is not None]


@pytest.fixture(params=by_model(SUPPORTED), scope="module")
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> Subject:
    return of_zoo(name)


def test_the_latent_is_found(model: Subject, name: str):
    """The region is the picture, known without being named (but where two inputs are alike: see ``Case.latent``)."""
    assert model.plan.inputs[model.plan.latent].argument == ZOO[name].region


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


@lru_cache(maxsize=4)
def flops(program: fx.GraphModule) -> int:
    """Counted FLOPs of a program on fake tensors: products, convolutions and attention."""
    total = 0
    for node in program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        query, key, value = (operand.meta["val"].shape for operand in node.args[:3])
        total += 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    with FlopCounterMode(display=False) as counter, fake_mode(program.graph), torch.no_grad():
        for node in filter(may_count, program.graph.nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
            node.target(*args, **kwargs)
    return total + counter.get_total_flops()


def may_count(node: fx.Node) -> bool:
    """Whether a node is an op with FLOPs of its own, or one that PyTorch puts together from others."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    together = node.target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return together or node.target.overloadpacket in flop_registry


def test_sparse_steps_cost_less(model: Subject):
    """The sparse program's counted FLOPs fall with the active rows."""
    dense = flops(model.plan.captured)
    few, most = (flops(model.program(rows)) for rows in (quarter(model), model.frame.tokens - 1))
    assert few < most < dense


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
