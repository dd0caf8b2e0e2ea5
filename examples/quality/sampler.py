"""Pictures in large batches from a shipped model: transformer, scheduler and decoder, without the pipeline's own loop.

The noise of picture i depends on i alone, so that settings are paired picture by picture. The conditions of a batch
are one tensor through all of its steps; guidance runs in one batch, as in `StableDiffusion3Pipeline`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from models import Emoji
from torch import Tensor, nn

import ras_compile
from ras_compile.config import RUNTIME_OPTIONS

OnStep = Callable[[int, Tensor], None]  # (step, noise of uncond and cond [2 b, c, h, w])


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
        kind: the model; that of `examples/emoji` where it is not given.
    """

    def __init__(
        self, captions: list[str], batch: int, device: str, dtype: torch.dtype, inner_backend: str = "inductor",
        guidance: float = 4.0, kind: Emoji | None = None,
    ) -> None:  # fmt: skip
        self.kind = kind or Emoji()
        self.batch, self.device, self.guidance, self.inner_backend = batch, device, guidance, inner_backend
        pipe = self.kind.pipeline(dtype).to(device)
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.dtype, self._config = pipe, dtype, pipe.scheduler.config
        texts = [self._encoded(captions[at : at + 500]) for at in range(0, len(captions), 500)]
        self.given = {name: torch.cat([text[name] for text in texts]) for name in texts[0]}
        self.nothing = self._encoded([""])
        self.shape = self.kind.shape(pipe)
        self.noise = torch.stack([_noise(index, self.shape) for index in range(len(captions))]).to(device)
        pipe.transformer.eval().requires_grad_(False)
        pipe.vae.eval().requires_grad_(False)
        if device == "cuda" and len(self.shape) == 3:  # a format of pictures, not of videos
            pipe.vae.to(memory_format=torch.channels_last)
        # a compiled module and an attached one side by side
        self.plain: nn.Module = copy.deepcopy(pipe.transformer)
        if inner_backend != "eager":
            self.plain.compile(backend=inner_backend, dynamic=False)
        self.handle: ras_compile.Handle | None = None
        self._fixed: dict[str, Any] | None = None

    @torch.no_grad()
    def _encoded(self, captions: list[str]) -> dict[str, Tensor]:
        found = self.kind.conditions(self.pipe, captions)
        return {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in found.items()}

    def scheduler(self, name: str) -> Any:
        """The model's scheduler of a sampler of this name."""
        return self.kind.scheduler(self._config, name)

    def attached(self, options: dict[str, Any]) -> ras_compile.Handle:
        """The pipeline, attached with `options`; compiled programs stay as long as only runtime options change."""
        wanted = ras_compile.RASConfig.from_options(options)
        fixed = {name: value for name, value in options.items() if name not in (*RUNTIME_OPTIONS, "preset")}
        if self.handle is None or fixed != self._fixed:
            self.detach()
            self.handle = ras_compile.attach(self.pipe, inner_backend=self.inner_backend, unsupported="error", **fixed)
            self._fixed = fixed
        self.handle.configure(**{name: getattr(wanted, name) for name in RUNTIME_OPTIONS})
        return self.handle

    def detach(self) -> None:
        """Give the pipeline's transformer back as it was."""
        if self.handle is not None:
            self.handle.detach()
            self.handle = self._fixed = None

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
        scheduler = self.scheduler(sampler)
        if options is None:
            return self.plain, scheduler
        self.pipe.scheduler = scheduler  # the handle follows the scheduler that the pipeline has
        self.attached(options)
        return self.pipe.transformer, scheduler

    def kinds(self) -> list[tuple[str, int]]:
        """Per step (kind, active tokens) of the last batch that was drawn region-adaptively."""
        assert self.handle is not None
        return [(record.kind, record.active) for record in ras_compile.trace(self.handle)]

    def dense(
        self, count: int, steps: int, sampler: str = "euler", on_step: OnStep | None = None,
        bar: Callable[[int], Any] = int,
    ) -> Drawn:  # fmt: skip
        """The first `count` pictures, every step whole."""
        return self.draw(self.plain, self.scheduler(sampler), count, steps, on_step, bar)

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
        given = self._guided(rows)
        latents = self.noise[rows]
        scheduler.set_timesteps(steps, device=self.device)
        times = self.kind.times(scheduler).to(self.device, torch.float32)
        for step, t in enumerate(scheduler.timesteps):
            noise = model(
                hidden_states=torch.cat((latents, latents)).to(self.dtype),
                timestep=times[step].expand(2 * count),
                **given,
                return_dict=False,
            )[0]
            if on_step is not None:
                on_step(step, noise)
            uncond, cond = noise.float().chunk(2)
            latents = scheduler.step(uncond + self.guidance * (cond - uncond), t, latents, return_dict=False)[0]
        return latents

    def _guided(self, rows: Tensor) -> dict[str, Tensor]:
        """The conditions of uncond, then of cond samples."""
        return {
            name: torch.cat((self.nothing[name].expand(len(rows), *value.shape[1:]), value[rows]))
            for name, value in self.given.items()
        }

    def _decoded(self, latents: Tensor) -> Tensor:
        """uint8 [b, 3, h, w]."""
        return ((self.kind.decoded(self.pipe, latents).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

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
            "hidden_states": self.noise[:1].repeat(2, *[1] * len(self.shape)).to(self.dtype),
            "timestep": torch.full((2,), 500.0, device=self.device),
            **self._guided(torch.zeros(1, dtype=torch.long)),
            "return_dict": False,
        }

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _noise(index: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(index))
