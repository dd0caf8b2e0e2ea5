"""Predictions that turn in the course of a run are followed in the form in which a settled token's stays as it is."""

import math

import pytest
import torch

from ras_compile.sampling.velocity import PREDICTIONS, predicted, terms, velocity

LEVELS = (0.99, 0.7, 0.4, 0.1)


def settled(
    prediction: str, level: float, clean: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prediction and sample of tokens that keep their clean sample and their noise."""
    norm = math.hypot(level, 1 - level)
    alpha, sigma = (1 - level) / norm, level / norm
    return {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean}[prediction], (
        alpha * clean + sigma * noise
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_settled_token_keeps_its_velocity(prediction):
    """It is noise - x0 at every noise level, and of what is held the present prediction is made."""
    clean, noise = torch.randn(2, 1, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    everything, nothing = torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 5, dtype=torch.bool)
    pairs = torch.tensor(terms(prediction, LEVELS))
    first, sample = settled(prediction, LEVELS[0], clean, noise)
    (held,) = velocity(first, sample, torch.zeros_like(first), everything, pairs[0])
    for level, pair in zip(LEVELS, pairs, strict=True):
        now, sample = settled(prediction, level, clean, noise)
        torch.testing.assert_close(
            velocity(now, sample, held, everything, pair)[0], noise - clean, atol=1e-3, rtol=1e-3
        )
        assert torch.equal(velocity(first * torch.nan, sample, held, nothing, pair)[0], held)
        torch.testing.assert_close(predicted(first, sample, held, nothing, pair)[0], now, atol=1e-3, rtol=1e-3)
        assert torch.equal(predicted(now, sample, held, everything, pair)[0], now)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_ends_of_a_run_are_finite(prediction):
    """At noise alone (a terminal signal-to-noise ratio of zero) and at none, the two ways still undo one another."""
    for pair in torch.tensor(terms(prediction, (1.0, 0.0))):
        assert pair.isfinite().all() and pair[0] != 0
        given, sample = torch.randn(2, 1, 5, 4, 3, generator=torch.Generator().manual_seed(0))
        everything = torch.ones(1, 5, dtype=torch.bool)
        (found,) = velocity(given, sample, torch.zeros_like(given), everything, pair)
        torch.testing.assert_close(predicted(sample, sample, found, ~everything, pair)[0], given, atol=1e-3, rtol=1e-3)
