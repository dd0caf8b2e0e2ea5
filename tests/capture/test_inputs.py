"""What the inputs of a graph are called."""

from __future__ import annotations

import pytest
from torch import nn

from ras_compile.capture.inputs import argument_names


class Short(nn.Module):
    def forward(s, hidden_states, timestep, *others, text=None, **more):  # what is tested
        pass


class Usual(nn.Module):
    def forward(self, hidden_states, timestep, *others, text=None, **more):
        pass


class Gathered(nn.Module):
    def forward(*args, text=None):
        pass


@pytest.mark.parametrize("kind", [Short, Usual])
def test_the_module_is_no_argument_whatever_it_is_called(kind):
    assert argument_names(kind.forward) == ["hidden_states", "timestep", "text"]


def test_a_forward_may_hold_the_module_among_all_positional_arguments():
    assert argument_names(Gathered.forward) == ["text"]
