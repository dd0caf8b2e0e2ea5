"""Caches of one byte: a sparse step sees what a token's values are when rounded row by row, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract import Subject, active_mask, error, of_zoo
from torch import Tensor, fx

from ras_compile.passes.algebra.layout import atoms_of
from ras_compile.passes.lowering.narrow import LARGEST, rounded_rows
from ras_compile.plans.plan import Plan

TYPES = {"float8": torch.float8_e4m3fn, "int8": torch.int8}


def rounded(value: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Rows of entries along ``dim``, in so many steps of their largest one."""
    wide = value.float()
    scale = (wide.abs().amax(dim, keepdim=True) / LARGEST[dtype]).clamp(min=1e-12)
    steps = wide / scale if dtype.is_floating_point else (wide / scale).round()
    return (steps.to(dtype).float() * scale).to(value.dtype)


class Rounding(fx.Interpreter):
    """The dense graph in which values are mixed with others by rows, and rounded: what a sparse step has to see."""

    def __init__(self, subject: Subject, rows: Tensor, before: list[Tensor], dtype: torch.dtype) -> None:
        super().__init__(subject.plan.captured)
        plan, self.dtype = subject.plan, dtype
        self.dims = rounded_rows(plan.sparse, subject.frame)
        self.mixed = {
            splice.node: (index, active_mask(splice.layout, subject.frame, rows), before[index])
            for index, splice in enumerate(plan.sparse.splices)
        }

    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        if node in self.mixed:
            index, active, before = self.mixed[node]
            value = torch.where(active, value, before)
            value = rounded(value, self.dims[index], self.dtype) if index in self.dims else value
        return value


def kept(subject: Subject, **options: str) -> Subject:
    """The same model with other options of its caches."""
    plan = subject.plan
    return Subject(Plan(plan.captured, plan.inputs, subject.values, replace(plan.config, **options)), subject.values)


# keys and values of a joint sequence; channels of a convolution among the tokens
@pytest.mark.parametrize("name", ["SD3", "SanaTransformer2DModel"])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_sparse_step_sees_rounded_values(name: str, dtype: str):
    subject = of_zoo(name)
    narrow = kept(subject, cache_dtype=dtype)
    outputs, caches = narrow.dense(subject.values)
    assert error(outputs, subject.reference(subject.values)) < 1e-12  # what is computed densely is not rounded
    _, plain = subject.dense(subject.values)
    values, rows = subject.with_latent(subject.other_latent()), subject.rows(max(1, subject.frame.tokens // 4))
    oracle = Rounding(subject, rows, plain, TYPES[dtype])
    wanted = list(oracle.run(*subject.plan.tensors(values)))
    found, after = narrow.sparse(values, rows, caches)
    assert error(found, wanted) < 1e-6
    for index, dim in oracle.dims.items():  # rows hold no token, and what the model returns is not rounded
        splice = subject.plan.sparse.splices[index]
        assert not splice.is_output and not any(map(subject.frame.counts_tokens, atoms_of(splice.layout.dims[dim])))
    assert oracle.dims and all(after[index].dtype is TYPES[dtype] for index in oracle.dims)
    whole = [cache for index, cache in enumerate(after) if index not in oracle.dims]
    total = sum(cache.numel() * cache.element_size() for cache in after)
    assert total == narrow.plan.kept.branch_bytes == narrow.plan.cost.cache_bytes < subject.plan.kept.branch_bytes
    assert all(cache.dtype in (torch.float32, subject.latent.dtype) for cache in whole)  # scales, and what is returned


def test_error_of_a_row():
    """What the options' text says of rows whose entries are alike, and of those with one entry of 20 times their size."""
    alike = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    few = alike.clone()
    few[:, 0] = 20

    def gap(rows: Tensor, dtype: torch.dtype) -> float:
        other = rows[:, 1:]
        return float((rounded(rows, 1, dtype)[:, 1:] - other).norm() / other.norm())

    assert 0.02 < gap(alike, torch.float8_e4m3fn) < 0.03 and 0.02 < gap(few, torch.float8_e4m3fn) < 0.03
    assert 0.004 < gap(alike, torch.int8) < 0.008 and 0.03 < gap(few, torch.int8) < 0.06


def test_rows_of_zeros():
    """They stay zeros."""
    for dtype in TYPES.values():
        assert not rounded(torch.zeros(2, 8), 1, dtype).any()


@pytest.mark.parametrize("options", [{}, {"cache_dtype": "float8"}])
def test_host_memory_changes_nothing(options: dict):
    """Caches that wait in the host's memory are the same, bit by bit, and come back written."""
    subject = of_zoo("SD3")
    here, there = (kept(subject, **options, **more) for more in ({}, {"cache_device": "cpu"}))
    values, rows = subject.with_latent(subject.other_latent()), subject.rows(4)
    (wanted, before), (outputs, caches) = here.dense(subject.values), there.dense(subject.values)
    assert error(outputs, wanted) == 0
    (wanted, before), (outputs, caches) = here.sparse(values, rows, before), there.sparse(values, rows, caches)
    assert error(outputs, wanted) == 0
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(before, caches, strict=True))
    targets = [str(node.target) for node in there.program(4).graph.nodes if node.op == "call_function"]
    count = sum(not splice.is_output for splice in there.plan.sparse.splices)
    assert count == targets.count("ras_compile.from_host.default") == targets.count("ras_compile.write_host.default")
