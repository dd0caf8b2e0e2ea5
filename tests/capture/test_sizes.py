"""Which sizes Dynamo is asked to tell apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from ras_compile.capture.sizes import sides_that_vary


def varied(function: Callable, calls: list[tuple], dynamic: bool | None = True) -> dict[str, set[int]]:
    """What is to vary in the graph of the last call, without what need not."""
    graphs: list[fx.Graph] = []

    def backend(module, inputs):
        graphs.append(module.graph)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, dynamic=dynamic)
    for sizes in calls:
        compiled(*(torch.ones(each) for each in sizes))
    return {name[3:-2]: dims for name, dims in sides_that_vary(graphs[-1]).items() if dims}


def joined(x, text, ids):
    return torch.cat([text, x], 1)[:, text.shape[1] :] + ids[:, None, :1].transpose(0, 1)


def fixed(x, text):
    return nn.functional.conv2d(x, torch.ones(3, 3, 1, 1)) + text.mean(1).sum()


SIZES = {  # a function, its calls, and what is to vary
    "a square": (lambda x: x.sin(), [[(2, 3, 8, 8)]], {"x": {2, 3}}),
    "a wide one": (lambda x: x.sin(), [[(2, 3, 8, 12)]], {}),
    "a batch as large as a side": (lambda x: x.sin(), [[(8, 3, 8, 12)]], {"x": {0, 2}}),
    "a side as long as a text": (
        lambda x, text: x + text.mean(), [[(2, 3, 8, 12), (2, 8, 5)]], {"x": {2}, "text": {1}},
    ),
    "tokens and their places": (joined, [[(2, 9, 6), (2, 5, 6), (9, 1)]], {}),
    "a text as long as there are channels": (fixed, [[(2, 3, 8, 12), (2, 3, 5)]], {"x": {1}, "text": {1}}),
    "as many pictures as channels": (fixed, [[(3, 3, 8, 12), (2, 7, 5)]], {"x": {0, 1}}),
    "a text as wide as there are channels": (fixed, [[(2, 3, 8, 12), (2, 7, 3)]], {}),
    "as many words as tokens": (
        joined, [[(2, 9, 6), (2, 9, 6), (9, 1)]], {"x": {1}, "text": {1}, "ids": {0}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_are_equal_by_chance_are_told_apart(name):
    function, calls, wanted = SIZES[name]
    assert varied(function, calls) == wanted


def test_where_one_side_varies_both_do():
    """From the second size on, without being asked for dynamic sizes."""
    calls = [[(1, 3, 5, 8, 8)], [(1, 3, 5, 8, 12)]]
    assert varied(lambda x: x.sin(), calls[:1], None) == {} and varied(lambda x: x.sin(), calls, None) == {"x": {3}}
