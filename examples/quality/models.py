"""The models that pictures are drawn with, and what of them differs: pipeline, conditions, schedulers, pictures, judge.

`MODELS` has them by the names of their folders in `examples/`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import diffusers
import measure
import torch
from torch import Tensor

EXAMPLES = Path(__file__).parents[1]
if str(EXAMPLES / "wan") not in sys.path:
    sys.path.append(str(EXAMPLES / "wan"))  # the video example is a folder of scripts that import each other

import motion  # noqa: E402  (found through the line above)
import watch  # noqa: E402

SAMPLERS = ("euler", "even", "unipc", "dpm++")
Facts = dict[str, Tensor]


class EvenEuler(diffusers.FlowMatchEulerDiscreteScheduler):
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
        kind = EvenEuler if name == "even" else diffusers.FlowMatchEulerDiscreteScheduler
        return kind(num_train_timesteps=1000, shift=shift)
    flow = dict(num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    if name == "unipc":
        return diffusers.UniPCMultistepScheduler(**flow)
    if name == "dpm++":
        return diffusers.DPMSolverMultistepScheduler(**flow)
    raise ValueError(f"sampler {name!r} is not one of {', '.join(SAMPLERS)}")


class Emoji:
    """`examples/emoji`: Stable Diffusion 3's class, a rectified flow; joint attention with the text."""

    name, pipeline_class, exact = "emoji", "StableDiffusion3Pipeline", "euler"

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or EXAMPLES / self.name  # of the pipeline, and of the judge where it is not that of emoji

    def pipeline(self, dtype: torch.dtype) -> Any:
        """The pipeline: its transformer in `dtype`, all else in float32."""
        if not (self.folder / "pipeline" / "model_index.json").is_file():
            raise FileNotFoundError(
                f"{self.folder / 'pipeline'} has no weights: train them as the README beside it says"
            )
        cls = getattr(diffusers, self.pipeline_class)
        dtypes = {"transformer": dtype, "default": torch.float32}
        return cls.from_pretrained(self.folder / "pipeline", dtype=dtypes, local_files_only=True)

    def shape(self, pipe: Any) -> tuple[int, ...]:
        """Of one picture's latents."""
        return (pipe.transformer.config.in_channels,) + (pipe.transformer.config.sample_size,) * 2

    def conditions(self, pipe: Any, captions: list[str]) -> dict[str, Tensor]:
        """What the transformer is given beside latents and times, a row for each caption."""
        prompts, _, pooled, _ = pipe.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False, max_sequence_length=1
        )
        return {"encoder_hidden_states": prompts, "pooled_projections": pooled}

    def scheduler(self, config: Any, name: str) -> Any:
        """The scheduler of a sampler of this name; `config` is that of the pipeline's own."""
        return scheduler_of(name, config.shift)

    def times(self, scheduler: Any) -> Tensor:
        """What the transformer is told of each step; some schedulers round their timesteps, the sigmas are exact."""
        return scheduler.sigmas * 1000

    def decoded(self, pipe: Any, latents: Tensor) -> Tensor:
        """Pictures in [-1, 1], [b, 3, h, w]."""
        config = pipe.vae.config
        return pipe.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]

    def asked(self, count: int, seed: int, device: str) -> tuple[list[str], Facts]:
        """Held-out captions, and what they say."""
        scenes = measure.scenes_of(count, seed)
        return [scene.caption for scene in scenes], measure.facts_of(scenes, device)

    def judge(self, device: str) -> Any:
        """Who looks at the pictures."""
        return measure.load(measure.EMOJI / "judge.safetensors", device)

    def looks(self, judge: Any, pictures: Tensor, facts: Facts, batch: int) -> measure.Looks:
        """What the judge sees in pictures uint8 [n, 3, h, w] of `facts`."""
        return measure.look(judge, pictures, facts, batch)

    def real(self, cache: Path, count: int, seed: int, device: str, batch: int) -> tuple[Tensor, Facts]:
        """Real held-out pictures, uint8 [n, 3, h, w], of the artwork in `cache`, and what they show."""
        _, facts = self.asked(count, seed, device)
        atlas = measure.Atlas(cache, device)
        parts = [
            self._drawn(atlas, {name: value[at : at + batch] for name, value in facts.items()})
            for at in range(0, count, batch)
        ]
        return ((torch.cat(parts) + 1) * 127.5).round().to(torch.uint8), facts

    def _drawn(self, atlas: Any, facts: Facts) -> Tensor:
        return measure.compose(atlas, facts)


class PixArt(Emoji):
    """`examples/pixart`: PixArt's class, v-prediction under the variances of DDPM; the same scenes and judge."""

    name, pipeline_class, exact = "pixart", "PixArtSigmaPipeline", "dpm++"

    def conditions(self, pipe: Any, captions: list[str]) -> dict[str, Tensor]:
        """The mask says which of 32 tokens are words."""
        hidden, mask, *_ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=32)
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def scheduler(self, config: Any, name: str) -> Any:
        """DDIM, which is Euler's method here and even by itself; UniPC; DPM-Solver++."""
        kinds = {"unipc": diffusers.UniPCMultistepScheduler, "dpm++": diffusers.DPMSolverMultistepScheduler}
        if name in kinds:
            return kinds[name].from_config(config, timestep_spacing="linspace")
        if name in SAMPLERS:
            return diffusers.DDIMScheduler.from_config(
                config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
            )
        raise ValueError(f"sampler {name!r} is not one of {', '.join(SAMPLERS)}")

    def times(self, scheduler: Any) -> Tensor:
        """The timesteps, which are whole numbers."""
        return scheduler.timesteps

    def decoded(self, pipe: Any, latents: Tensor) -> Tensor:
        """Pictures in [-1, 1], [b, 3, h, w]."""
        return pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]


class Wan(Emoji):
    """`examples/wan`: Wan's class, a rectified flow of videos; frames are told as one picture, one under another."""

    name, pipeline_class = "wan", "WanPipeline"

    def shape(self, pipe: Any) -> tuple[int, ...]:
        """Latents of nine frames of 64 x 64 pixels."""
        return pipe.transformer.config.in_channels, 5, 16, 16

    def conditions(self, pipe: Any, captions: list[str]) -> dict[str, Tensor]:
        """Zeros stand where there are no words."""
        hidden, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=32)
        return {"encoder_hidden_states": hidden}

    def decoded(self, pipe: Any, latents: Tensor) -> Tensor:
        """Videos in [-1, 1], [b, 3, frames * h, w]."""
        mean, std = (
            torch.tensor(value, device=latents.device).view(1, -1, 1, 1, 1)
            for value in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
        )
        return pipe.vae.decode(latents * std + mean, return_dict=False)[0].flatten(2, 3)

    def asked(self, count: int, seed: int, device: str) -> tuple[list[str], Facts]:
        """Held-out captions, and what they say."""
        sampler = motion.ClipSampler(seed, split=True)
        clips = [sampler.clip() for _ in range(count)]
        return [clip.caption for clip in clips], {
            name: value.to(device) for name, value in motion.collate(clips).items()
        }

    def judge(self, device: str) -> Any:
        """Who watches the videos."""
        return watch.load(self.folder / "judge.safetensors", device)

    def looks(self, judge: Any, pictures: Tensor, facts: Facts, batch: int) -> measure.Looks:
        """What the judge sees in videos uint8 [n, 3, frames * h, w] of `facts`."""
        return measure.look(judge, pictures, facts, batch, watch.scores, motion.FRAMES)

    def _drawn(self, atlas: Any, facts: Facts) -> Tensor:
        return motion.film(atlas, facts).flatten(2, 3)


MODELS: dict[str, type[Emoji]] = {model.name: model for model in (Emoji, PixArt, Wan)}
