"""Families of plans: which calls share one, at which lengths it is planned, and what its members share and give up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ras_compile import notices
from ras_compile.config import RASConfig
from ras_compile.errors import SpecViolation, UnsupportedGraph
from ras_compile.plans import family
from ras_compile.plans.family import FAMILIES, KEPT, Families, Family, described


def bare(**parts) -> Family:
    """A family with these parts alone."""
    made = Family.__new__(Family)
    vars(made).update(parts)
    return made


def test_a_family_is_made_once_for_what_calls_have_in_common(monkeypatch):
    made: list[tuple] = []

    def make(self, key, lengths, values, config):
        made.append(key)
        return None if values[0] == "refused" else SimpleNamespace(member=lambda values: (key, values[1]))

    lengths = SimpleNamespace(key_without_lengths=lambda values, users: values[0])
    monkeypatch.setattr(family.Lengths, "of", lambda graph, inputs, values, numbers: lengths if values else None)
    monkeypatch.setattr(Families, "make", make)
    families, config = Families(None, [], []), RASConfig()
    assert families.plan([], config, []) is None and not made, "there are no lengths"
    assert families.plan(["a", 5], config, []) == (("a", None), 5)
    assert families.plan(["a", 7], config, []) == (("a", None), 7) and len(made) == 1
    assert families.plan(["a", 7], config, [], fixed=1) == (("a", 1), 7), "other numbers among the weights"
    families.plan(["a", 7], RASConfig.from_options({"region": slice(0, 4)}), [])
    assert len(made) == 3, "another region"
    assert families.plan(["refused", 7], config, []) is families.plan(["refused", 9], config, []) is None
    assert len(made) == 4
    for number in range(FAMILIES):
        families.plan([number, 7], config, [])
    assert len(made) == FAMILIES and families.plan([FAMILIES, 7], config, []) is None


POINTS = {  # the present lengths, those that are allowed, those at which the graph holds, and the points
    "any": ((8,), lambda p: True, lambda p: True, [(8,), (7,), (4,)]),
    "even": ((8,), lambda p: p[0] % 2 == 0, lambda p: True, [(8,), (6,), (4,)]),
    "not below": ((8,), lambda p: p[0] >= 8, lambda p: True, [(8,), (9,), (19,)]),
    "each third, not below": ((9,), lambda p: p[0] >= 9, lambda p: p[0] % 3 == 0, [(9,), (12,), (21,)]),
    "each third": ((6,), lambda p: p[0] % 3 == 0, lambda p: True, [(6,), (3,), (15,)]),
    "two": ((8, 5), lambda p: True, lambda p: p[1] > 4, [(8, 5), (7, 5), (8, 6), (4, 13)]),
}


@pytest.mark.parametrize("name", POINTS)
def test_points_are_near_ones_and_one_far_away(name):
    """A step along each length alone, as small as it can be, and a check that lies beyond the step of every length."""
    base, allows, holds, points = POINTS[name]
    made = bare(graph=SimpleNamespace(base=base, lengths=SimpleNamespace(allows=allows), holds=holds))
    assert made._points() == points


@pytest.mark.parametrize("lengths", [[5], [5, 6], [4, 5, 6], [5, 13]])
def test_a_graph_that_is_right_for_too_few_lengths_has_no_family(lengths):
    allowed = SimpleNamespace(allows=lambda point: point[0] in lengths)
    made = bare(graph=SimpleNamespace(base=(5,), lengths=allowed, holds=lambda point: True))
    with pytest.raises(UnsupportedGraph, match="too few lengths"):
        made._points()


def test_members_that_ran_long_ago_give_up_what_they_keep():
    made, gone = bare(_members=[], _lock=family.threading.RLock()), []
    members = [
        SimpleNamespace(kept=SimpleNamespace(give_up=lambda number=number: gone.append(number)))
        for number in range(KEPT + 2)
    ]
    for number in [*range(KEPT), 0, 0]:
        made.entering(members[number])
    assert not gone
    made.entering(members[KEPT])
    assert gone == [1], "the first one has run since"
    made.entering(members[KEPT + 1])
    assert gone == [1, 2] and made._members == [members[number] for number in (3, 0, KEPT, KEPT + 1)]


def test_a_member_is_of_the_lengths_that_the_graph_is_right_for(monkeypatch):
    monkeypatch.setattr(family, "Member", lambda made, point, values: point)
    lengths = SimpleNamespace(at=lambda values: (len(values),), fits=lambda values, point: values[0] == "fits")
    made = bare(graph=SimpleNamespace(lengths=lengths, holds=lambda point: point != (2,)))
    assert made.member(["fits"]) == (1,) and made.member(["fits not"]) is made.member(["fits", 0]) is None


def test_a_program_is_shared_where_it_fits_and_each_has_its_own_where_none_can_be():
    shared = []

    def share(active, point, inputs):
        shared.append(active)
        if active == "refused":
            raise RuntimeError("the inner compiler takes no symbols")
        if active == "broken":
            raise SpecViolation("never passed over")
        return SimpleNamespace(fits=lambda point, inputs: point != (3,), compiled=lambda *given: given)

    made = bare(_programs={}, _share=share)
    for point in ((5,), (7,)):
        program = made.program(4, point, [])
        assert program is not None and program("x") == (*point, "x")
    assert made.program(4, (3,), []) is None and shared == [4]
    notices.reset()
    assert made.program("refused", (5,), []) is made.program("refused", (7,), []) is None
    assert shared == [4, "refused"] and [found.count for found in notices.fallbacks()] == [1]
    with pytest.raises(SpecViolation):
        made.program("broken", (5,), [])


def test_all_lengths_choose_as_the_first_does():
    """What is fused is measured once: programs of other lengths are the same but for sizes."""
    told = []

    class Sample:
        def __init__(self, asks: int) -> None:
            self.asks = asks

        def build(self, active, *, outline_blocks):
            told.append([self.chosen(lambda *ops: ops == (active, 0), active, k) for k in range(self.asks)])
            return active

    assert bare(samples=[Sample(2), Sample(2), Sample(3)])._builds(6) == [6, 6, 6]
    assert told == [[True, False], [True, False], [True, False, False]], "a choice that the first did not have is no"


def test_inputs_are_described_without_what_is_in_them():
    tensor = torch.arange(24.0).view(4, 6)[:, ::2]
    for found, sizes, strides in (
        (described(tensor), (4, 3), (6, 2)),
        (described(tensor, (4, 5), (10, 2)), (4, 5), (10, 2)),
        (described(tensor, (4, 5)), (4, 3), (6, 2)),
    ):
        assert (found.shape, found.stride(), found.dtype, found.device.type) == (sizes, strides, tensor.dtype, "meta")
