"""Where `linear -> gelu` becomes one product, and where it must not."""

import pytest
import torch
import torch.nn.functional as F
from contract import error, subject
from torch import nn

from ras_compile.passes.fusion.activation import fuse_linear_gelu

FUSED = torch.ops.ras_compile.linear_gelu.default


class Block(nn.Module):
    def __init__(self, approximate="tanh", bias=True, twice=False):
        super().__init__()
        self.up, self.down = nn.Linear(6, 16, bias=bias), nn.Linear(16, 6)
        self.approximate, self.twice = approximate, twice

    def forward(self, x):
        x = x + F.scaled_dot_product_attention(x, x, x)
        hidden = self.up(x)
        return self.down(F.gelu(hidden, approximate=self.approximate) + (hidden if self.twice else 0))


def fused(model: nn.Module, dtypes=(torch.float64,)) -> tuple[int, float]:
    """How many products were fused, and the error against the graph as it was."""
    torch.manual_seed(0)
    case = subject(model.double().eval(), {"x": torch.randn(2, 12, 6, dtype=torch.float64)})
    wanted = case.reference(case.values)
    graph = case.plan.captured.graph
    count = fuse_linear_gelu(graph, dtypes)
    graph.lint()
    case.plan.captured.recompile()
    assert len(graph.find_nodes(op="call_function", target=FUSED)) == count
    return count, error(case.reference(case.values), wanted)


def test_fires():
    count, gap = fused(Block())
    assert count == 1 and gap < 1e-12


@pytest.mark.parametrize(
    "block", [Block("none"), Block(bias=False), Block(twice=True)], ids=["erf", "no bias", "twice"]
)
def test_leaves_alone(block):
    assert fused(block) == (0, 0.0)


def test_leaves_other_dtypes_alone():
    assert fused(Block(), (torch.bfloat16, torch.float16)) == (0, 0.0)
