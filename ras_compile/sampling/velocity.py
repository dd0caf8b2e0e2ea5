"""The form in which a prediction changes least: the velocity of the straight line from the clean sample to the noise.

With `sample = alpha * x0 + sigma * noise`, a token that is settled keeps its x0 and its noise, and with them

    u = noise - x0

What the model returns need not stay as it is. A v-prediction, `alpha * noise - sigma * x0` (Salimans and Ho, 2022), turns from the
noise to -x0 in the course of a run, for settled tokens as for all others: its change says little of which tokens change,
and a token that holds it falls behind. Drift and lines are therefore those of u, wherever the scheduler tells alpha and sigma:

    u = scale * prediction + shift * sample             alpha^2 + sigma^2 = 1, as the model gets its sample

    epsilon         scale (alpha + sigma) / alpha       shift -1 / alpha
    v_prediction    scale  alpha + sigma                shift sigma - alpha
    sample          scale -(alpha + sigma) / sigma      shift 1 / sigma

What a flow predicts is u itself, and stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")  # those that change along the line
_LEAST = 1e-3  # of alpha and sigma, which are divided by


def terms(prediction: str, levels: Sequence[float]) -> list[tuple[float, float]]:
    """Scale and shift at each of a run's noise levels, sigma / (alpha + sigma).

    Args:
        prediction: one of `PREDICTIONS`.
        levels: in [0, 1].
    """
    found = []
    for level in levels:
        norm = (level**2 + (1 - level) ** 2) ** 0.5
        alpha, sigma = max((1 - level) / norm, _LEAST), max(level / norm, _LEAST)
        if prediction == "epsilon":
            found.append(((alpha + sigma) / alpha, -1 / alpha))
        elif prediction == "v_prediction":
            found.append((alpha + sigma, sigma - alpha))
        else:
            found.append((-(alpha + sigma) / sigma, 1 / sigma))
    return found


def velocity(*given: Any) -> tuple[Tensor]:
    """``(u,)``, float32 [B, N, P, C], that of inactive tokens as it was when they were last computed.

    Args:
        given: the prediction and the sample [B, N, P, C]; u after the call before; the active tokens, bool [B, N]; scale and
            shift, float32 [2].
    """
    prediction, sample, last, active, (scale, shift) = given
    found = scale * prediction.float() + shift * sample.float()
    return (torch.where(active[..., None, None], found, last),)


def predicted(*given: Any) -> tuple[Tensor]:
    """``(prediction,)`` that a call returns: of inactive tokens the one that u and their present sample imply.

    Args:
        given: the prediction, of active tokens as computed; the sample and u; the active tokens; scale and shift, as above.
    """
    prediction, sample, u, active, (scale, shift) = given
    implied = (u - shift * sample.float()) / scale
    return (torch.where(active[..., None, None], prediction, implied.to(prediction.dtype)),)
