"""Parts that are run as they are: who knows that one is running, and which weights it has then."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from ras_compile.passes.rules import token_wise


class Told(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        assert token_wise.here.running
        others: list[bool] = []
        thread = threading.Thread(target=lambda: others.append(token_wise.here.running))
        thread.start()
        thread.join()
        assert others == [False], "it is this thread that runs it"
        return super().forward(x)


def test_a_part_runs_with_the_weights_that_are_given():
    part, other, x = Told(3, 2), nn.Linear(3, 2), torch.randn(4, 3)
    number = token_wise.number_of(part)
    assert number == token_wise.number_of(part) != token_wise.number_of(other)
    for weights in (part, other):
        given = list(token_wise.weights_of(weights).values())
        found = token_wise.token_wise(x, given, number, 2)
        assert torch.equal(found, nn.functional.linear(x, *given)) and not token_wise.here.running
