"""Alone, a latent must be made of what the model returned: what diffusers' solvers make is, whatever their order."""

import diffusers
import pytest
import torch
from schedulers import SCHEDULERS
from torch import Tensor

from ras_compile.sampling.inference import latent_is_made_of

ADD_NOISE = {"EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "SASolverScheduler", "LCMScheduler",
             "TCDScheduler", "DDPMScheduler"}  # fmt: skip
NO_CLIPPING = {"DDIMScheduler": {"clip_sample": False}}


def answer(latent: Tensor, weights: Tensor, branch: int) -> Tensor:
    """A model [1, N, 1, C] -> [1, N, 1, C] that is not linear; two branches of guidance."""
    return torch.tanh(latent @ weights * (1 + 0.1 * branch)) + 0.5 * latent / (1 + latent.square().mean())


def latents(name: str, guided) -> list[bool]:
    """For each latent behind the first one of a run: whether it can be made of what came before."""
    scheduler = getattr(diffusers, name)(**SCHEDULERS[name], **NO_CLIPPING.get(name, {}))
    scheduler.set_timesteps(20)
    weights, start = torch.randn(2, 64, 64, dtype=torch.double) / 8, torch.randn(1, 16, 1, 64, dtype=torch.double)
    latent, before, found = start * float(getattr(scheduler, "init_noise_sigma", 1.0)), [], []
    for time in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latent, time) if hasattr(scheduler, "scale_model_input") else latent
        if before:
            found.append(latent_is_made_of(scaled, before[-4:], 1e-7))
        cond, uncond = (answer(scaled, weights[0], branch) for branch in range(2))
        before.append([(scaled, cond), (scaled, uncond)])
        latent = scheduler.step(guided(cond, uncond), time, latent, return_dict=False)[0]
    return found


def rescaled(cond: Tensor, uncond: Tensor) -> Tensor:
    """Guidance that is brought back to the norm of the conditional prediction token by token, as Qwen-Image does it."""
    guided = uncond + 4 * (cond - uncond)
    return guided * cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize(
    "guided", [lambda cond, uncond: uncond + 4 * (cond - uncond), rescaled], ids=["plain", "rescaled"]
)
@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - ADD_NOISE))
def test_what_a_solver_makes_continues(name, guided):
    assert all(latents(name, guided))


@pytest.mark.parametrize("kind", ["fresh", "other noise", "same noise", "same latent"])
def test_what_no_solver_makes_does_not(kind):
    clean, noise = torch.randn(2, 1, 16, 1, 64, dtype=torch.double)
    weights, before = torch.randn(64, 64, dtype=torch.double) / 8, []
    for step in range(12):
        level = 1 - step / 12
        if kind != "same noise":
            noise = torch.randn_like(noise)
        latent = {"fresh": noise, "same latent": clean}.get(kind, (1 - level) * clean + level * noise)
        if before:
            assert not latent_is_made_of(latent, before[-4:], 1e-7)
        before.append([(latent, answer(latent, weights, 0))])


def test_tokens_that_are_put_back_and_times_of_their_own():
    """Inpainting puts half of the tokens back; a first frame that is given does not move."""
    weights = torch.randn(64, 64, dtype=torch.double) / 8
    for kind in ("put back", "still"):
        clean, noise = torch.randn(2, 1, 32, 1, 64, dtype=torch.double)
        latent, before = noise, []
        for step in range(12):
            if before:
                assert latent_is_made_of(latent, before[-4:], 1e-7), (kind, step)
            before.append([(latent, answer(latent, weights, 0))])
            level = 1 - (step + 1) / 12
            moved = latent - before[-1][0][1] / 12
            back = (1 - level) * clean + level * noise if kind == "put back" else noise
            latent = torch.cat([back[:, :14], moved[:, 14:]], 1)
