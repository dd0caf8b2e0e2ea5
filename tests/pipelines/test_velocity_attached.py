"""Under an attached scheduler tokens that are settled cost nothing, whatever the model predicts."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from contract import error
from pipelines import EAGER, normal
from torch import nn

import ras_compile

SCHEDULERS = {
    "DDIM": lambda kind: diffusers.DDIMScheduler(prediction_type=kind, clip_sample=False),
    "DPM-Solver++": lambda kind: diffusers.DPMSolverMultistepScheduler(prediction_type=kind),
    "Euler": lambda kind: diffusers.EulerDiscreteScheduler(prediction_type=kind, timestep_spacing="leading"),
}
STEPS = 12


class Settled(nn.Module):
    """Knows the picture, `clean`, and the noise that it began with; attention adds next to nothing. Latent [B, 4, 8, 8]."""

    def __init__(self, kind: str, kept: torch.Tensor) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("alpha", kept.sqrt())
        self.register_buffer("sigma", (1 - kept).sqrt())
        self.register_buffer("clean", normal(1, 4, 8, 8, seed=1))
        self.register_buffer("noise", normal(1, 4, 8, 8, seed=2))
        self.qkv = nn.Linear(4, 12)
        self.config = SimpleNamespace(in_channels=4)

    def forward(self, hidden_states, timestep):
        q, k, v = self.qkv(hidden_states.flatten(2).transpose(1, 2))[:, None].chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        little = 1e-7 * mixed.reshape(hidden_states.shape)
        if self.kind == "epsilon":
            return (self.noise + little,)
        if self.kind == "sample":
            return (self.clean + little,)
        alpha, sigma = (table.index_select(0, timestep)[:, None, None, None] for table in (self.alpha, self.sigma))
        return (alpha * self.noise - sigma * self.clean + little,)


class Pipe:
    def __init__(self, transformer: nn.Module, scheduler) -> None:
        self.transformer, self.scheduler = transformer, scheduler


def draw(pipe) -> torch.Tensor:
    scheduler, model = pipe.scheduler, pipe.transformer
    scheduler.set_timesteps(STEPS)
    at = scheduler.timesteps[0].long()
    latent = model.alpha[at] * model.clean + model.sigma[at] * model.noise
    if isinstance(
        scheduler, diffusers.EulerDiscreteScheduler
    ):  # its samples have their noise added to the picture as it is
        latent = latent / model.alpha[at]
    for time in scheduler.timesteps:
        given = scheduler.scale_model_input(latent, time)
        latent = scheduler.step(pipe.transformer(given, time.long()[None])[0], time, latent).prev_sample
    return latent


@pytest.mark.parametrize("reuse", ["forecast", "linear"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_settled_tokens_need_no_steps(name, kind, reuse):
    scheduler = SCHEDULERS[name](kind)
    model = Settled(kind, scheduler.alphas_cumprod)
    pipe = Pipe(model, scheduler)
    torch._dynamo.reset()
    with torch.no_grad():
        plain = draw(pipe)
        with ras_compile.attach(pipe, **EAGER, metric="drift", sample_ratio=0.1, noise_reuse=reuse) as handle:
            found = draw(pipe)
            assert sum(record.kind == "sparse" for record in ras_compile.trace(handle)) == STEPS - 2
    assert error([found], [plain]) < 1e-3
