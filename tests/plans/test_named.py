"""A plan's name stands for all that its programs follow from, so that those of another process may be taken by it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny import EAGER, LATENT, TEXT, TinyDiT
from torch import nn

from ras_compile.execute.shelf import Shelf
from ras_compile.plans import plan as plans
from ras_compile.plans.plan import Plan


class Ordered(TinyDiT):
    """Computes its tokens in an order that it holds, in whole numbers, and multiplies by a constant of its code."""

    def __init__(self, order: Sequence[int], constant: float = 1.0) -> None:
        super().__init__()
        self.order, self.constant = nn.Buffer(torch.tensor(order)), constant
        self.back = nn.Buffer(self.order.argsort())

    def forward(self, hidden_states, timestep, text):
        picture = super().forward(reordered(hidden_states, self.order), timestep, text)
        return reordered(picture, self.back) * torch.tensor([self.constant], dtype=picture.dtype)


def reordered(latent, order):
    """The patches of a latent in another order."""
    height, width = latent.shape[-2] // 2, latent.shape[-1] // 2
    tokens = latent.unflatten(3, (width, 2)).unflatten(2, (height, 2)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return tokens[:, order].unflatten(1, (height, width)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


@pytest.fixture
def plan_of(monkeypatch):
    """Makes the plan of a model's first call."""

    def make(model, **options) -> Plan:
        made: list[Plan] = []
        own = Plan.__init__
        with monkeypatch.context() as patched:
            patched.setattr(
                Plan, "__init__", lambda self, *args, **given: made.append(self) or own(self, *args, **given)
            )
            torch._dynamo.reset()
            with torch.no_grad():
                compiled = torch.compile(model.eval(), backend="ras", options={**EAGER, **options})
                compiled(LATENT[:, :, :, :8], torch.ones(2), TEXT)
        return made[-1]

    return make


def test_a_plan_is_named_by_all_that_it_follows_from(plan_of):
    order = list(range(16))
    first = plan_of(Ordered(order))
    assert first.name is not None
    assert plan_of(Ordered(order), sample_ratio=0.25).name == first.name  # with other weights, too
    others = [
        plan_of(Ordered([1, 0, *order[2:]])),
        plan_of(Ordered(order, 2.0)),
        plan_of(Ordered(order), kv_cache=False),
        plan_of(TinyDiT()),
        plan_of(TinyDiT(layers=3)),
    ]
    assert len({first.name, *[other.name for other in others]}) == 6


def test_what_another_process_has_proved_is_not_proved_again(plan_of, monkeypatch):
    shelf, proved, own = Shelf(), [], Plan.prove
    monkeypatch.setattr(plans, "shelf", shelf)
    monkeypatch.setattr(Plan, "prove", lambda self: proved.append(self) or own(self))
    first, again = plan_of(TinyDiT()), plan_of(TinyDiT())
    assert proved == [first, again]
    shelf.load(shelf.all())
    plan_of(TinyDiT())
    assert proved == [first, again]


def test_programs_that_another_process_has_made_are_taken(plan_of, monkeypatch):
    shelf = Shelf()
    monkeypatch.setattr(plans, "shelf", shelf)
    first = plan_of(TinyDiT())
    with torch.no_grad():
        graphs = {active: first.built(active) for active in ("dense", "bare", 5)}
    shelf.load(shelf.all())
    other = plan_of(TinyDiT())
    monkeypatch.setattr(Plan, "build", lambda self, active: pytest.fail(f"{active} was built anew"))
    for active, graph in graphs.items():
        assert other.built(active).print_readable(print_output=False) == graph.print_readable(print_output=False)
