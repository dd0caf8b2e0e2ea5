"""Families of plans: which calls share one, at which lengths it is planned, and what its members share and give up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import fx

from ras_compile import notices
from ras_compile.capture.inputs import GraphInput
from ras_compile.config import RASConfig
from ras_compile.errors import SpecViolation, UnsupportedGraph
from ras_compile.passes.lowering.interpolate import NotAffine
from ras_compile.plans import family
from ras_compile.plans.family import FAMILIES, KEPT, Families, Family, Member, described


def bare(**parts) -> Family:
    """A family with these parts alone."""
    made = Family.__new__(Family)
    vars(made).update(parts)
    return made


def test_a_family_is_made_once_for_what_calls_have_in_common(monkeypatch):
    made: list[tuple] = []

    def make(self, key, lengths, values, config):
        made.append(key)
        rest = values[1] % 2
        grid = SimpleNamespace(takes=lambda length: length % 2 == rest)
        return None if values[0] == "refused" else SimpleNamespace(member=lambda values: (key, values[1]), grid=grid)

    lengths = SimpleNamespace(key_without_lengths=lambda values, users: values[0], at=lambda values: values[1])
    monkeypatch.setattr(
        family.Lengths, "of", lambda graph, inputs, values, numbers, region: lengths if values else None
    )
    monkeypatch.setattr(Families, "make", make)
    families, config = Families(None, [], []), RASConfig()
    assert families.plan([], config, []) is None and not made, "there are no lengths"
    assert families.plan(["a", 5], config, []) == (("a", None), 5)
    assert families.plan(["a", 7], config, []) == (("a", None), 7) and len(made) == 1
    assert families.plan(["a", 7], config, [], fixed=1) == (("a", 1), 7), "other numbers among the weights"
    families.plan(["a", 7], RASConfig.from_options({"region": slice(0, 4)}), [])
    assert len(made) == 3, "another region"
    assert families.plan(["refused", 7], config, []) is families.plan(["refused", 8], config, []) is None
    assert len(made) == 4
    assert families.plan(["a", 8], config, []) == families.plan(["a", 8], config, []) and len(made) == 5, "another rest"
    for number in range(FAMILIES):
        families.plan([number, 7], config, [])
    assert len(made) == FAMILIES and families.plan([FAMILIES, 7], config, []) is None


class Sample:
    """Stands for a plan; ``spliced`` tells how many values it splices at some lengths."""

    spliced = staticmethod(lambda lengths: 3)
    made: list[tuple] = []

    def __init__(self, graph, inputs, values, config, *, proved):
        self.latent, self.noise = 1, 0
        self.sparse = SimpleNamespace(splices=[0] * self.spliced(graph), frozen=[], live=self.is_live)
        Sample.made.append((graph, config, proved, [getattr(value, "shape", value) for value in values]))

    is_live, packed = True, False

    def dense_graph(self):
        program = fx.Graph()
        program.output(())
        return SimpleNamespace(graph=program)

    def caches_among(self, results):
        return [torch.empty(2, 3)]


@pytest.fixture
def family_of(monkeypatch):
    """Makes a family of one length, 8 now, of the second input's rows, which the third input is the number of."""
    monkeypatch.setattr(family, "Plan", Sample)
    monkeypatch.setattr(family, "interpolate", lambda programs, points: None)
    monkeypatch.setattr(Sample, "made", [])

    def make(sizes=(0, 2), **options):
        lengths = SimpleNamespace(
            sizes=dict.fromkeys(sizes),
            allows=lambda point: True,
            described=lambda index, point: ((*point, 4), (4, 1)),
            number=lambda index, point: 10 * point[0],
            at=lambda values: (8,),
            sides=(0,),
        )
        graph = SimpleNamespace(lengths=lengths, holds=lambda point: True, at=lambda point: point)
        graph.cuts = graph.sizes_at = graph.largest = lambda point: []
        graph.cut = [False]
        inputs = [GraphInput(name, name) for name in ("text", "latent", "count")]
        return Family(graph, inputs, [torch.ones(8, 4), torch.ones(2, 6), 8], RASConfig.from_options(options))

    return make


@pytest.mark.parametrize(("live", "context"), [(True, "frozen"), (False, "fresh")])
def test_a_family_is_proved_at_each_of_its_points(family_of, monkeypatch, live, context):
    """All look for the same latent, and none runs; where the first context cannot be frozen, the others are fresh, too."""
    monkeypatch.setattr(Sample, "is_live", live)
    made = family_of(context="frozen", cuda_graphs=True, latent=None)
    points, configs, proved, values = zip(*Sample.made, strict=True)
    assert list(points) == made.points == [(8,), (7,), (4,)]
    assert not any(proved) and not any(config.cuda_graphs for config in configs)
    assert [(config.latent, config.context) for config in configs] == [(None, "frozen"), *[("latent", context)] * 2]
    assert [list(each) for each in values] == [[(n, 4), (2, 6), 10 * n] for n in (8, 7, 4)]
    assert made.exact((7,)) and Sample.made[-1][2] is True, "what is made later was proved here"
    assert made.cache_bytes((7,)) == 2 * 3 * 4
    made.entering(SimpleNamespace())
    assert len(made.members) == 1


def test_programs_that_are_of_no_one_form_are_no_family(family_of, monkeypatch):
    def interpolate(programs, points):
        raise NotAffine(f"{len(programs)} programs at {len(points)} points")

    monkeypatch.setattr(family, "interpolate", interpolate)
    with pytest.raises(NotAffine, match="3 programs at 3 points"):
        family_of()


def test_a_latent_whose_size_is_a_length_has_no_family(family_of, monkeypatch):
    """Unless that is the number of its tokens."""
    with pytest.raises(UnsupportedGraph, match="the latent's size"):
        family_of(sizes=(0, 1))
    monkeypatch.setattr(Sample, "packed", True)
    assert family_of(sizes=(0, 1)).grows and not family_of().grows


def test_other_values_spliced_at_another_length_are_no_family(family_of, monkeypatch):
    monkeypatch.setattr(Sample, "spliced", staticmethod(lambda lengths: 3 if lengths == (8,) else 2))
    with pytest.raises(UnsupportedGraph, match="other values are spliced"):
        family_of()


def test_members_that_ran_long_ago_give_up_what_they_keep():
    made, gone = bare(members=[], lock=family.threading.RLock()), []
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
    assert gone == [1, 2] and made.members == [members[number] for number in (3, 0, KEPT, KEPT + 1)]


def test_a_member_is_of_the_lengths_that_the_graph_is_right_for(monkeypatch):
    monkeypatch.setattr(family, "Member", lambda made, point, values: point)
    lengths = SimpleNamespace(at=lambda values: (len(values),), fits=lambda values, point: values[0] == "fits")
    grid = SimpleNamespace(fits=lambda point: point != (3,), point_at=lambda lengths: lengths)

    def check(member):
        if member == (1, 1):
            raise NotAffine("its own programs are others")

    graph = SimpleNamespace(lengths=lengths, holds=lambda point: point != (2,), orders=False)
    made = bare(graph=graph, grid=grid, grows=True, check=check)
    assert made.member(["fits"]) == (1,) and made.member(["fits not"]) is made.member(["fits", 0]) is None
    assert made.member(["fits", 0, 0]) is None, "the points say something else"
    grid.point_at = lambda lengths: (1, 1)
    assert made.member(["fits"]) is None
    made.grows = False
    assert made.member(["fits"]) == (1, 1), "nothing depends on an order"
    graph.orders = True
    assert made.member(["fits"]) is None


def test_a_program_is_shared_where_it_fits_and_each_has_its_own_where_none_can_be():
    shared = []

    def share(active, point, inputs):
        shared.append(active)
        if active == "refused":
            raise RuntimeError("the inner compiler takes no symbols")
        if active == "broken":
            raise SpecViolation("never passed over")
        return SimpleNamespace(fits=lambda point, inputs: point != (3,), compiled=lambda *given: given)

    made = bare(programs={}, share=share, grows=False)
    for point in ((5,), (7,)):
        program = made.program(4, point, [])
        assert program is not None and program("x") == (*point, "x")
    assert made.program(4, (3,), []) is None and shared == [4]
    notices.reset()
    assert made.program("refused", (5,), []) is made.program("refused", (7,), []) is None
    assert shared == [4, "refused"] and [found.count for found in notices.fallbacks()] == [1]
    with pytest.raises(SpecViolation):
        made.program("broken", (5,), [])


def test_where_tokens_are_a_length_the_active_rows_are_one_too():
    """One program for all numbers of rows; a size of one is another program."""

    def share(active, point, inputs):
        return SimpleNamespace(fits=lambda point, inputs: True, compiled=lambda *given: (active, *given))

    made = bare(programs={}, grows=True, share=share)
    assert made.program(1, (5,), []) is None and not made.programs
    for active in (3, 4):
        program = made.program(active, (5,), [])
        assert program is not None and program("x") == (3, 5, active, "x")
    dense = made.program("dense", (5,), [])
    assert dense is not None and dense("x") == ("dense", 5, "x") and list(made.programs) == ["sparse", "dense"]


@pytest.mark.parametrize(
    ("backend", "holds", "wanted"),
    [
        ("inductor", [(8,), (7,)], "outlined"),
        ("inductor", [(8,)], "block by block"),
        ("inductor", None, "block by block"),
        ("eager", [(8,), (7,)], "block by block"),
    ],
)
def test_blocks_are_outlined_where_that_fixes_no_length(monkeypatch, backend, holds, wanted):
    def compiled(program, base, sized, inputs):
        assert base == (8,)
        if program == "outlined" and holds is None:
            raise RuntimeError("no outlined blocks")
        symbols = SimpleNamespace(holds=lambda point: program != "outlined" or point in holds)
        return SimpleNamespace(program=program, symbols=symbols)

    def programs(builds, points, *, outline_blocks):
        return "outlined" if outline_blocks else "block by block"

    monkeypatch.setattr(family, "for_all_lengths", programs)
    sized = SimpleNamespace(fits=lambda tensor, point: point != (3,))
    made = bare(
        config=RASConfig.from_options({"inner_backend": backend}), builds=lambda samples: samples, compile=compiled,
        sized=lambda samples, inputs: [sized],
        samples_for=lambda active: [SimpleNamespace(point=point) for point in ((8,), (7,))],
    )  # fmt: skip
    notices.reset()
    assert made.share(4, (5,), [torch.ones(2)]).program == wanted
    assert len(notices.fallbacks()) == (holds is None)
    with pytest.raises(NotAffine, match="other strides"):
        made.share(4, (3,), [torch.ones(2)])


def test_a_member_builds_what_a_plan_of_its_own_would():
    member = Member.__new__(Member)
    vars(member)["exact"] = SimpleNamespace(build=lambda active, *, outline_blocks: (active, outline_blocks))
    assert member.build(4) == (4, True) and member.build("dense", outline_blocks=False) == ("dense", False)


def test_all_lengths_choose_as_the_first_does():
    """What is fused is measured once: programs of other lengths are the same but for sizes."""
    told = []

    class Asking:
        def __init__(self, asks: int) -> None:
            self.asks = asks

        def build(self, active, *, outline_blocks):
            assert not outline_blocks, "they are outlined when the lengths are symbols"
            told.append([self.chosen(lambda *ops: ops == (active, 0), active, k) for k in range(self.asks)])
            return active

    assert bare().builds([SimpleNamespace(plan=Asking(asks), active=6) for asks in (2, 2, 3)]) == [6, 6, 6]
    assert told == [[True, False], [True, False], [True, False, False]], "a choice that the first did not have is no"


def test_a_graph_is_captured_once_for_its_lengths(monkeypatch):
    """Also where it cannot be: that is found out once, told, and each length has a plan of its own."""
    captured = []

    def capture(graph, lengths, values):
        captured.append(values)
        if values != ["right"]:
            raise (SpecViolation if values == ["broken"] else RuntimeError)("no symbols")
        return "the graph"

    monkeypatch.setattr(family, "SymbolicGraph", capture)
    monkeypatch.setattr(family, "Family", lambda graph, inputs, values, config: (graph, config))
    families = Families(None, [], [])
    assert [families.make("a", None, ["right"], config) for config in (1, 2)] == [("the graph", 1), ("the graph", 2)]
    notices.reset()
    assert families.make("b", None, ["wrong"], 1) is families.make("b", None, ["wrong"], 2) is None
    assert captured == [["right"], ["wrong"]] and [found.count for found in notices.fallbacks()] == [1]
    with pytest.raises(SpecViolation):
        families.make("c", None, ["broken"], 1)


def test_inputs_are_described_without_what_is_in_them():
    tensor = torch.arange(24.0).view(4, 6)[:, ::2]
    for found, sizes, strides in (
        (described(tensor), (4, 3), (6, 2)),
        (described(tensor, (4, 5), (10, 2)), (4, 5), (10, 2)),
        (described(tensor, (4, 5)), (4, 3), (6, 2)),
    ):
        assert (found.shape, found.stride(), found.dtype, found.device.type) == (sizes, strides, tensor.dtype, "meta")


def sampled(tokens: list[int], points: list[tuple[int, ...]], *, grows: bool) -> Family:
    plans = [
        SimpleNamespace(analysis=SimpleNamespace(frame=SimpleNamespace(tokens=count)), fusion="sites")
        for count in tokens
    ]
    return bare(points=points, samples=plans, _caches=[[point] for point in points], grows=grows)


@pytest.mark.parametrize(
    ("active", "count", "other"), [(2, 2, 4), (3, 3, 2), (5, 5, 4), (7, 7, 6), (8, 7, 6), (40, 7, 6)]
)
def test_a_program_for_all_numbers_of_rows_is_made_of_three_of_them(active, count, other):
    """Of no more than the fewest tokens less one: where all are active, a program may be another."""
    points = [(8,), (10,), (12,)]
    found = sampled([8, 10, 12], points, grows=True).samples_for(active)
    assert [(one.point, one.active) for one in found] == [
        ((8, count), count), ((10, count), count), ((8, count + 1), count + 1), ((12, other), other)
    ]  # fmt: skip
    first, _, more, _ = found
    assert more.plan is not first.plan and vars(first.plan)["fusion"] == "sites" and "fusion" not in vars(more.plan)
    assert [one.caches for one in found] == [[(8,)], [(10,)], [(8,)], [(12,)]]


@pytest.mark.parametrize(
    ("tokens", "active", "enough"), [(4, 2, True), (3, 2, False), (2, 2, False), (4, 3, True), (3, 3, False)]
)
def test_too_few_tokens_tell_nothing_of_the_rows(tokens, active, enough):
    made = sampled([tokens, tokens + 1, tokens + 2], [(1,), (2,), (3,)], grows=True)
    if enough:
        assert len(made.samples_for(active)) == 4
    else:
        with pytest.raises(NotAffine, match=f"{tokens} tokens are too few"):
            made.samples_for(active)


@pytest.mark.parametrize(("grows", "active"), [(False, 4), (True, "dense"), (False, "bare")])
def test_where_rows_are_no_length_there_is_a_sample_for_each_point(grows, active):
    found = sampled([8, 10, 12], [(8,), (10,), (12,)], grows=grows).samples_for(active)
    assert [(one.point, one.active) for one in found] == [((8,), active), ((10,), active), ((12,), active)]


def test_a_violation_where_blocks_are_outlined_is_never_passed_over(monkeypatch):
    def programs(builds, points, *, outline_blocks):
        if outline_blocks:
            raise SpecViolation("outlined")

    monkeypatch.setattr(family, "for_all_lengths", programs)
    made = bare(
        config=RASConfig.from_options({"inner_backend": "inductor"}), builds=lambda samples: samples,
        samples_for=lambda active: [SimpleNamespace(point=(8,))], sized=lambda samples, inputs: [],
        compile=lambda *given: given,
    )  # fmt: skip
    notices.reset()
    with pytest.raises(SpecViolation, match="outlined"):
        made.share(4, (5,), [])
    assert not notices.fallbacks()
