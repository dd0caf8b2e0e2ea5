"""The spec holds after every pass, for few, for some and for all active rows, with and without fused ops and outlined blocks."""

from __future__ import annotations

import copy

import handwritten
import pytest
import torch
from contract import Subject, by_model, subject
from zoo import redraw

from ras_compile.errors import SpecViolation
from ras_compile.passes import pipeline
from ras_compile.passes.fusion.scatter import Fusion
from ras_compile.passes.lowering.interpolate import interpolate
from ras_compile.passes.pipeline import for_all_lengths, prepare
from ras_compile.passes.programs.program import dense_program, sparse_program
from ras_compile.passes.spec import legal, memory
from ras_compile.passes.spec.demand import demand

MODELS = [
    "base",
    "video with attention over space and over time",
    "convolutional head",
    "registers on both sides",
    "windows",
]


def made(name: str) -> Subject:
    case = handwritten.MODELS[name]
    torch.manual_seed(0)
    return subject(redraw(case.build()).eval(), case.inputs(), exact=False)


def yes(*given) -> bool:
    return True


@pytest.mark.zoo
@pytest.mark.parametrize("name", by_model(MODELS))
@pytest.mark.parametrize("context", ["fresh", "frozen"])
def test_after_every_pass(name: str, context: str, monkeypatch):
    case = made(name)
    plan = (case if context == "fresh" else case.frozen).plan
    tokens, seen = case.frame.tokens, []
    check = legal.check_program
    monkeypatch.setattr(
        legal, "check_program", lambda program, done, *more: seen.append(list(done)) or check(program, done, *more)
    )
    for active in (1, tokens // 4, tokens):
        for together in (True, False):
            program = sparse_program(plan.analysis, active, plan.sparse)
            fusion = Fusion(tokens, dtypes=(torch.float32,), grouped=lambda *given, together=together: together)
            prepare(program, fusion=fusion, few_rows=yes, outline_blocks=together)
    prepare(dense_program(plan.analysis, plan.sparse), fusion=None, few_rows=yes, outline_blocks=True)
    longest = max(seen, key=len)
    assert [done for done in seen if done == longest[: len(done)]], "from the beginning"
    lowered = ["few rows", "in place", "functional", "share", "outline"]
    assert longest == ["scatter", "gather", "attention", *lowered]


def test_programs_for_all_lengths_are_checked(monkeypatch):
    case = made("base")
    built = [prepare_plain(case) for _ in range(3)]
    seen = []
    check = legal.check_program
    monkeypatch.setattr(
        legal, "check_program", lambda program, done, *more: seen.append(list(done)) or check(program, done, *more)
    )
    for_all_lengths(built, [(4,), (5,), (6,)], outline_blocks=True)
    assert seen[-1] == ["in place", "matrices", "functional", "share", "outline"]
    interpolate(built, [(4,), (5,), (6,)])


def prepare_plain(case: Subject):
    program = sparse_program(case.plan.analysis, 6, case.plan.sparse)
    return prepare(program, fusion=None, few_rows=None, outline_blocks=False)


@pytest.mark.violates
def test_a_violation_names_the_pass(monkeypatch):
    """A pass that breaks the program is stopped at once, and told by its name."""
    case = made("base")
    program = sparse_program(case.plan.analysis, 6, case.plan.sparse)

    def broken(given):
        (put, *_) = given.graph.find_nodes(op="call_function", target=torch.ops.aten.index_put_.default)
        given.graph.erase_node(put)
        given.graph.eliminate_dead_code()

    with pytest.raises(SpecViolation, match="after the pass broken: .* never written"):
        pipeline.run(program, [pipeline.Pass("broken", broken)])


def test_a_program_that_was_checked_when_it_was_built_is_not_looked_at_again(monkeypatch):
    plan = made("base").plan
    dense, sparse = (
        plan.dense_graph(),
        plan.sparse_graph(6),
    )  # a quarter of the tokens: one of those that prove the plan
    looked: list = []
    monkeypatch.setattr(legal, "check_values", lambda graph, known: looked.append(graph))
    pipeline.run(dense, [])
    pipeline.run(sparse, [])
    assert not looked
    pipeline.run(plan.sparse_graph(6), [])
    assert len(looked) == 1, "built anew"


@pytest.mark.violates
def test_a_pass_that_does_nothing_is_held_to_what_it_should_leave(monkeypatch):
    """What all passes keep is looked at where something has changed alone, and what this one leaves behind in any case."""
    program = prepare_plain(made("base"))
    monkeypatch.setattr(legal, "check_values", lambda graph, known: looked.append(graph))
    monkeypatch.setitem(
        legal.LEFT, "idle", lambda graph: demand(False, next(iter(graph.nodes)), "is not what it should be")
    )
    looked: list = []
    with pytest.raises(SpecViolation, match="after the pass idle: .* is not what it should be"):
        pipeline.run(program, [pipeline.Pass("idle", lambda given: None)])
    assert looked == [program.graph]  # before the pass


@pytest.mark.violates
def test_a_node_that_a_pass_left_alone_is_run_again_where_its_operand_changed():
    def narrow(program: torch.fx.GraphModule) -> None:
        weight = program.graph.find_nodes(op="placeholder")[0]
        (user, *_) = weight.users
        with weight.meta["val"].fake_mode:
            weight.meta["val"] = weight.meta["val"].half()
        changed.append(user.name)

    changed: list[str] = []
    with pytest.raises(SpecViolation, match="after the pass narrow") as found:
        pipeline.run(prepare_plain(made("base")), [pipeline.Pass("narrow", narrow)])
    assert changed[0] in str(found.value)


def test_without_the_switch_nothing_is_checked(monkeypatch):
    case = made("base")
    monkeypatch.setattr(legal, "EVERY_PASS", False)
    monkeypatch.setattr(legal, "check_program", lambda *given: pytest.fail("checked"))
    prepare_plain(case)


def test_draws_name_every_token_where_they_are_few():
    case = made("base")
    tokens = case.frame.tokens
    for active in (1, tokens // 4, tokens // 4 + 1, tokens):
        program = sparse_program(case.plan.analysis, active, case.plan.sparse)
        (rows,) = [node for node in program.graph.nodes if node.name == "rows"]
        found, everything = memory.draws(rows)
        assert all(tuple(draw.shape) == (case.frame.samples, active) for draw in found)
        assert all(len(set(sample)) == active for draw in found for sample in draw.tolist())
        named = {int(token) for draw in found for token in draw.flatten()}
        assert everything == (active > 1) and (not everything or named == set(range(tokens)))
        assert {0, tokens - 1} <= named, "the first and the last row are always among them"


def test_the_passes_stand_in_one_list():
    """The list can be looked at without running it."""
    passes = pipeline.fused(Fusion(4), yes, cuda=True)
    names = ["activation", "scatter", "gather", "attention", "few rows", "in place", "hosted"]
    assert [step.name for step in passes] == names
    assert not [
        step.name for step in pipeline.fused(None, None, cuda=False) if step.applies and step.name != "in place"
    ]
    assert copy.copy(passes[0]).applies
