"""A block for diffusers' modular pipelines: put it anywhere before the denoising loop, and the loop samples region-adaptively.

    from diffusers.modular_pipelines.stable_diffusion_3 import StableDiffusion3AutoBlocks

    blocks = StableDiffusion3AutoBlocks()
    blocks.sub_blocks.insert("region_adaptive", RegionAdaptiveStep({"context": "frozen"}), 0)
    pipe = blocks.init_pipeline()
    pipe.update_components(...)
    state = pipe(prompt="a red apple", ras_preset="fast")
    print(state.get("ras_handle"))

The block attaches to the pipeline's transformers when it runs first; after that it changes options alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks, OutputParam, PipelineState

import ras_compile

__all__ = ["RegionAdaptiveStep"]

# By pipeline. Two blocks of one pipeline, or one in two workflows of it, share what the first has attached.
_handles: weakref.WeakKeyDictionary[Any, ras_compile.Handle] = weakref.WeakKeyDictionary()


class RegionAdaptiveStep(ModularPipelineBlocks):
    """Attaches to the pipeline, or changes the options of what is attached.

    Args:
        options: of `ras_compile.attach`; those of a call rule over them.
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.options = dict(options or {})

    @property
    def description(self) -> str:
        return "Makes the transformer sample region-adaptively: a step computes the parts of the picture that need it."

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("ras_preset", type_hint=str, description="fast, balanced, quality or paper"),
            InputParam("ras_options", type_hint=dict, description="options of the handle's `configure`, for this call"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam(
                "ras_handle", type_hint=ras_compile.Handle, description="tells afterwards what was saved, and where"
            )
        ]

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Runs before the loop.

        Raises:
            ConfigError: a bad option, one that needs another compilation, or a pipeline without a transformer.
        """
        given = self.get_block_state(state)
        runtime = {**({"preset": given.ras_preset} if given.ras_preset else {}), **(given.ras_options or {})}
        handle = _handles.get(components)
        if handle is None or not handle.transformers:  # nobody has attached, or somebody has detached since
            handle = _handles[components] = ras_compile.attach(components, **self.options)
        if runtime:
            handle.configure(**runtime)
        given.ras_handle = handle
        self.set_block_state(state, given)
        return components, state
