"""The models under measurement: diffusers' classes at real sizes with random weights, and the loops of their pipelines.

    sd3-medium    24 joint blocks, width 1536, 4096 image + 333 text tokens, guidance in one batch of 2, 28 steps
    sd3.5-large   38 joint blocks, width 2432, the same tokens
    lumina-next   24 blocks, width 2304, 4096 image tokens, text in cross-attention, guidance in one batch of 2, 30 steps
    flux-dev      19 joint + 38 single blocks, width 3072, 4096 image + 512 text tokens, distilled guidance, 28 steps
    flux-kontext  the same, and the 4096 tokens of a reference picture behind those of the image
    wan-1.3b      30 blocks, width 1536, 832x480x81 video: 32760 tokens, two calls a step, 20 steps

Speed does not depend on the weights. They are drawn large enough for every token to matter: nothing is left at zero.
There is no text encoder and no VAE: the loop around the transformer is the pipeline's, with its scheduler and guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["MODELS", "SIZES", "Workload", "build", "sample"]

SIZES = ("real", "thin", "tiny")
WARMUP = 4  # dense steps before the first sparse one


@dataclass
class Workload:
    """One model with everything that its sampling loop needs.

    Args:
        name: the model's name here.
        transformer: the module, on its device.
        latents: the noise that every run starts from.
        scheduler: makes a scheduler of the pipeline's kind.
        set_timesteps: `(scheduler, steps, device)`, as the pipeline does it.
        predict: `(transformer, latents, t, index, steps, scheduler) -> noise`, guidance included.
        steps: steps of a full run.
        branches: guidance branches that a run's caches are kept for.
        inputs: keyword arguments of one transformer call, for `explain`.
    """

    name: str
    transformer: nn.Module
    latents: Tensor
    scheduler: Callable[[], Any]
    set_timesteps: Callable[[Any, int, torch.device], None]
    predict: Callable[..., Tensor]
    steps: int
    branches: int = 1
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def resets(self) -> tuple[int, ...]:
        """Dense error resets: of 28 steps 12 and 20, so that 6 steps are dense."""
        return tuple(range(12, self.steps, 8))[:2]


@torch.no_grad()
def sample(
    work: Workload, denoise: Any, scheduler: Any, steps: int, mark: Callable[[int], None] = lambda index: None
) -> Tensor:
    """One denoising run.

    Args:
        work: the workload.
        denoise: its transformer, or what stands in for it.
        scheduler: a scheduler of the workload.
        steps: steps of the run.
        mark: called with the step's number before each step, and with `steps` after the last one.

    Returns:
        The latents at the end, of the shape of `work.latents`.
    """
    work.set_timesteps(scheduler, steps, work.latents.device)
    latents = work.latents
    for index, t in enumerate(scheduler.timesteps):
        mark(index)
        noise = work.predict(denoise, latents, t, index, steps, scheduler)
        latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    mark(steps)
    return latents


MODELS: dict[str, Callable[..., Workload]] = {}


def _model(name: str, kind: str, real: dict, tiny: dict):
    """Registers a maker of the parts of a Workload, with the class and its two configurations."""

    def register(parts: Callable[..., dict]):
        def make(size: str, device: torch.device, dtype: torch.dtype, layers: int | None) -> Workload:
            narrow = {key: value for key, value in tiny.items() if size == "tiny" or not key.endswith("_layers")}
            config = real if size == "real" else real | narrow
            if layers is not None:
                config = config | dict.fromkeys((key for key in config if key.endswith("_layers")), layers)
            transformer = _transformer(getattr(diffusers, kind), config, device, dtype)
            draw = _Draw(device, dtype)
            return Workload(name, transformer, **parts(transformer, size != "real", draw))

        MODELS[name] = make
        return parts

    return register


def build(name: str, size: str, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> Workload:
    """The workload of that name.

    Args:
        name: one of `MODELS`.
        size: "real", "tiny" for a CPU in seconds, or "thin" for as many blocks as real ones have, of a tiny width.
        device: where the weights are drawn.
        dtype: their type; modules that the class keeps in fp32 stay so.
        layers: so many blocks of each kind; None: as many as there are.

    Raises:
        ValueError: an unknown name or size; the text says what there is.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(MODELS)}")
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; there are {', '.join(SIZES)}")
    return MODELS[name](size, device, dtype, layers)


def _transformer(kind: type, config: dict, device: torch.device, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        transformer = kind(**config)
    nn.Module.to(transformer, device, dtype)  # the class's own `to` warns about the modules that follow below
    transformer.eval().requires_grad_(False)
    kept = getattr(kind, "_keep_in_fp32_modules", None) or ()
    generator = torch.Generator(device).manual_seed(1)
    for name, weight in transformer.named_parameters():
        if any(part in name.split(".") for part in kept):
            weight.data = weight.data.float()
        if weight.ndim > 1:
            weight.normal_(0, 1 / math.sqrt(weight[0].numel()), generator=generator)
        elif name.endswith("bias"):
            weight.normal_(0, 0.02, generator=generator)
        elif not weight.any():  # a gate
            weight.normal_(0, 0.5, generator=generator)
    for name, buffer in transformer.named_buffers():
        if any(part in name.split(".") for part in kept):
            buffer.data = buffer.data.float()
    return transformer


class _Draw:
    """Draws tensors of one device and type, the same ones in every process."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(2)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=dtype or self.dtype)


@contextmanager
def _branch(transformer: Any, name: str, **told: Any) -> Iterator[None]:
    """The cache context that the pipeline would enter, where the class has one."""
    with transformer.cache_context(name, **told) if hasattr(transformer, "cache_context") else nullcontext():
        yield


def _plain_timesteps(scheduler: Any, steps: int, device: torch.device) -> None:
    scheduler.set_timesteps(steps, device=device)


_SD3 = dict(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64, joint_attention_dim=4096,
    pooled_projection_dim=2048, pos_embed_max_size=192,
)  # fmt: skip
_SD3_TINY = dict(
    sample_size=16, num_layers=2, num_attention_heads=2, attention_head_dim=8, joint_attention_dim=16,
    caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=16,
)  # fmt: skip


@_model(
    "sd3-medium", "SD3Transformer2DModel",
    _SD3 | dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536), _SD3_TINY,
)  # fmt: skip
@_model(
    "sd3.5-large", "SD3Transformer2DModel",
    _SD3 | dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm"), _SD3_TINY,
)  # fmt: skip
def _sd3(transformer: Any, tiny: bool, draw: _Draw) -> dict:
    config = transformer.config
    text = draw(2, 5 if tiny else 333, config.joint_attention_dim)
    pooled = draw(2, config.pooled_projection_dim)
    side = config.sample_size

    def call(latents: Tensor, t: Tensor) -> dict:
        both = torch.cat([latents] * 2)
        return dict(
            hidden_states=both, timestep=t.expand(2), encoder_hidden_states=text, pooled_projections=pooled,
            joint_attention_kwargs=None, return_dict=False,
        )  # fmt: skip

    def predict(transformer, latents, t, index, steps, scheduler):
        unconditional, conditional = transformer(**call(latents, t))[0].chunk(2)
        return unconditional + 7.0 * (conditional - unconditional)

    latents = draw(1, config.in_channels, side, side)
    return dict(
        latents=latents,
        scheduler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        set_timesteps=_plain_timesteps,
        predict=predict,
        steps=28,
        inputs=call(latents, torch.tensor(1000.0, device=latents.device)),
    )


_FLUX = dict(
    patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
    num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
    axes_dims_rope=(16, 56, 56),
)  # fmt: skip
_FLUX_TINY = dict(
    in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
)  # fmt: skip


@_model("flux-dev", "FluxTransformer2DModel", _FLUX, _FLUX_TINY)
def _flux(transformer: Any, tiny: bool, draw: _Draw, references: int = 0) -> dict:
    config = transformer.config
    side = 8 if tiny else 64
    text = draw(1, 4 if tiny else 512, config.joint_attention_dim)
    pooled = draw(1, config.pooled_projection_dim)
    ids = torch.zeros(side, side, 3, device=draw.device, dtype=draw.dtype)
    ids[..., 1] += torch.arange(side, device=draw.device)[:, None]
    ids[..., 2] += torch.arange(side, device=draw.device)[None]
    ids, text_ids = ids.reshape(-1, 3), torch.zeros(text.shape[1], 3, device=draw.device, dtype=draw.dtype)
    behind = ids + torch.tensor(
        [1, 0, 0], device=draw.device, dtype=draw.dtype
    )  # as the pipeline numbers a reference's places
    ids, pictures = torch.cat([ids, *[behind] * references]), draw(1, references * side * side, config.in_channels)
    guidance = torch.full([1], 3.5, device=draw.device, dtype=torch.float32)

    def call(latents: Tensor, t: Tensor) -> dict:
        return dict(
            hidden_states=torch.cat([latents, pictures], 1) if references else latents,
            timestep=t.expand(1).to(latents.dtype) / 1000, guidance=guidance,
            pooled_projections=pooled, encoder_hidden_states=text, txt_ids=text_ids, img_ids=ids,
            joint_attention_kwargs=None, return_dict=False,
        )  # fmt: skip

    def predict(transformer, latents, t, index, steps, scheduler):
        with _branch(transformer, "cond"):
            return transformer(**call(latents, t))[0][:, : latents.shape[1]]

    def set_timesteps(scheduler, steps, device):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device, mu=1.15)

    latents = draw(1, side * side, config.in_channels)
    return dict(
        latents=latents,
        scheduler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        set_timesteps=set_timesteps,
        predict=predict,
        steps=28,
        inputs=call(latents, torch.tensor(1000.0, device=latents.device)),
    )


@_model("flux-kontext", "FluxTransformer2DModel", _FLUX, _FLUX_TINY)
def _kontext(transformer: Any, tiny: bool, draw: _Draw) -> dict:
    return _flux(transformer, tiny, draw, references=1)


@_model(
    "lumina-next", "LuminaNextDiT2DModel",
    dict(
        sample_size=128, patch_size=2, in_channels=4, hidden_size=2304, num_layers=24, num_attention_heads=32,
        num_kv_heads=8, multiple_of=256, ffn_dim_multiplier=None, norm_eps=1e-5, learn_sigma=True, qk_norm=True,
        cross_attention_dim=2048, scaling_factor=1.0,
    ),
    dict(
        sample_size=16, hidden_size=32, num_layers=2, num_attention_heads=4, num_kv_heads=2, multiple_of=16,
        cross_attention_dim=24,
    ),
)  # fmt: skip
def _lumina(transformer: Any, tiny: bool, draw: _Draw) -> dict:
    """Guidance on the first three channels, time rises; the rotary table is made once (the pipeline makes it anew)."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    config = transformer.config
    side = config.sample_size
    text = draw(2, 6 if tiny else 256, config.cross_attention_dim)
    mask = torch.ones(text.shape[:2], device=draw.device, dtype=torch.int64)
    rotary = get_2d_rotary_pos_embed_lumina(transformer.head_dim, 384, 384).to(draw.device)
    extra = {"base_sequence_length": (side // 2) ** 2}

    def call(latents: Tensor, t: Tensor) -> dict:
        return dict(
            hidden_states=torch.cat([latents] * 2), timestep=1 - t[None].expand(2) / 1000, encoder_hidden_states=text,
            encoder_mask=mask, image_rotary_emb=rotary, cross_attention_kwargs=extra, return_dict=False,
        )  # fmt: skip

    def predict(transformer, latents, t, index, steps, scheduler):
        noise = transformer(**call(latents, t))[0].chunk(2, dim=1)[0]
        guided, rest = noise[:, :3], noise[:1, 3:]
        conditional, unconditional = guided.chunk(2)
        return -torch.cat([unconditional + 4.0 * (conditional - unconditional), rest], 1)

    latents = draw(1, config.in_channels, side, side)
    return dict(
        latents=latents,
        scheduler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
        set_timesteps=_plain_timesteps,
        predict=predict,
        steps=30,
        inputs=call(latents, torch.tensor(1000.0, device=latents.device)),
    )


@_model(
    "wan-1.3b", "WanTransformer3DModel",
    dict(
        patch_size=(1, 2, 2), num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16,
        text_dim=4096, freq_dim=256, ffn_dim=8960, num_layers=30, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", eps=1e-6, rope_max_seq_len=1024,
    ),
    dict(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    ),
)  # fmt: skip
def _wan(transformer: Any, tiny: bool, draw: _Draw) -> dict:
    """The latents stay in fp32 and guidance is two calls a step, as in the pipeline."""
    config = transformer.config
    tokens = 7 if tiny else 512
    texts = {name: draw(1, tokens, config.text_dim) for name in ("cond", "uncond")}

    def call(latents: Tensor, t: Tensor, name: str) -> dict:
        return dict(
            hidden_states=latents, timestep=t.expand(1), encoder_hidden_states=texts[name], attention_kwargs=None,
            return_dict=False,
        )  # fmt: skip

    def predict(transformer, latents, t, index, steps, scheduler):
        given = latents.to(draw.dtype)
        told = dict(step_index=index, sigma=float(scheduler.sigmas[index]), num_inference_steps=steps)
        with _branch(transformer, "cond", **told):
            conditional = transformer(**call(given, t, "cond"))[0]
        with _branch(transformer, "uncond", **told):
            unconditional = transformer(**call(given, t, "uncond"))[0]
        return unconditional + 5.0 * (conditional - unconditional)

    shape = (1, config.in_channels, *((3, 8, 12) if tiny else (21, 60, 104)))
    latents = draw(*shape, dtype=torch.float32)
    return dict(
        latents=latents,
        scheduler=lambda: diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
        set_timesteps=_plain_timesteps,
        predict=predict,
        steps=20,
        branches=2,
        inputs=call(latents.to(draw.dtype), torch.tensor(999, device=latents.device), "cond"),
    )
