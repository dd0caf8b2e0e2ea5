"""What a diffusers scheduler's prediction says of the clean sample: `x0 = a * sample + b * prediction`, step by step.

With `sample = alpha * x0 + sigma * noise` and n^2 = alpha^2 + sigma^2:

    epsilon             predicts the noise            a = 1 / alpha       b = -sigma / alpha
    v_prediction        (alpha noise - sigma x0) / n  a = alpha / n^2     b = -sigma / n
    flow_prediction     noise - x0, alpha = 1 - sigma a = 1               b = -sigma
    sample              predicts x0                   a = 0               b = 1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ras_compile.errors import ConfigError
from ras_compile.pipelines._diffusers import alpha_and_sigma, begin_step
from ras_compile.sampling import velocity

PREDICTIONS = ("epsilon", "v_prediction", "flow_prediction", "sample")

# How a scheduler tells alpha and sigma of its present step. Those that evaluate the model between two entries of
# `sigmas` (KDPM2, DPMSolverSDE) or precondition its output (EDM) are not among them.
SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": "flow",
    "FlowMatchHeunDiscreteScheduler": "flow",
    "FlowMatchLCMScheduler": "flow",
    "LTXEulerAncestralRFScheduler": "flow",
    "DPMSolverMultistepScheduler": "own",
    "DPMSolverSinglestepScheduler": "own",
    "UniPCMultistepScheduler": "own",
    "DEISMultistepScheduler": "own",
    "SASolverScheduler": "own",
    "EulerDiscreteScheduler": "exploding",
    "EulerAncestralDiscreteScheduler": "exploding",
    "HeunDiscreteScheduler": "exploding",
    "LMSDiscreteScheduler": "exploding",
    "DDIMScheduler": "preserving",
    "DDPMScheduler": "preserving",
    "PNDMScheduler": "preserving",
    "LCMScheduler": "preserving",
    "TCDScheduler": "preserving",
    "CogVideoXDDIMScheduler": "preserving",
    "CogVideoXDPMScheduler": "preserving",
}


def _family(scheduler: Any) -> str | None:
    return next((SCHEDULERS[kind.__name__] for kind in type(scheduler).__mro__ if kind.__name__ in SCHEDULERS), None)


def _prediction(scheduler: Any) -> str:
    return "flow_prediction" if _family(scheduler) == "flow" else scheduler.config.prediction_type


def _of_sigmas(scheduler: Any, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Alpha and sigma of entries of a scheduler's `sigmas`."""
    family = _family(scheduler)
    if family == "own":
        return alpha_and_sigma(scheduler, sigma)
    return 1 - sigma if family == "flow" else torch.ones_like(sigma), sigma


def check_clean(scheduler: Any) -> None:
    """Refuse what `clean_coefficients` knows nothing of.

    Raises:
        ConfigError: another scheduler or another prediction; the text lists those that can be used.
    """
    if _family(scheduler) is None:
        raise ConfigError(
            f"option noise_reuse='x0' cannot tell the clean sample of {type(scheduler).__name__}; it takes "
            f"{', '.join(SCHEDULERS)}."
        )
    if _prediction(scheduler) not in PREDICTIONS:
        raise ConfigError(
            f"option noise_reuse='x0' takes a prediction_type of {', '.join(PREDICTIONS)}, not "
            f"{_prediction(scheduler)!r}."
        )


def clean_coefficients(scheduler: Any, timestep: Any, index: int | None = None) -> tuple[Tensor, Tensor]:
    """`a` and `b` (0-d, float32) of the prediction with which the scheduler steps.

    Args:
        scheduler: one that `check_clean` lets pass.
        index: the step's entry of `sigmas`; None: that of the step that is about to begin.
    """
    if _family(scheduler) == "preserving":
        table = scheduler.alphas_cumprod
        at = timestep.to(table.device) if isinstance(timestep, Tensor) else torch.tensor(timestep, device=table.device)
        kept = table.take(at.long().reshape(()))
        alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    else:
        if index is None and scheduler.step_index is None:  # `step` does the same in a moment
            begin_step(scheduler, timestep)
        alpha, sigma = _of_sigmas(scheduler, scheduler.sigmas[scheduler.step_index if index is None else index])
    alpha, sigma = alpha.float(), sigma.float()
    norm = (alpha**2 + sigma**2).sqrt()
    match _prediction(scheduler):
        case "epsilon":
            return 1 / alpha, -sigma / alpha
        case "v_prediction":
            return alpha / norm**2, -sigma / norm
        case "flow_prediction":
            return torch.ones_like(alpha), -sigma
    return torch.zeros_like(alpha), torch.ones_like(alpha)


def noise_levels(scheduler: Any) -> list[float]:
    """sigma / (alpha + sigma) at each of a scheduler's timesteps and at the end: 1 is noise alone, 0 none.

    Read from the device where the scheduler has its table there. Empty where the scheduler is not one of `SCHEDULERS`.
    """
    family = _family(scheduler)
    if family is None:
        return []
    if family == "preserving":
        kept = scheduler.alphas_cumprod[scheduler.timesteps.long().to(scheduler.alphas_cumprod.device)]
        alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    else:
        alpha, sigma = _of_sigmas(scheduler, scheduler.sigmas)
    levels = (sigma / (alpha + sigma)).double().tolist()
    return levels + [0.0] * (len(scheduler.timesteps) + 1 - len(levels))


def velocity_terms(scheduler: Any) -> list[tuple[float, float]]:
    """Scale and shift of the velocity that a prediction stands for, at each timestep; see `velocity.py`.

    Empty where the scheduler is not one of `SCHEDULERS`, or has the model predict the velocity itself.
    """
    if _family(scheduler) is None or _prediction(scheduler) not in velocity.PREDICTIONS:
        return []
    return velocity.terms(_prediction(scheduler), noise_levels(scheduler)[:-1])
