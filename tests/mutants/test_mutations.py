"""The generator of mutants: what it makes is Python, has names of its own, and is the same for the same seed."""

from __future__ import annotations

import ast

import forked
import nearest
from equivalents import EQUIVALENT
from mutations import DECISIONS, FIRST, ROOT, all_mutants, sample

MUTANTS = all_mutants()


def test_mutants_are_other_modules():
    drawn = sample(MUTANTS, 200, 0)
    for mutant in drawn:
        assert ast.dump(ast.parse(mutant.source)) != ast.dump(ast.parse((ROOT / mutant.path).read_text())), mutant.name
    lines = [(mutant.source.count("\n"), (ROOT / mutant.path).read_text().count("\n")) for mutant in drawn]
    assert sum(one == other for one, other in lines) > 180, "what follows keeps its line"


def test_lines_are_where_the_change_begins():
    for mutant in sample(MUTANTS, 60, 0):
        before, after = (ROOT / mutant.path).read_text().splitlines(), mutant.source.splitlines()
        first = next(i for i, (old, new) in enumerate(zip(before, after, strict=False)) if old != new)
        assert first + 1 == mutant.line, mutant.name


def test_a_copy_of_the_library_has_the_repository_s_files(monkeypatch):
    """On a machine where nothing is installed, a copy stands on the path."""
    forked.repository_path.cache_clear()
    monkeypatch.setattr(forked, "_package", lambda: "/copy/ras_compile")
    path = forked.repository_path
    assert path("/copy/ras_compile/passes/rules/attention.py") == "passes/rules/attention.py"
    assert path("/copy/ras_compile/plans/plan.py") == "ras_compile/plans/plan.py"
    assert path(str(ROOT / "kernels/tiles.py")) == "kernels/tiles.py"
    assert path("/copy/torch/fx.py") == path("<string>") == ""
    forked.repository_path.cache_clear()


def test_the_nearest_tests_come_first_and_the_others_as_time_allows():
    tests = nearest.Nearest.__new__(nearest.Nearest)
    function = ("passes/rules/views.py", "one")
    tests.seconds = {"tests/a.py::long": 29.0, "tests/x/test_views.py::own": 2.0, "tests/b.py::short": 1.0}
    tests.seconds |= {"tests/fuzz/test_fuzz.py::first": 30.5, "tests/c.py::other": 0.1}
    tests.reached = {name: {function} for name in tests.seconds}
    tests.reached["tests/c.py::other"] = {("passes/rules/views.py", "another")}
    near, further = tests.to(*function, further=35)
    assert list(near.seconds) == ["tests/x/test_views.py::own", "tests/b.py::short"]
    assert list(further.seconds) == ["tests/fuzz/test_fuzz.py::first"]
    assert list(tests.to(*function, further=60)[1].seconds) == ["tests/fuzz/test_fuzz.py::first", "tests/a.py::long"]
    assert list(tests.to("passes/rules/views.py", "none", 9)[0].seconds)[:2] == [*near.seconds][:1] + [
        "tests/c.py::other"
    ]
    assert not tests.to("passes/other.py", "one", 9)[0].seconds


def test_names_tell_them_apart():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) > 1500


def test_a_seed_is_one_sample():
    first, again, other = (sample(MUTANTS, 80, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert {mutant.kind for mutant in first} == set(DECISIONS)
    assert all(any(mutant.name.startswith(name) for mutant in first) for name in FIRST)


def test_equivalents_are_still_there():
    """A reason for what is no longer generated is taken out."""
    assert EQUIVALENT.keys() <= {mutant.name for mutant in MUTANTS}
