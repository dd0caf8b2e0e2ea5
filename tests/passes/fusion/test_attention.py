"""The attention pass: it fires on plain attention of a sparse program, changes no number, and leaves the rest alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract import by_model, error, of_zoo, subject
from torch import Tensor, nn

from ras_compile.passes.fusion.attention import fuse_attention
from ras_compile.passes.fusion.scatter import Fusion
from ras_compile.passes.programs.program import sparse_program

FUSED = torch.ops.ras_compile.attention.default


class Attend(nn.Module):
    """`[B, 12, 16] -> [B, 12, 16]`: two heads of 8 channels."""

    def __init__(self, **given) -> None:
        super().__init__()
        self.qkv, self.out, self.given = nn.Linear(16, 48), nn.Linear(16, 16), given

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.given)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Masked(Attend):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(12, 12, dtype=torch.bool).tril())


class Shared(Attend):
    """Two heads share keys and values."""

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


class Flat(Attend):
    """Three dimensions: heads are samples."""

    def attend(self, q, k, v):
        return super().attend(*(x.flatten(0, 1) for x in (q, k, v))).unflatten(0, (-1, 2))


class Wider(Attend):
    """Values of more channels than keys."""

    def attend(self, q, k, v):
        return super().attend(q, k, torch.cat([v, v], -1))[..., 4:12]


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Conv2d(3, 16, 2, 2), block, nn.Linear(16, 12)

    def forward(self, latent):
        x = self.head(self.block(self.embed(latent).flatten(2).mT))  # [B, 12, 12]
        return x.unflatten(1, (3, 4)).unflatten(-1, (3, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def counts(case, active=5, pays=None, dtypes=(torch.float64,)) -> tuple[int, float]:
    """``(attentions of few queries, error against the unfused program)``."""
    rows = case.rows(active)
    _, caches = case.dense(case.values)
    values = case.with_latent(case.other_latent())
    program = sparse_program(case.plan.analysis, active, case.plan.sparse)
    fusion = Fusion(case.frame.tokens, dtypes=dtypes, attention_pays=pays)
    found = fuse_attention(program.graph, fusion)
    assert len(program.graph.find_nodes(op="call_function", target=FUSED)) == found
    program.graph.lint()
    program.recompile()
    own = [cache.clone() for cache in caches]
    with torch.no_grad():
        program(*case.plan.tensors(values), rows, *own)
    return found, error(own, case.sparse(values, rows, caches)[1])


def case_of(block: nn.Module):
    torch.manual_seed(0)
    model = Model(block).double().eval()
    return subject(model, {"latent": torch.randn(2, 3, 6, 8, dtype=torch.float64)}, exact=False)


@pytest.mark.parametrize("given", [{}, {"scale": 0.3}], ids=["default scale", "scale"])
def test_fires(given):
    found, gap = counts(case_of(Attend(**given)))
    assert found == 1 and gap < 1e-12


@pytest.mark.parametrize("block", [Masked, Shared, Flat, Wider])
def test_leaves_alone(block):
    assert counts(case_of(block()))[0] == 0


def test_leaves_causal_attention_alone():
    assert counts(case_of(Attend(is_causal=True)))[0] == 0


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_leaves_scales_that_turn_the_order_alone(scale):
    assert counts(case_of(Attend(scale=scale)))[0] == 0


def test_leaves_other_dtypes_alone():
    assert counts(case_of(Attend()), dtypes=(torch.bfloat16, torch.float16))[0] == 0


def test_asks_whether_it_pays():
    asked = []
    assert counts(case_of(Attend()), pays=asked.append)[0] == 0  # None: no
    ((q, k, v, scale),) = asked
    assert (q.shape, k.shape, v.shape) == ((2, 2, 5, 8), (2, 2, 12, 8), (2, 2, 12, 8)) and scale == 8**-0.5
    assert counts(case_of(Attend()), pays=lambda args: True)[0] == 1


# Attentions that become the op, the others have masks.
MODELS = {"SD3": 2, "Flux": 3, "PixArt": 2}


@pytest.mark.zoo
@pytest.mark.parametrize("name", by_model(MODELS))
def test_known_models(name):
    case = of_zoo(name)
    found, gap = counts(case, 6)
    assert found == MODELS[name] and gap < 1e-11
