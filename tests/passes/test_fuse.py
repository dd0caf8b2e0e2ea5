"""The scatter-GEMM peephole: it fires where a linear only feeds a splice, changes no number, and leaves the rest alone."""

from __future__ import annotations

import pytest
import torch
from contract import error, subject
from torch import nn

from ras_compile.passes.fuse import fuse_scatter_linear
from ras_compile.passes.program import sparse_program

SCATTER = torch.ops.ras_compile.scatter_linear.default
PUT = torch.ops.aten.index_put_.default


class Attention(nn.Module):
    """`[B, N, C] -> [B, N, C]`: one attention layer; ``key_norm`` puts a norm between the linear and the splice."""

    def __init__(self, key_norm: bool = False, twice: bool = False, text: int = 0) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 6)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(4) if key_norm else nn.Identity()
        self.twice, self.text = twice, nn.Parameter(torch.randn(1, text, 16)) if text else None

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.q(x), self.k(x), self.v(x)
        out = v if self.twice else 0
        heads = [t.unflatten(2, (4, 4)).transpose(1, 2) for t in (q, k, v)]
        heads[1] = self.norm(heads[1])
        if self.text is not None:
            text = self.v(self.text).unflatten(2, (4, 4)).transpose(1, 2).expand(len(x), -1, -1, -1)
            heads[1:] = [torch.cat([text, heads[1]], 2), torch.cat([text, heads[2]], 2)]
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        return self.head(mixed.transpose(1, 2).flatten(2) + out)


def counts(model: nn.Module, batch: int, dtypes=(torch.float64,)) -> tuple[int, int, float]:
    """``(scatter-GEMMs, splices left, error against the unfused program)``."""
    torch.manual_seed(0)
    case = subject(model.double().eval(), {"x": torch.randn(batch, 12, 6, dtype=torch.float64)})
    rows = case.rows(5)
    tensors = [value for value in case.with_latent(case.other_latent()) if isinstance(value, torch.Tensor)]
    _, caches = case.dense(case.values)
    plain = sparse_program(case.plan.analysis, 5, case.plan.sparse)
    fused = sparse_program(case.plan.analysis, 5, case.plan.sparse)
    fuse_scatter_linear(fused.graph, dtypes)
    fused.recompile()
    results = []
    for program in (plain, fused):
        own = [cache.clone() for cache in caches]
        with torch.no_grad():
            program(*tensors, rows, *own)
        results.append(own)
    targets = [node.target for node in fused.graph.nodes]
    return targets.count(SCATTER), targets.count(PUT), error(*results)


@pytest.mark.parametrize("batch", [1, 3])
def test_fires_on_keys_values_and_noise(batch):
    assert counts(Attention(), batch)[:2] == (3, 0)
    assert counts(Attention(), batch)[2] < 1e-12


@pytest.mark.parametrize("batch", [1, 2])
def test_fires_inside_a_joint_cache(batch):
    fused, left, gap = counts(Attention(text=3), batch)
    assert (fused, left) == (3, 0)
    assert gap < 1e-12


def test_leaves_a_norm_behind_the_linear_alone():
    assert counts(Attention(key_norm=True), 2)[:2] == (2, 1)


def test_leaves_a_linear_with_another_use_alone():
    assert counts(Attention(twice=True), 2)[:2] == (2, 1)


def test_leaves_other_dtypes_alone():
    assert counts(Attention(), 2, dtypes=(torch.bfloat16,))[:2] == (0, 3)


@pytest.mark.parametrize("batch", [1, 2])
def test_fires_where_the_grid_has_two_sides(batch):
    """Rows count a grid of several latent dimensions: still one index, behind reshapes."""
    torch.manual_seed(0)
    case = subject(Grid().double().eval(), {"x": torch.randn(batch, 6, 3, 4, dtype=torch.float64)})
    program = sparse_program(case.plan.analysis, 5, case.plan.sparse)
    assert fuse_scatter_linear(program.graph, (torch.float64,)) == 2
    program.recompile()
    rows, (_, caches) = case.rows(5), case.dense(case.values)
    own = [cache.clone() for cache in caches]
    values = case.with_latent(case.other_latent())
    with torch.no_grad():
        program(*[value for value in values if isinstance(value, torch.Tensor)], rows, *own)
    assert error(own, case.sparse(values, rows, caches)[1]) < 1e-12


class Grid(Attention):
    """`[B, C, H, W] -> [B, C, H, W]` around one attention layer."""

    def forward(self, x):
        return super().forward(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
