"""What the inputs of a graph are called, and what tells two calls of one graph apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ras_compile.capture.inputs import GraphInput, argument_names, varies
from ras_compile.dispatch.dispatcher import key_of


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


def values():
    return [torch.ones(2, 4), 3, 0.5, None, "text", (8, 12)]


@pytest.mark.parametrize(
    ("place", "other"),
    [
        (0, torch.ones(2, 5)),
        (0, torch.ones(4, 2)),
        (0, torch.ones(4, 2).t()),  # strides alone: what Inductor compiles assumes them
        (0, torch.ones(2, 4, dtype=torch.float64)),
        (0, torch.ones(2, 4, dtype=torch.bfloat16)),
        (0, torch.ones(2, 4, device="meta")),
        (0, None),
        (1, 4),
        (1, 3.0),  # equal, and of another type: the code may ask
        (1, True),
        (2, 0.25),
        (2, float("nan")),
        (3, 0),
        (4, "another"),
        (5, (12, 8)),
    ],
)
def test_calls_that_differ_in_one_thing_have_other_keys(place, other):
    assert key_of([other if index == place else value for index, value in enumerate(values())]) != key_of(values())


def test_calls_that_are_alike_have_one_key():
    """Values of tensors count for nothing, and each part can be looked up."""
    again = [torch.zeros(2, 4), *values()[1:]]
    assert key_of(again) == key_of(values()) and hash(key_of(again)) == hash(key_of(values()))
    assert key_of([float("nan")]) == key_of([float("nan")])


@pytest.mark.parametrize(
    ("argument", "value", "option", "wanted"),
    [
        ("timestep", 0.5, None, True),
        ("timesteps", 500, None, True),
        ("times", 0.5, None, True),
        ("t", 0.5, None, True),
        ("sigma", 0.5, None, True),
        ("t", 16, None, False),  # a number of frames
        ("timestep", True, None, False),
        ("timestep", torch.tensor(0.5), None, False),
        ("guidance", 3.5, None, False),
        (None, 0.5, None, False),  # a module's
        ("guidance", 3.5, "guidance", True),
        ("timestep", 0.5, "guidance", False),
        ("t", 16, "t", True),
    ],
)
def test_numbers_that_vary_from_call_to_call_are_those_that_say_the_time(argument, value, option, wanted):
    assert varies(GraphInput(argument, f"{argument}['0']"), value, option) is wanted
