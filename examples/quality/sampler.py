"""Pictures in large batches from the shipped model: transformer, scheduler and decoder, without the pipeline's own loop.

The noise of picture i depends on i alone, so that settings are paired picture by picture. The conditions of a batch
are one tensor through all of its steps; guidance runs in one batch, as in `StableDiffusion3Pipeline`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

import ras_compile
from ras_compile.config import RUNTIME_OPTIONS

PIPELINE = Path(__file__).parents[1] / "emoji" / "pipeline"
SAMPLERS = ("euler", "even", "unipc", "dpm++")
OnStep = Callable[[int, Tensor], None]  # (step, noise of uncond and cond [2 b, c, h, w])


class EvenEuler(FlowMatchEulerDiscreteScheduler):
    """Euler steps that are equal before the shift, from 1 down to 0.

    Left alone, diffusers' scheduler ends at a noise level just above 0, so that the last of few steps does nothing.
    """

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **kwargs: Any) -> None:
        """The schedule of a run; `kwargs` go on."""
        sigmas = torch.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()
        super().set_timesteps(device=device, sigmas=sigmas, **kwargs)


def scheduler_of(name: str, shift: float) -> Any:
    """A scheduler for flow models: "euler" (the pipeline's own), "even", "unipc" or "dpm++", equally shifted.

    Raises:
        ValueError: another name.
    """
    if name in ("euler", "even"):
        return (EvenEuler if name == "even" else FlowMatchEulerDiscreteScheduler)(num_train_timesteps=1000, shift=shift)
    flow = dict(num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    if name == "unipc":
        return UniPCMultistepScheduler(**flow)
    if name == "dpm++":
        return DPMSolverMultistepScheduler(**flow)
    raise ValueError(f"sampler {name!r} is not one of {', '.join(SAMPLERS)}")


@dataclass
class Drawn:
    """Pictures of one setting.

    Attributes:
        pictures: uint8 [n, 3, 128, 128].
        seconds: per picture, transformer and scheduler alone, in a batch that compiled nothing.
        decode_seconds: the same of the decoder.
        first: seconds of the first batch, in which programs may be compiled.
        kinds: per step (kind, active tokens) of the last batch; empty without region-adaptive sampling.
        flops: per picture, where a method knows better than the steps do.
    """

    pictures: Tensor
    seconds: float
    decode_seconds: float
    first: float
    kinds: list[tuple[str, int]] = field(default_factory=list)
    flops: float | None = None


class Sampler:
    """Draws pictures of given captions.

    Args:
        captions: one per picture.
        batch: pictures drawn at once; the last batch is filled up with the first captions.
        device: where.
        dtype: of the transformer; latents and decoder are float32.
        inner_backend: what compiles programs and the dense model ("eager" for tests).
        guidance: of classifier-free guidance.
    """

    def __init__(
        self, captions: list[str], batch: int, device: str, dtype: torch.dtype, inner_backend: str = "inductor",
        guidance: float = 4.0,
    ) -> None:  # fmt: skip
        self.batch, self.device, self.guidance, self.inner_backend = batch, device, guidance, inner_backend
        pipe = StableDiffusion3Pipeline.from_pretrained(PIPELINE, dtype=torch.float32, local_files_only=True).to(device)
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe
        self.shift = pipe.scheduler.config.shift
        self.texts = [self._encoded(captions[at : at + 500]) for at in range(0, len(captions), 500)]
        self.prompts, self.pooled = (torch.cat(part).to(dtype) for part in zip(*self.texts, strict=True))
        self.nothing, self.nothing_pooled = (part.to(dtype) for part in self._encoded([""]))
        self.shape = (pipe.transformer.config.in_channels,) + (pipe.transformer.config.sample_size,) * 2
        self.noise = torch.stack([_noise(index, self.shape) for index in range(len(captions))]).to(device)
        pipe.transformer.to(dtype).eval().requires_grad_(False)
        pipe.vae.eval().requires_grad_(False)
        if device == "cuda":
            pipe.vae.to(memory_format=torch.channels_last)
        # a compiled module and an attached one side by side
        self.plain: nn.Module = copy.deepcopy(pipe.transformer)
        if inner_backend != "eager":
            self.plain.compile(backend=inner_backend, dynamic=False)
        self._handle: ras_compile.Handle | None = None
        self._fixed: dict[str, Any] | None = None

    @torch.no_grad()
    def _encoded(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        prompts, _, pooled, _ = self.pipe.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False, max_sequence_length=1
        )
        return prompts, pooled

    def attached(self, options: dict[str, Any]) -> ras_compile.Handle:
        """The pipeline, attached with `options`; compiled programs stay as long as only runtime options change."""
        wanted = ras_compile.RASConfig.from_options(options)
        fixed = {name: value for name, value in options.items() if name not in (*RUNTIME_OPTIONS, "preset")}
        if self._handle is None or fixed != self._fixed:
            self.detach()
            self._handle = ras_compile.attach(self.pipe, inner_backend=self.inner_backend, unsupported="error", **fixed)
            self._fixed = fixed
        self._handle.configure(**{name: getattr(wanted, name) for name in RUNTIME_OPTIONS})
        return self._handle

    def detach(self) -> None:
        """Give the pipeline's transformer back as it was."""
        if self._handle is not None:
            self._handle.detach()
            self._handle = self._fixed = None

    def adaptive(
        self, count: int, steps: int, options: dict[str, Any], sampler: str = "euler", bar: Callable[[int], Any] = int
    ) -> Drawn:
        """The first `count` pictures, region-adaptively with the options of `ras_compile.attach`."""
        model, scheduler = self.ready(options, sampler)
        drawn = self.draw(model, scheduler, count, steps, bar=bar)
        drawn.kinds = self.kinds()
        return drawn

    def ready(self, options: dict[str, Any] | None, sampler: str) -> tuple[nn.Module, Any]:
        """The model and the scheduler to draw with: attached with `options`, or the dense ones (None)."""
        scheduler = scheduler_of(sampler, self.shift)
        if options is None:
            return self.plain, scheduler
        self.pipe.scheduler = scheduler  # the handle follows the scheduler that the pipeline has
        self.attached(options)
        return self.pipe.transformer, scheduler

    def kinds(self) -> list[tuple[str, int]]:
        """Per step (kind, active tokens) of the last batch that was drawn region-adaptively."""
        assert self._handle is not None
        return [(record.kind, record.active) for record in ras_compile.trace(self._handle)]

    def dense(
        self, count: int, steps: int, sampler: str = "euler", on_step: OnStep | None = None,
        bar: Callable[[int], Any] = int,
    ) -> Drawn:  # fmt: skip
        """The first `count` pictures, every step whole."""
        return self.draw(self.plain, scheduler_of(sampler, self.shift), count, steps, on_step, bar)

    @torch.no_grad()
    def draw(
        self, model: nn.Module, scheduler: Any, count: int, steps: int, on_step: OnStep | None = None,
        bar: Callable[[int], Any] = int, around: Callable[[], Any] = nullcontext,
    ) -> Drawn:  # fmt: skip
        """The first `count` pictures with a model of the transformer's signature.

        Args:
            model: called with uncond and cond samples in one batch.
            scheduler: a diffusers scheduler.
            count: pictures.
            steps: steps.
            on_step: called after each model call.
            bar: called with the number of pictures after each batch.
            around: a context that each batch runs in.
        """
        parts: list[Tensor] = []
        seconds: list[float] = []
        decode: list[float] = []
        starts = list(range(0, count, self.batch))
        # one batch more where there is but one, so that what is timed compiles nothing
        for at in starts if len(starts) > 1 else starts * 2:
            pictures, took, decoding = self.one_batch(model, scheduler, at, steps, on_step if at == 0 else None, around)
            decode.append(decoding)
            seconds.append(took)
            parts.append(pictures)
            bar(min(self.batch, count - at))
        return Drawn(
            torch.cat(parts[-len(starts) :])[:count],
            median(seconds[1:]) / self.batch,
            median(decode[1:]) / self.batch,
            seconds[0],
        )

    @torch.no_grad()
    def one_batch(
        self, model: nn.Module, scheduler: Any, at: int, steps: int, on_step: OnStep | None = None,
        around: Callable[[], Any] = nullcontext,
    ) -> tuple[Tensor, float, float]:  # fmt: skip
        """The pictures from number `at` on, uint8 [b, 3, h, w], and the seconds of sampling and of decoding them."""
        rows = torch.arange(at, at + self.batch, device=self.device) % len(self.noise)
        begin = self._now()
        with around():
            latents = self._sampled(model, scheduler, rows, steps, on_step)
        middle = self._now()
        pictures = self._decoded(latents)
        return pictures, middle - begin, self._now() - middle

    def _sampled(self, model: nn.Module, scheduler: Any, rows: Tensor, steps: int, on_step: OnStep | None) -> Tensor:
        """Latents [b, c, h, w] of pictures `rows` [b]."""
        count = len(rows)
        prompts = torch.cat((self.nothing.expand(count, -1, -1), self.prompts[rows]))
        pooled = torch.cat((self.nothing_pooled.expand(count, -1), self.pooled[rows]))
        latents = self.noise[rows]
        scheduler.set_timesteps(steps, device=self.device)
        # some schedulers round the timesteps that they tell; the sigmas that they step along are exact
        times = (scheduler.sigmas * 1000).to(self.device, torch.float32)
        for step, t in enumerate(scheduler.timesteps):
            noise = model(
                hidden_states=torch.cat((latents, latents)).to(prompts.dtype),
                timestep=times[step].expand(2 * count),
                encoder_hidden_states=prompts,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
            if on_step is not None:
                on_step(step, noise)
            uncond, cond = noise.float().chunk(2)
            latents = scheduler.step(uncond + self.guidance * (cond - uncond), t, latents, return_dict=False)[0]
        return latents

    def _decoded(self, latents: Tensor) -> Tensor:
        """uint8 [b, 3, h, w]."""
        config = self.pipe.vae.config
        pictures = self.pipe.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    @torch.no_grad()
    def reconstructed(self, pictures: Tensor) -> Tensor:
        """uint8 pictures through the autoencoder and back."""
        parts = []
        for at in range(0, len(pictures), self.batch):
            latents = self.pipe.vae.encode(pictures[at : at + self.batch].float() / 127.5 - 1).latent_dist.mode()
            config = self.pipe.vae.config
            parts.append(self._decoded((latents - config.shift_factor) * config.scaling_factor))
        return torch.cat(parts)

    def one_call(self) -> dict[str, Any]:
        """The arguments of the guided call for one picture, for `ras_compile.explain`."""
        return {
            "hidden_states": self.noise[:1].repeat(2, 1, 1, 1).to(self.prompts.dtype),
            "timestep": torch.full((2,), 500.0, device=self.device),
            "encoder_hidden_states": torch.cat((self.nothing, self.prompts[:1])),
            "pooled_projections": torch.cat((self.nothing_pooled, self.pooled[:1])),
            "return_dict": False,
        }

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _noise(index: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(index))
