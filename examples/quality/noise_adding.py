"""Samplers that add noise at each step: how far apart are the distributions of dense and of region-adaptive latents?

    python examples/quality/noise_adding.py --pictures 32 --size 64 --steps 12

A seed's picture proves nothing where noise is drawn anew at each step. So pictures of other seeds are compared by the
Fréchet distance of a few statistics of each latent (mean, spread and Laplacian of every channel) to dense ones: "dense"
is the floor, "hold" what `noise_reuse="hold"` gives, "x0" what `ras_compile.attach` makes of it. One JSON line for each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import scipy.linalg
import torch
from torch import Tensor

import ras_compile

PIPELINE = Path(__file__).parents[1] / "emoji" / "pipeline"
PROMPTS = ["a red apple", "a cat", "a yellow car", "two bananas", "a blue house", "a pizza", "a dog", "a green tree"]
SDE = {
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "flow_shift": 3.0,
    "algorithm_type": "sde-dpmsolver++",
}
SAMPLERS = {
    "Euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),  # adds none: what the method itself costs
    "stochastic Euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}),
    "SDE-DPM-Solver++": ("DPMSolverMultistepScheduler", SDE),
}


def statistics(latents: Tensor) -> Tensor:
    """[n, C, H, W] -> [n, 3 * C]: mean and spread of every channel, and the spread of its Laplacian, which shows grain."""
    x = latents.double().cpu()
    inner = x[..., 1:-1, 1:-1]
    edges = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
    return torch.cat([x.mean((2, 3)), x.std((2, 3)), (4 * inner - edges).std((2, 3))], dim=1)


def frechet(one: Tensor, two: Tensor) -> float:
    """Fréchet distance of two samples [n, d], each taken as normally distributed."""
    covariances = torch.cov(one.T).numpy(), torch.cov(two.T).numpy()
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return float((one.mean(0) - two.mean(0)).square().sum() + np.trace(sum(covariances) - 2 * root))


def main() -> None:
    """Draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=32, help="of each way of sampling; a multiple of eight")
    parser.add_argument("--size", type=int, default=128, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--inner-backend", default="inductor")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(PIPELINE, dtype=torch.float32, local_files_only=True)
    pipe.to(device).set_progress_bar_config(disable=True)
    options = {
        "sample_ratio": args.ratio, "inner_backend": args.inner_backend, "metric": "std", "reset_interval": 8,
        "noise_reuse": "hold", "ratio_schedule": "constant",
    }  # fmt: skip

    def draw(first: int) -> Tensor:
        """Statistics of the pictures of the seeds from `first` on."""
        latents = []
        for seed in range(first, first + args.pictures, len(PROMPTS)):
            torch.manual_seed(seed)  # some samplers draw from the global generator
            generators = [torch.Generator().manual_seed(seed + index) for index in range(len(PROMPTS))]
            latents.append(
                pipe(
                    PROMPTS, num_inference_steps=args.steps, guidance_scale=4.0, max_sequence_length=1,
                    output_type="latent", height=args.size, width=args.size, generator=generators,
                ).images
            )  # fmt: skip
        return statistics(torch.cat(latents))

    def hold() -> Tensor:
        """Nobody knows the scheduler, so noise is held."""
        plain, pipe.transformer = pipe.transformer, torch.compile(pipe.transformer, backend="ras", options=options)
        try:
            return draw(1000)
        finally:
            pipe.transformer = plain

    def clean() -> Tensor:
        with ras_compile.attach(pipe, **options):
            return draw(1000)

    ways: dict[str, Callable[[], Tensor]] = {"dense": lambda: draw(1000), "hold": hold, "x0": clean}
    for sampler, (name, given) in SAMPLERS.items():
        pipe.scheduler = getattr(diffusers, name)(**given)
        reference = draw(0)
        for way, drawn in ways.items():
            torch._dynamo.reset()
            line = {"sampler": sampler, "way": way, "frechet": round(frechet(reference, drawn()), 3), **vars(args)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
