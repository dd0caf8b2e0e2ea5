"""Nodes for ComfyUI: a model that samples region-adaptively, and a picture of where it computed.

Copy or link this folder to `ComfyUI/custom_nodes/ras_compile`, and install `ras_compile` in ComfyUI's environment. ComfyUI has to
know the wrappers of `comfy.patcher_extension`, which came in January 2025. Nothing of ComfyUI is patched.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import ras_compile

from .sampling import Sampling

KEY = "ras_compile"
PRESETS = ("balanced", "fast", "quality", "paper")
OUTER_SAMPLE, APPLY_MODEL = "outer_sample", "apply_model"  # as comfy.patcher_extension.WrappersMP has them


class RegionAdaptive:
    """The node that compiles: MODEL in, MODEL out."""

    CATEGORY, FUNCTION, RETURN_TYPES = "model_patches/ras_compile", "patch", ("MODEL",)
    DESCRIPTION = (
        "Samples region-adaptively: after a few full steps, a step computes the parts of the picture that need it."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        ratio = {
            "default": 0.0,
            "min": 0.0,
            "max": 1.0,
            "step": 0.05,
            "tooltip": "share of the tokens; 0: the preset's",
        }
        steps = {"default": 4, "min": 1, "max": 100, "tooltip": "full steps at the start"}
        return {
            "required": {"model": ("MODEL",), "preset": (list(PRESETS),)},
            "optional": {"sample_ratio": ("FLOAT", ratio), "warmup_steps": ("INT", steps),
                         "inner_backend": (["inductor", "eager"],)},
        }  # fmt: skip

    def patch(self, model: Any, preset: str, sample_ratio: float = 0.0, warmup_steps: int = 4,
              inner_backend: str = "inductor") -> tuple[Any]:  # fmt: skip
        """A clone of ComfyUI's `ModelPatcher`; the model that it was made from samples as before."""
        options: dict[str, Any] = {"preset": preset, "warmup_steps": warmup_steps, "inner_backend": inner_backend}
        if sample_ratio:
            options["sample_ratio"] = sample_ratio
        patched = model.clone()
        sampling = Sampling(patched.get_model_object("diffusion_model"), options)
        for kind in (OUTER_SAMPLE, APPLY_MODEL):
            patched.remove_wrappers_with_key(kind, KEY)
            patched.add_wrapper_with_key(kind, KEY, getattr(sampling, kind))
        functions = patched.model_options.get("sampler_post_cfg_function", [])
        kept = [function for function in functions if not isinstance(getattr(function, "__self__", None), Sampling)]
        patched.model_options["sampler_post_cfg_function"] = kept
        patched.set_model_sampler_post_cfg_function(sampling.joined)
        patched.model_options[KEY] = sampling
        return (patched,)


class FocusMap:
    """The node that shows where the last run of a model computed."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "model_patches/ras_compile", "draw", ("IMAGE", "STRING"), False
    DESCRIPTION = "How often each part of the last picture was computed: black least, white most."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "samples": ("LATENT",)}}

    @classmethod
    def IS_CHANGED(cls, **given: Any) -> float:
        return math.nan  # another run of the same model has another map

    def draw(self, model: Any, samples: dict[str, Tensor]) -> tuple[Tensor, str]:
        """Pictures [B * frames, H, W, 3] in [0, 1] of the latents' size times 8, and a sentence."""
        sampling = model.model_options.get(KEY)
        if sampling is None:
            raise ValueError("this model is not region-adaptive: connect the output of the node RegionAdaptive.")
        records = ras_compile.trace(sampling.compiled)
        batch, size = samples["samples"].shape[0], tuple(samples["samples"].shape[2:])
        tokens = max((record.active for record in records), default=0)
        # latents are padded to whole patches
        grids = [(*size[:-2], -(-size[-2] // patch), -(-size[-1] // patch)) for patch in (1, 2, 4)]
        grid = next((grid for grid in grids if math.prod(grid) == tokens), None)
        if grid is None:
            raise ValueError(
                "there is no map of these samples: connect the LATENT that a sampler just made with this model."
            )
        counts = torch.zeros(batch, tokens)
        for record in records:
            rows = torch.arange(tokens)[None] if record.rows is None else record.rows.cpu()
            computed = torch.zeros(len(rows), tokens).scatter_(1, rows, 1.0)
            counts += computed.reshape(-1, batch if len(rows) % batch == 0 else 1, tokens).mean(0)  # over the branches
        low, high = counts.aminmax()
        maps = ((counts - low) / (high - low).clamp_min(1e-6)).reshape(-1, 1, *grid[-2:])
        maps = torch.nn.functional.interpolate(maps, size=(8 * size[-2], 8 * size[-1]))
        sparse = [record.active for record in records if record.kind == "sparse"]
        share = f" at {100 * sum(sparse) / len(sparse) / tokens:.0f} % of {tokens:,} tokens" if sparse else ""
        told = f"{len(records)} calls: {len(records) - len(sparse)} dense, {len(sparse)} sparse{share}"
        return maps.movedim(1, -1).expand(-1, -1, -1, 3).contiguous(), told


NODE_CLASS_MAPPINGS = {"RegionAdaptive": RegionAdaptive, "RegionAdaptiveFocusMap": FocusMap}
NODE_DISPLAY_NAME_MAPPINGS = {
    "RegionAdaptive": "Region-adaptive sampling",
    "RegionAdaptiveFocusMap": "Region-adaptive sampling: focus map",
}
