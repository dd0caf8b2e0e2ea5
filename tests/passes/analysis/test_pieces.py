"""Parts of the tokens that are worked apart are worked together, where that means the same and costs little."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ras_compile.capture.export import export
from ras_compile.passes.algebra.layout import Frame
from ras_compile.passes.analysis.pieces import CUTS, Together
from ras_compile.passes.analysis.propagate import propagate

BATCH, TOKENS, WIDTH = 2, 7, 4
WEIGHT = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
BESIDE = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def cut(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :3], x[:, 3:]


def written(x: Tensor, w: Tensor, beside: Tensor) -> Tensor:
    y = x.clone()
    y[:, 2:5] = y[:, 2:5] * 2 + beside[2:5]
    return y


def split_three_ways(x: Tensor, w: Tensor, beside: Tensor) -> Tensor:
    first, second, third = x.split([2, 4, 1], 1)
    return torch.cat([first.sin(), second.exp(), third.cos()], 1)


def nested(x: Tensor, w: Tensor, beside: Tensor) -> Tensor:
    first, second = cut(x)
    return torch.cat([torch.cat([first[:, :1], first[:, 1:].exp()], 1), second], 1)


def gated(x: Tensor, w: Tensor, beside: Tensor) -> Tensor:
    mixed = F.scaled_dot_product_attention(x, x, x)
    return torch.cat([x[:, :3] + mixed[:, :3] * w[0], x[:, 3:] + mixed[:, 3:] * w[1]], 1)


TOGETHER = {
    "chunks": lambda x, w, y: torch.cat([F.linear(part, w).tanh() for part in x.chunk(3, 1)], 1),
    "one and the others": lambda x, w, y: torch.cat([x[:, :1] * 2, x[:, 1:] + y[1:]], 1),
    "a dense value of the part's size": lambda x, w, y: torch.cat([x[:, :3] + w[:3], x[:, 3:]], 1),
    "split, three ways": split_three_ways,
    "written": written,
    "a part of a part": nested,
    "gated, beside parts of another value": gated,
    "another dimension": lambda x, w, y: torch.cat([p.transpose(1, 2).exp() for p in cut(x)], 2),
    "norms and heads": lambda x, w, y: torch.cat([F.layer_norm(p, (4,)).unflatten(-1, (2, 2)).softmax(-1) for p in cut(x)], 1),
    "queries": lambda x, w, y: torch.cat([F.scaled_dot_product_attention(p, x, x) for p in cut(x)], 1),
}  # fmt: skip
APART = {
    "work that mixes a part": lambda x, w, y: torch.cat([p - p.mean(1, keepdim=True) for p in cut(x)], 1),
    "other work for each": lambda x, w, y: torch.cat([F.linear(p, w * k) for k, p in enumerate(x.chunk(4, 1))], 1),
    "another order": lambda x, w, y: torch.cat([p.exp() for p in cut(x)[::-1]], 1),
    "parts that meet": lambda x, w, y: torch.cat([x[:, :3] + x[:, 4:], x[:, 3:]], 1),
    "one left out": lambda x, w, y: torch.cat([p.exp() for p in (x[:, :2], x[:, 3:])], 1),
}


class Calls(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, w: Tensor, y: Tensor) -> tuple:
        return F.linear(x, w), self.function(F.linear(x, w), w, y)


def analysed(function):
    given = (
        torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        WEIGHT,
        BESIDE,
    )
    captured = export(Calls(function), given)
    analysis = propagate(captured.graph, captured.graph.find_nodes(op="placeholder")[0], Frame.of(given[0].shape))
    captured.graph.lint()
    for found, wanted in zip(captured(*given), Calls(function)(*given), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    return analysis


@pytest.mark.parametrize("name", TOGETHER)
def test_parts_are_worked_together(name: str):
    analysis = analysed(TOGETHER[name])
    assert analysis.frame.tokens == TOKENS
    assert not [step for step in analysis.steps.values() if step.whole]
    assert not [node for node in analysis.graph.nodes if node.target in CUTS and node in analysis.steps]


@pytest.mark.parametrize("name", APART)
def test_parts_that_cannot_be_worked_together_are_left(name: str):
    analysis = analysed(APART[name])
    assert any(node.target in CUTS and step.whole for node, step in analysis.steps.items())


def test_samples_taken_apart_share_their_rows():
    """Where each sample is worked by itself, as a model with guidance inside does, and not as the others are."""
    alone = lambda x, w, y: torch.stack([row - row.mean(0) for row in x.unbind(0)], 0)  # noqa: E731
    assert analysed(alone).frame.shared_rows
    assert not analysed(TOGETHER["chunks"]).frame.shared_rows
    assert not analysed(lambda x, w, y: torch.cat([row.exp() for row in x.chunk(2, 0)], 0)).frame.shared_rows


def test_what_cannot_run_for_all_entries_is_no_node():
    """A node without a value would end the analysis of a model whose parts are left as they are."""
    captured = export(
        Calls(lambda x, w, y: x), (torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64), WEIGHT, BESIDE)
    )
    source, _, beside = captured.graph.find_nodes(op="placeholder")
    nodes, attempt = list(captured.graph.nodes), Together(captured.graph, {}, source)
    attempt.before = nodes[-1]
    shorter = attempt.emit(torch.ops.aten.slice.Tensor, beside, 0, 1)
    with pytest.raises(RuntimeError):
        attempt.emit(torch.ops.aten.add.Tensor, source, shorter)
    assert [node for node in captured.graph.nodes if node not in nodes] == [shorter]
