"""Which sizes Dynamo is asked to tell apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from ras_compile.capture.sizes import held_size, numbers_beside, sides_that_vary, strided_latents
from ras_compile.dispatch.dispatcher import packed


def graph_of(function: Callable, calls: list[tuple], dynamic: bool | None = True) -> fx.Graph:
    """The graph of the last call; each has sizes of tensors, tensors, or numbers."""
    graphs: list[fx.Graph] = []

    def backend(module, inputs):
        graphs.append(module.graph)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, dynamic=dynamic)
    for sizes in calls:
        compiled(*(torch.ones(each) if isinstance(each, tuple) else each for each in sizes))
    return graphs[-1]


def varied(function: Callable, calls: list[tuple], dynamic: bool | None = True) -> dict[str, set[int]]:
    """What is to vary in the graph of the last call, without what need not."""
    graph = graph_of(function, calls, dynamic)
    return {name[3:-2]: dims for name, dims in sides_that_vary(graph).items() if dims}


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
    "as many tokens as a text is wide": (
        lambda x, text: x + text @ torch.ones(9, 6), [((2, 9, 6), (2, 1, 9))], {"x": {1}, "text": {2}},
    ),
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


LATENTS = {  # a latent, and whether it is a view for the graph
    "made as it is": (torch.ones(2, 9, 6), False),
    "transposed": (torch.ones(2, 6, 9).mT, True),
    "a slice of channels": (torch.ones(2, 9, 8)[..., :6], True),
    "a slice of the batch": (torch.ones(3, 9, 6)[1:], False),
    "sides that are patches": (torch.ones(2, 8, 6, 9).mT, True),
}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", LATENTS)
def test_a_latent_is_packed_where_it_is_a_view(name, dynamic):
    """A text is left as it is; what is packed has the strides of a tensor that was made so, and is itself if it has them."""
    latent, moved = LATENTS[name]
    graph = graph_of(lambda x, text: x.sin() + text.sum(), [(latent, torch.ones(2, 3, 5).mT)], dynamic)
    places = [node.name for node in graph.find_nodes(op="placeholder")]
    assert [places[index] for index in strided_latents(graph)] == ["l_x_"] * moved
    made = packed(latent)
    assert made.equal(latent) and made.stride() == torch.empty(latent.shape).stride() and packed(made) is made


def test_a_size_that_code_reads_is_told_with_its_line():
    def model(x, text):
        return x * math.log(x.shape[1]) + text.mean()

    sizes = [((2, 9, 6), (2, 9, 5))]
    graph = graph_of(model, sizes)
    index, dim, size, line = held_size(graph) or (0, 0, 0, "")
    assert list(graph.nodes)[index].name == "l_x_" and (dim, size) == (1, 9) and "math.log(x.shape[1])" in str(line)
    assert held_size(graph_of(model, sizes, False)) is None, "none is to vary"
    assert held_size(graph_of(joined, [((2, 9, 6), (2, 5, 6), (9, 1))])) is None


@pytest.mark.parametrize(("sides", "beside"), [([(4, 6), (8, 6)], 6), ([(4, 6), (8, 9)], 1), ([(4, 6)], 1)])
def test_numbers_that_are_told_beside_one_that_varies(sides, beside):
    def model(x, height, width):
        return x.unflatten(1, (height, width)).sin().flatten(1, 2)

    graph = graph_of(model, [((2, height * width, 5), height, width) for height, width in sides], None)
    assert numbers_beside(graph) == beside
