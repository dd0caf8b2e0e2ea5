"""Random models under laws that know no layouts: fixed seeds, and what once failed.

``FUZZ_SEED=1000 python -m pytest tests/fuzz`` takes others, from that one on; `make fuzz` takes as many as are asked for.
"""

from __future__ import annotations

import os

import pytest
from corpus import CORPUS, SHARES
from laws import TIGHT, judged, off, simpler, smallest
from random_models import BLOCKS, RandomModel, Recipe, random_recipe

SEEDS, TOGETHER = 150, 10
FIRST = int(os.environ.get("FUZZ_SEED", "0"))


@pytest.mark.parametrize("name", CORPUS)
def test_what_once_failed_is_right(name: str):
    verdict = judged(CORPUS[name])
    assert verdict.kind == "right", verdict.reason
    assert verdict.share == SHARES.get(name, 1)


@pytest.mark.parametrize("first", range(0, SEEDS, TOGETHER))
def test_random_models_are_right_or_refused(first: int):
    verdicts = {FIRST + k: judged(random_recipe(FIRST + k)) for k in range(first, first + TOGETHER)}
    assert not {seed: verdict for seed, verdict in verdicts.items() if verdict.failed}
    assert sum(verdict.kind == "right" for verdict in verdicts.values()) >= TOGETHER // 2


@pytest.mark.parametrize("seed", range(10))
def test_a_recipe_is_one_model(seed: int):
    """Its weights are those of the first call, whenever they are given, and its noise has the latent's shape."""
    model = RandomModel(random_recipe(seed))
    given = model.inputs()
    first = model(*given)
    model.drawn = True
    assert first.shape == given[0].shape
    assert off(model(*given, *model.weights), first) < TIGHT


def test_failures_get_smaller(monkeypatch):
    """Down to the one block and the one number that matter."""
    import laws

    def fails(recipe: Recipe) -> laws.Verdict:
        bad = any(name == "across" and numbers[0] % 7 == 2 for name, numbers in recipe.blocks)
        return laws.Verdict("wrong" if bad else "right", "consistency is off")

    monkeypatch.setattr(laws, "judged", fails)
    recipe = Recipe((5,) * 16, (("mlp", (3,) * 8), ("across", (2,) * 8), ("cross", (1,) * 8)))
    assert smallest(recipe, fails(recipe)) == Recipe((0,) * 16, (("across", (2,) + (0,) * 7),))
    assert all(other != recipe for other in simpler(recipe))


def test_every_block_is_tried():
    assert {name for seed in range(FIRST, FIRST + SEEDS) for name, _ in random_recipe(seed).blocks} == set(BLOCKS)


def test_the_laws_see_a_wrong_program(monkeypatch):
    """Were batch dimensions paired by their atoms alone, consistency would tell."""
    from ras_compile.passes.rules import attention

    def by_atoms(first, second):
        return first if any(attention.atoms_of(first)) else second

    monkeypatch.setattr(attention, "paired", by_atoms)
    found = {name: judged(recipe).kind for name, recipe in CORPUS.items() if "queries" in name}
    assert "wrong" in found.values()
