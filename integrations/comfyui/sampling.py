"""One patched model of ComfyUI: each run of a sampler is a generation, in which the model's compiled twin answers in its place."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

import ras_compile

__all__ = ["Sampling"]

NOISY = ("ancestral", "sde", "lcm", "ddpm")  # parts of the names of ComfyUI's samplers that add noise


class Sampling:
    """The runs of one patched model.

    Args:
        model: ComfyUI's diffusion model, latent to prediction.
        options: of `torch.compile(..., backend="ras")`.

    Attributes:
        compiled: its compiled twin, with the same weights.
    """

    def __init__(self, model: torch.nn.Module, options: dict[str, Any]) -> None:
        self.compiled = torch.compile(model, backend="ras", options=options)
        self.run: ras_compile.Generation | None = None
        self.done = False  # whether guidance has joined the calls of a step
        self.at: tuple[Tensor | None, Tensor | None] = (None, None)  # latent and sigma of that step

    def __deepcopy__(self, memo: dict) -> Sampling:
        """Clones of a patcher, for which ComfyUI copies all options in depth, share the model and so its twin."""
        return self

    def outer_sample(
        self, executor: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *more: Any, **named: Any
    ) -> Any:
        """Around one run of a sampler: `sigmas` [steps + 1] are its noise levels."""
        if len(sigmas) < 2:
            return executor(noise, latent, sampler, sigmas, *more, **named)
        name = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
        if any(part in name for part in NOISY):
            text = f"{name} adds noise in each step, which stays as grain where tokens are skipped: choose another sampler."
            warnings.warn(f"ras_compile: {text}", ras_compile.RASWarning, stacklevel=2)
        with ras_compile.generation(num_steps=len(sigmas) - 1) as self.run:
            self.done, self.at = True, (None, None)
            try:
                return executor(noise, latent, sampler, sigmas, *more, **named)
            finally:
                self.run = None

    def apply_model(self, executor: Any, x: Tensor, sigma: Tensor, concat: Any, context: Any, control: Any,
                    options: dict, **named: Any) -> Any:  # fmt: skip
        """Around one call of the model: with one branch of guidance, or with several as samples of one batch."""
        base = executor.class_obj
        plain = base.diffusion_model
        if self.run is None:
            return executor(x, sigma, concat, context, control, options, **named)
        branches = options.get("cond_or_uncond") or [0]
        if self.done and not self._same(x[: len(x) // len(branches)], sigma[:1]):
            self.run.step()
            self.done = False
        base.diffusion_model = self.compiled
        name = "-".join(map(str, branches)) + " once more" * self.done
        try:
            with self.run.branch(name):
                return executor(x, sigma, concat, context, control, options, **named)
        finally:
            base.diffusion_model = plain

    def joined(self, given: dict[str, Any]) -> Tensor:
        """Called by ComfyUI when guidance has joined the branches: calls for another latent belong to the next step."""
        self.done, self.at = True, (given["input"], given["sigma"][:1])
        return given["denoised"]

    def _same(self, latent: Tensor, sigma: Tensor) -> bool:
        """Whether a call belongs to the step that has just been joined, as some guidance calls the model once more for it."""
        before, level = self.at
        if before is None or level is None or latent.shape != before.shape or not torch.equal(sigma, level.to(sigma)):
            return False
        return torch.equal(latent, before.to(latent))
