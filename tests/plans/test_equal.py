"""A graph that Dynamo captures anew, for some size has changed, and that computes what an earlier one does, has its plan."""

from __future__ import annotations

import pytest
import torch
from tiny import EAGER, LATENT, TinyDiT, kinds, run

import ras_compile
from ras_compile.backend import CompiledGraph
from ras_compile.plans import equal

TEXTS = [torch.randn(2, length, 6, generator=torch.Generator().manual_seed(length)) for length in (5, 7, 5)]


def draw(compiled, texts, told: bool, steps: int = 7, first: int = 0):
    """A picture of several branches; those after the first one are called from step ``first`` on."""
    latent = LATENT
    with torch.no_grad(), ras_compile.generation(steps) as gen:
        for step in range(steps):
            if told:
                gen.step()
            noises = [
                compiled(latent, torch.full((2,), 1 - step / steps), text)
                for text in (texts[:1] if step < first else texts)
            ]
            latent = latent - sum(noises) / len(noises) / steps
    return latent


@pytest.mark.parametrize(
    ("told", "warmup", "metric", "reuse"),
    [
        (True, 1, "drift", "forecast"),
        (True, 2, "drift", "forecast"),
        (False, 1, "drift", "hold"),
        (False, 2, "std", "linear"),
    ],
)
def test_the_first_picture_of_prompts_of_several_lengths_is_the_second_one(told, warmup, metric, reuse):
    options = {**EAGER, "warmup_steps": warmup, "metric": metric, "noise_reuse": reuse, "sample_ratio": 0.25}
    compiled = torch.compile(TinyDiT(8, 1).eval(), backend="ras", options=options)
    texts = TEXTS if told else TEXTS[:2]
    pictures = [draw(compiled, texts, told) for _ in range(2)]
    # alone, nobody knows before the third step where time goes
    dense = len(texts) * (warmup if told else 2)
    assert kinds(compiled) == "d" * dense + "s" * (7 * len(texts) - dense)
    assert torch.equal(*pictures)


def test_another_length_in_the_middle_of_a_picture_leaves_the_first_branch_alone():
    """Guidance that begins late: the graph of the first length is exchanged between sparse steps."""
    compiled = torch.compile(TinyDiT(8, 1).eval(), backend="ras", options=EAGER)
    pictures = [draw(compiled, TEXTS[:2], True, first=4) for _ in range(2)]
    assert kinds(compiled) == "dd" + "ss" + "sd" + "ssss"
    assert torch.equal(*pictures)


def test_a_third_graph_leaves_the_branches_of_the_second_one_alone():
    """Of a size that has its plan from the second graph, and then another text: Dynamo has one symbol there, two in the third."""
    compiled = torch.compile(TinyDiT(8, 1).eval(), backend="ras", options=EAGER)
    run(compiled, LATENT[..., :8].contiguous(), TEXTS[0], steps=1)
    pictures = [draw(compiled, TEXTS[:2], True, first=4) for _ in range(2)]
    assert kinds(compiled) == "dd" + "ss" + "sd" + "ssss"
    assert torch.equal(*pictures)


@pytest.fixture
def kept(monkeypatch):
    """The identities of the plans that graphs take, in order."""
    found = []

    def keep(self, key, entry, keep=CompiledGraph.keep):
        found.append(entry.plan.identity)
        keep(self, key, entry)

    monkeypatch.setattr(CompiledGraph, "keep", keep)
    return found


def test_sizes_that_come_back_have_the_plan_that_they_had(kept):
    compiled = torch.compile(TinyDiT(8, 1).eval(), backend="ras", options=EAGER)
    pictures = [run(compiled, latent, TEXTS[0]) for latent in (LATENT, LATENT[..., :8].contiguous(), LATENT)]
    assert kept == [kept[0], kept[1], kept[0]] and kept[0] is not kept[1]
    assert torch.equal(pictures[0], pictures[2])


def normal(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


VIEWS = {  # what a picture begins with; its steps are no views
    "transposed": normal(2, 4, 12, 8).mT,
    "channels of one": normal(1, 9, 8, 12)[:, 4:8],
    "channels of two": normal(2, 9, 8, 12)[:, 4:8],
    "a picture of a batch": normal(3, 4, 8, 12)[1:2],
    "every second column": normal(2, 4, 8, 24)[..., ::2],
}


@pytest.mark.parametrize(
    ("view", "dynamic"),
    [
        ("channels of one", False),
        ("channels of two", None),
        ("every second column", None),
        ("transposed", True),
        ("channels of one", True),
        ("a picture of a batch", True),
    ],
)
def test_a_latent_that_is_a_view_costs_no_dense_step(view, dynamic, kept):
    """Dynamo makes a graph of the first step, and another one of the next, which has other strides or is no view."""
    latent = VIEWS[view]
    compiled = torch.compile(TinyDiT(8, 1).eval(), backend="ras", options=EAGER, dynamic=dynamic)
    pictures = [run(compiled, latent, TEXTS[0][: len(latent)])]
    assert kinds(compiled) == "ddssss" and len(set(kept)) == 1
    pictures.append(run(compiled, latent.clone(memory_format=torch.contiguous_format), TEXTS[0][: len(latent)]))
    assert kinds(compiled) == "ddssss" and torch.equal(*pictures) and len(set(kept)) == 1


def test_a_traced_model_is_traced_once_for_a_latent_that_is_a_view():
    class Reading(TinyDiT):
        def forward(self, hidden_states, timestep, text):
            return super().forward(hidden_states, timestep, text * float(text[0, 0, 0] * 0 + 1))

    compiled = torch.compile(Reading(8, 1).eval(), backend="ras", options=EAGER)
    run(compiled, VIEWS["channels of one"], TEXTS[0][:1])
    assert kinds(compiled) == "ddssss"


def test_a_model_that_wants_the_strides_of_a_view_gets_them():
    class Flat(TinyDiT):
        def forward(self, hidden_states, timestep, text):
            flat = hidden_states.mT.view(len(text), -1).view(len(text), 4, 12, 8)
            return super().forward(flat.mT, timestep, text)

    torch.manual_seed(0)
    module, latent = Flat(8, 1).eval(), normal(2, 4, 12, 8).mT
    compiled = torch.compile(module, backend="ras", options={**EAGER, "sample_ratio": 1.0})
    torch.testing.assert_close(run(compiled, latent, TEXTS[0]), run(module, latent, TEXTS[0]))
    assert kinds(compiled) == "ddssss"


def test_a_text_as_long_as_there_are_channels_costs_no_dense_step(kept):
    """With dynamic sizes: guidance by another one, in calls of their own, and a prompt of that length after others."""
    compiled = torch.compile(TinyDiT(8, 1).eval(), backend="ras", options=EAGER, dynamic=True)
    texts = [torch.ones(2, 4, 6), TEXTS[0]]
    pictures = [draw(compiled, texts, told=True) for _ in range(2)]
    assert kinds(compiled) == "d" * 4 + "s" * 10 and len(set(kept)) == 2 and torch.equal(*pictures)


class Scaled(TinyDiT):
    """With a number in its code."""

    scale: float = 1.0

    def forward(self, hidden_states, timestep, text):
        return self.scale * super().forward(hidden_states, timestep, text)


@pytest.mark.parametrize(("scale", "count"), [(1.0, 1), (1, 2), (2.0, 2)])
def test_a_graph_with_another_number_has_a_plan_of_its_own(scale, count, kept):
    for kind in (type("First", (Scaled,), {}), type("Second", (Scaled,), {"scale": scale})):
        run(torch.compile(kind(8, 1).eval(), backend="ras", options=EAGER), LATENT, TEXTS[0])
    assert len(kept) == 2 and len(set(kept)) == count


def test_after_a_reset_plans_are_made_anew(kept):
    module = TinyDiT(8, 1).eval()
    for _ in range(2):
        run(torch.compile(module, backend="ras", options=EAGER), LATENT, TEXTS[0])
        torch._dynamo.reset()
        assert not equal.made
    assert kept[0] is not kept[1]
