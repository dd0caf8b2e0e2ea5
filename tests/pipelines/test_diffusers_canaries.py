"""What diffusers does not promise to keep, held to what is relied on: a new version fails here, by name."""

from __future__ import annotations

import diffusers
import pytest
import torch

from ras_compile.pipelines import _diffusers
from ras_compile.pipelines.samplers import SCHEDULERS

OWN = [name for name, family in SCHEDULERS.items() if family == "own" and hasattr(diffusers, name)]
OTHERS = [name for name, family in SCHEDULERS.items() if family in ("flow", "exploding") and hasattr(diffusers, name)]


def at_step(name: str, step: int):
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(num_inference_steps=6)
    return scheduler, scheduler.timesteps[step]


@pytest.mark.parametrize("name", [*OWN, *OTHERS])
def test_a_step_begins_at_its_sigma(name):
    scheduler, timestep = at_step(name, 0)
    assert scheduler.step_index is None
    _diffusers.begin_step(scheduler, timestep)
    assert scheduler.step_index == 0


@pytest.mark.parametrize("name", OWN)
def test_alpha_and_sigma_mix_the_clean_sample_and_the_noise(name):
    scheduler, _ = at_step(name, 0)
    given = scheduler.sigmas[3]
    alpha, sigma = _diffusers.alpha_and_sigma(scheduler, given)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    torch.testing.assert_close(sigma / alpha, given)


def test_a_hook_that_shares_tokens_remembers_places_of_arguments():
    """`capture/sharding.py` fills them in before the hook's first call, which looks them up in a way that cannot be traced."""
    hooks = pytest.importorskip("diffusers.hooks.context_parallel")

    class Model(torch.nn.Module):
        def forward(self, latent, text=None):
            return latent

    known = hooks.ModuleForwardMetadata(_cls=Model)
    assert known.cached_parameter_indices is None
    assert known._get_parameter_from_args_kwargs("text", (1, 2))[0] == 2
    assert known.cached_parameter_indices == {"latent": 0, "text": 1}
