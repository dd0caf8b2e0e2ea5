"""What must hold of any model, told without a layout: which entries of the noise change, and which of the latent count.

1. Consistency: on the inputs of the dense step before, a sparse step gives the dense noise, whatever rows are active.
2. Identity: with all rows active, new inputs give the model's own noise.
3. Locality: two halves of the rows change two halves of the noise, and what the other half's entries of the latent hold
   makes no difference, bit for bit.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from random_models import RandomModel, Recipe, random_recipe
from torch import Tensor

from ras_compile.capture.export import export
from ras_compile.capture.inputs import GraphInput
from ras_compile.config import RASConfig
from ras_compile.errors import UnsupportedGraph
from ras_compile.plans.plan import Plan
from ras_compile.sampling.branches import Slots

TIGHT = 1e-9
CONFIG = {"inner_backend": "eager", "unsupported": "error", "latent": "latent", "cuda_graphs": False}


@dataclass(frozen=True)
class Verdict:
    """What became of one model: ``kind`` is "right", "wrong", "refused" or "crashed"."""

    kind: str
    reason: str = ""
    share: float = 1.0  # of all tokens, how many the region has

    @property
    def failed(self) -> bool:
        return self.kind in ("wrong", "crashed")


def judged(recipe: Recipe) -> Verdict:
    """Builds the model of a recipe, compiles it, and holds it to the laws."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return _judged(recipe)
    except UnsupportedGraph as error:
        return Verdict("refused", str(error))
    except Exception as error:  # of any kind: it is ours
        return Verdict("crashed", f"{type(error).__name__}: {str(error)[:300]}")


def _judged(recipe: Recipe) -> Verdict:
    model = RandomModel(recipe)
    given = model.inputs()
    try:
        model(*given)
    except (RuntimeError, ValueError, IndexError) as error:
        return Verdict("no model", str(error))
    model.drawn = True
    values = [*given, *model.weights]
    names = ["latent", "timestep", "text", *(f"weight {index}" for index in range(len(model.weights)))]
    inputs = [GraphInput(name, name) if index < 3 else GraphInput(None, name, True) for index, name in enumerate(names)]

    class Bound(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor]:
            return (model(*tensors),)

    captured = export(Bound(), values, names)
    plan = Plan(captured, inputs, values, RASConfig.from_options(CONFIG))
    frame = plan.analysis.frame
    share = frame.tokens / model.tokens

    def sparse(latent: Tensor, rows: Tensor, caches: list[Tensor]) -> Tensor:
        slots = {"caches": [cache.clone() for cache in caches]}
        return plan.run_sparse([latent, *values[1:]], rows, slots)[0]

    slots = Slots()
    dense = plan.dense(values, slots)[0]
    caches = [cache.clone() for cache in slots["caches"]]
    wanted = model(*values)
    if off(dense, wanted) > TIGHT:
        return Verdict("wrong", f"the dense program is off by {off(dense, wanted):.2g}", share)
    generator = torch.Generator().manual_seed(3)
    order = torch.stack([torch.randperm(frame.tokens, generator=generator) for _ in range(frame.samples)])
    for active in {1, (frame.tokens + 1) // 2, max(1, frame.tokens - 1)}:
        found = sparse(values[0], order[:, :active].sort(-1).values, caches)
        if off(found, dense) > TIGHT:
            return Verdict("wrong", f"consistency is off by {off(found, dense):.2g} at {active} rows", share)
    latent = values[0] + torch.randn(values[0].shape, generator=generator, dtype=torch.float64)
    found, fresh = sparse(latent, order.sort(-1).values, caches), model(latent, *values[1:])
    if off(found, fresh) > TIGHT:
        return Verdict("wrong", f"identity is off by {off(found, fresh):.2g}", share)
    if frame.tokens == 1:
        return Verdict("right", share=share)
    half = frame.tokens // 2
    parts = [rows.sort(-1).values for rows in (order[:, :half], order[:, half:])]
    here, there = (sparse(latent, rows, caches) for rows in parts)
    mine, theirs = here != dense, there != dense
    if bool((mine & theirs).any()) or not bool((mine | theirs).float().mean() > 0.9):
        return Verdict("wrong", "two halves of the rows do not change two halves of the noise", share)
    # Written into a copy, which has the strides of the latent: `torch.where` takes those of the noise, and a product of the
    # same numbers in other strides may add them in another order.
    elsewhere = latent.clone()
    elsewhere[theirs & ~mine] += 1
    if not torch.equal(sparse(elsewhere, parts[0], caches), here):
        return Verdict("wrong", "a sparse step reads patches that are not active", share)
    return Verdict("right", share=share)


def off(found: Tensor, wanted: Tensor) -> float:
    """max|a - b| / max|b|."""
    if not bool(torch.isfinite(wanted).all()):
        return 0.0
    return (
        float((found - wanted).abs().max() / wanted.abs().max()) if bool(torch.isfinite(found).all()) else float("inf")
    )


def smallest(recipe: Recipe, verdict: Verdict) -> Recipe:
    """A recipe that fails in the same way, from which no block can go and no number can become zero."""

    def fails(other: Recipe) -> bool:
        found = judged(other)
        return found.kind == verdict.kind and found.reason.split(" ")[:3] == verdict.reason.split(" ")[:3]

    smaller = True
    while smaller:
        smaller = False
        for other in simpler(recipe):
            if fails(other):
                recipe, smaller = other, True
                break
    return recipe


def simpler(recipe: Recipe) -> list[Recipe]:
    """Recipes with a block less, or with one number made zero."""
    without = [Recipe(recipe.frame, recipe.blocks[:k] + recipe.blocks[k + 1 :]) for k in range(len(recipe.blocks))]
    if len(recipe.blocks) == 1:
        without = []
    zeros = [
        Recipe(recipe.frame[:k] + (0,) + recipe.frame[k + 1 :], recipe.blocks)
        for k, number in enumerate(recipe.frame)
        if number
    ]
    for index, (name, numbers) in enumerate(recipe.blocks):
        for k, number in enumerate(numbers):
            if number:
                changed = (name, numbers[:k] + (0,) + numbers[k + 1 :])
                zeros.append(Recipe(recipe.frame, recipe.blocks[:index] + (changed,) + recipe.blocks[index + 1 :]))
    return without + zeros


def of_seed(seed: int) -> Verdict:
    return judged(random_recipe(seed))
