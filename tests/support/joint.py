"""A joint block small enough to be read as a graph: text and picture attend to each other."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor, fx, nn

from ras_compile.capture.export import capture
from ras_compile.passes.algebra.layout import Frame
from ras_compile.passes.analysis.propagate import Analysis, propagate
from ras_compile.passes.analysis.splices import SparsePlan, plan


class Joint(nn.Module):
    """One joint block: text and picture attend to each other; positions are added, keys expanded over the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query, self.key = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.out = nn.Linear(8, 4)

    def forward(self, latent: Tensor, text: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(latent.flatten(2).transpose(1, 2)) + position
        x = torch.cat([text, x], 1)
        heads = self.query(x).unflatten(-1, (2, 4)).transpose(1, 2)
        keys = self.key(x).unsqueeze(1).expand(-1, 2, -1, -1)
        y = torch.nn.functional.scaled_dot_product_attention(heads, keys, heads).transpose(1, 2).flatten(2)
        aside, y = (x + y).split([2, 6], 1)
        return self.out(y).transpose(1, 2).unflatten(-1, (2, 3)), aside


@cache
def captured() -> fx.GraphModule:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, 2, 3), torch.randn(2, 2, 8), torch.randn(1, 6, 8)]
    traced = torch.export.export(Joint(), tuple(inputs)).module()
    return capture(traced, inputs)


def analysed() -> tuple[Analysis, SparsePlan]:
    graph = copy.deepcopy(captured()).graph
    latent = next(n for n in graph.find_nodes(op="placeholder") if tuple(n.meta["val"].shape) == (2, 4, 2, 3))
    analysis = propagate(graph, latent, Frame.of(latent.meta["val"].shape))
    return analysis, plan(analysis)


class Layer(nn.Module):
    """Modulated attention and an MLP; keys and values of all tokens are needed."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.modulation, self.final = nn.Linear(width, 2 * width), nn.Linear(width, 3 * width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.modulation(time).unsqueeze(1).chunk(2, -1)
        first, second, third = self.final(time).unsqueeze(1).chunk(3, -1)
        y = x * (1 + scale) + shift
        q, k, v = (part(y).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + (self.out(y * first) * second).tanh() * third


class Layers(nn.Module):
    """Three equal layers on a small picture."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, latent: Tensor, time: Tensor) -> Tensor:
        x = self.embed(latent.flatten(2).transpose(1, 2))
        for layer in self.layers:
            x = layer(x, time)
        return self.head(x).transpose(1, 2).unflatten(-1, (2, 3))


@cache
def layers() -> tuple[Analysis, SparsePlan]:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, 2, 3), torch.randn(2, 8)]
    graph = capture(torch.export.export(Layers(), tuple(inputs)).module(), inputs).graph
    latent = next(n for n in graph.find_nodes(op="placeholder") if tuple(n.meta["val"].shape) == (2, 4, 2, 3))
    analysis = propagate(graph, latent, Frame.of(latent.meta["val"].shape))
    return analysis, plan(analysis)
