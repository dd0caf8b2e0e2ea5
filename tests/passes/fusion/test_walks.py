"""Walks: what strides say of ops that move entries, against the ops themselves on numbered entries."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from ras_compile.passes.fusion.walks import Walk, chained, contiguous, numbers

MOVES = {
    "permute": lambda x: x.permute(2, 0, 1),
    "patches": lambda x: x.unflatten(2, (3, 2)).permute(0, 2, 1, 3).reshape(4, 3, 12),
    "patches and back": lambda x: (
        x.unflatten(2, (3, 2)).permute(2, 0, 3, 1).reshape(3, 8, 6).transpose(0, 1).reshape(24, 6)
    ),
    "slice of a dim": lambda x: x[1:3, :, 2:5].reshape(12, 3).t(),
    "every second": lambda x: x[:, ::2, 1::2].flatten(),
    "one of them": lambda x: x.select(1, 4).clone().view(2, 12),
    "the same again": lambda x: x[:, :1].expand(4, 3, 6).reshape(4, 18).unsqueeze(1),
    "a dim joined and split": lambda x: x.flatten(1).unflatten(1, (2, 18)).movedim(1, 0),
    "one concatenated": lambda x: torch.cat([x.transpose(0, 1)]).contiguous().view(-1),
    "one contracted": lambda x: torch.einsum("abc->cba", x),
}
NO_WALK = {
    "across the borders of permuted dims": lambda x: x.permute(0, 2, 1).reshape(4, 9, 4),
    "a slice across digits": lambda x: x.permute(1, 0, 2).reshape(6, 24)[:, 5:].reshape(6 * 19),
}


def walk(move) -> tuple[Walk | None, torch.Tensor, torch.Tensor]:
    """The walk of a chain of ops on a contiguous tensor, the numbered entries, and what the ops make of them."""
    numbered = torch.arange(4 * 6 * 6).view(4, 6, 6)
    module = torch.export.export(Module(move), (numbered,), strict=False).module()
    nodes = [node for node in module.graph.nodes if node.op == "call_function" and node.name != "_guards_fn"]
    return chained([*reversed(nodes)], Walk.of(contiguous(nodes[-1]))), numbered, move(numbered)


class Module(torch.nn.Module):
    def __init__(self, move) -> None:
        super().__init__()
        self.move = move

    def forward(self, x):
        return self.move(x)


@pytest.mark.parametrize("name", MOVES)
def test_a_walk_visits_what_the_ops_put_there(name):
    found, _, moved = walk(MOVES[name])
    assert found is not None and numbers(found).tolist() == moved.flatten().tolist()
    assert numbers(found.joined()).tolist() == moved.flatten().tolist()


@pytest.mark.parametrize("name", NO_WALK)
def test_what_carries_over_has_no_walk(name):
    assert walk(NO_WALK[name])[0] is None


def test_a_walk_over_memory_is_the_view_of_it():
    memory = torch.arange(300)
    view = memory.as_strided((4, 6, 6), (60, 9, 1), 5)
    found = Walk(((6, 1), (4, 36), (3, 12), (2, 6))).over(Walk.of(view))  # columns first, rows in pairs
    assert found is not None
    assert numbers(found).tolist() == view.permute(2, 0, 1).reshape(6, 4, 3, 2).flatten().tolist()


def test_steps_past_the_end_have_no_walk():
    whole = Walk(((4, 6), (6, 1)))
    assert whole.split(((4, 6), (6, 1))) is not None
    assert whole.split(((5, 6), (6, 1))) is None
    assert whole.split(((4, 6), (6, 1)), 1) is None
    assert whole.split(((2, 1),), 24) is None


def test_any_size_is_walked():
    huge = fx.Graph()
    x = huge.placeholder("x")
    x.meta["val"] = torch.empty(10**6, 4096, 256, device="meta")
    y = huge.call_function(torch.ops.aten.permute.default, (x, [2, 0, 1]))
    y.meta["val"] = x.meta["val"].permute(2, 0, 1)
    found = chained([y], Walk.of(contiguous(y)))
    assert found is not None and found.joined().runs == ((256, 1), (10**6 * 4096, 256))
