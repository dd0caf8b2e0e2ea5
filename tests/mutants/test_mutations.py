"""The generator of mutants: what it makes is Python, has names of its own, and is the same for the same seed."""

from __future__ import annotations

import ast

from equivalents import EQUIVALENT
from mutations import DECISIONS, FIRST, ROOT, all_mutants, sample

MUTANTS = all_mutants()


def test_mutants_are_other_modules():
    drawn = sample(MUTANTS, 200, 0)
    for mutant in drawn:
        assert ast.dump(ast.parse(mutant.source)) != ast.dump(ast.parse((ROOT / mutant.path).read_text())), mutant.name
    lines = [(mutant.source.count("\n"), (ROOT / mutant.path).read_text().count("\n")) for mutant in drawn]
    assert sum(one == other for one, other in lines) > 180, "what follows keeps its line"


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
