"""What people use with a pipeline, and how it goes: tried with a tiny FLUX pipeline, and written down as a table.

python tests/support/features.py docs/compatibility.md
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from contract import error
from diffusers.hooks import apply_group_offloading
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from pipelines import EAGER, draw_flux, flux, flux_transformer, kinds, normal, seeded, vae

import ras_compile
from ras_compile import notices
from ras_compile.errors import ConfigError

__all__ = ["BEGIN", "END", "FEATURES", "Feature", "put", "table", "tried"]

BEGIN, END = "<!-- features -->\n", "<!-- /features -->\n"
CPU = torch.device("cpu")
OPTIONS = {**{name: value for name, value in EAGER.items() if name != "unsupported"}, "sample_ratio": 1.0}


@dataclass(frozen=True)
class Feature:
    """What is used.

    Attributes:
        name: as the table has it.
        use: puts it into a pipeline, before `attach` or after it.
        late: it comes after `attach`, and after a picture.
        make: the pipeline.
        draw: the picture.
        options: those of `attach`, beside the others.
        near: how far its picture may be from the plain pipeline's.
    """

    name: str
    use: Callable[[Any], Any]
    late: bool = False
    make: Callable[[], Any] = flux
    draw: Callable[[Any], torch.Tensor] = draw_flux
    options: dict[str, Any] = field(default_factory=dict)
    near: float = 1e-4


def group(pipe: Any, level: str) -> None:
    more = {"num_blocks_per_group": 1} if level == "block_level" else {}
    apply_group_offloading(pipe.transformer, onload_device=CPU, offload_device=CPU, offload_type=level, **more)


def offloaded(pipe: Any) -> None:
    accelerate.cpu_offload_with_hook(pipe.transformer, CPU)


def sequential(pipe: Any) -> None:
    for module in (pipe.transformer, pipe.vae):
        accelerate.cpu_offload(module, CPU, offload_buffers=True)


def mapped(pipe: Any) -> None:
    parts = {name: "cpu" for name, _ in pipe.transformer.named_children()}
    accelerate.dispatch_model(pipe.transformer, parts, main_device="cpu", force_hooks=True)


def casting(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def blocks(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)


def hooked(pipe: Any) -> None:
    for block in pipe.transformer.transformer_blocks:
        block.register_forward_hook(lambda module, given, result: tuple(1.0 * value for value in result))


def first_block_cache(pipe: Any) -> None:
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e-9))


def noisy(pipe: Any) -> None:
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)


def guided() -> Any:
    return flux(transformer=flux_transformer(guidance_embeds=False))


def nothing(pipe: Any) -> None:
    pass


def modular() -> Any:
    pipe = FluxCoreDenoiseStep().init_pipeline()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.update_components(transformer=flux_transformer(guidance_embeds=True), scheduler=scheduler)
    return pipe


def draw_modular(pipe: Any) -> torch.Tensor:
    prompt = {"prompt_embeds": normal(1, 3, 16, seed=1), "pooled_prompt_embeds": normal(1, 8, seed=2)}
    return pipe(**prompt, height=128, width=192, num_inference_steps=6, generator=seeded(), output="latents")


def unet() -> Any:
    small = {"block_out_channels": (4, 8), "layers_per_block": 1, "cross_attention_dim": 8, "norm_num_groups": 2}
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(sample_size=8, down_block_types=down, up_block_types=up, attention_head_dim=2, **small),
        scheduler=diffusers.DDIMScheduler(), vae=vae(), text_encoder=None, tokenizer=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


FEATURES = (
    Feature("`compile_repeated_blocks()`, then `attach`", blocks),
    Feature("`attach`, then `compile_repeated_blocks()`", blocks, late=True),
    Feature("`enable_model_cpu_offload()`", offloaded),
    Feature("`enable_model_cpu_offload()` and `cache_device=\"cpu\"`", offloaded, options={"cache_device": "cpu"}),
    Feature("`enable_model_cpu_offload()` and `cache_dtype=\"float8\"`", offloaded, options={"cache_dtype": "float8"}, near=0.02),
    Feature("`enable_sequential_cpu_offload()`", sequential),
    Feature("`enable_group_offload()`, by blocks", lambda pipe: group(pipe, "block_level")),
    Feature("`enable_group_offload()`, by leaves", lambda pipe: group(pipe, "leaf_level")),
    Feature("`enable_layerwise_casting()`, then `attach`", casting),
    Feature("`attach`, then `enable_layerwise_casting()`", casting, late=True),
    Feature("`device_map` that splits the transformer", mapped),
    Feature("VAE tiling and slicing", lambda pipe: (pipe.vae.enable_tiling(), pipe.vae.enable_slicing())),
    Feature("forward hooks on blocks", hooked),
    Feature("`fuse_qkv_projections()`", lambda pipe: pipe.transformer.fuse_qkv_projections()),
    Feature("`set_attention_backend('native')`", lambda pipe: pipe.transformer.set_attention_backend("native")),
    Feature("a scheduler that adds noise", noisy),
    Feature("guidance in two calls (`true_cfg_scale`)", nothing, make=guided),
    Feature("a modular pipeline", nothing, make=modular, draw=draw_modular),
    Feature("a cache of diffusers (`enable_cache`)", first_block_cache),
    Feature("a transformer that is compiled already", lambda pipe: pipe.transformer.compile(backend="eager")),
    Feature("a UNet", nothing, make=unet),
)  # fmt: skip


def tried(feature: Feature) -> tuple[str, str]:
    """``(how it goes, what is said)``: it goes "sparse", "dense" or "refused". The picture is that of the plain pipeline."""
    torch._dynamo.reset()
    notices.reset()
    pipe, plain = feature.make(), feature.make()
    for each in (pipe, plain):
        each.set_progress_bar_config(disable=True)
    feature.use(plain)

    def draw(pipe: Any) -> torch.Tensor:
        torch.manual_seed(0)  # what a scheduler draws
        return feature.draw(pipe)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ras_compile.RASWarning)
        if not feature.late:
            feature.use(pipe)
        try:
            handle = ras_compile.attach(pipe, **OPTIONS, **feature.options)
        except ConfigError as refusal:
            return "refused", str(refusal)
        with handle:
            if feature.late:
                draw(pipe)
                feature.use(pipe)
            picture = draw(pipe)
            how = "sparse" if kinds(ras_compile.trace(handle)).count("s") else "dense"
    assert error([picture], [draw(plain)]) < feature.near, feature.name
    said = [
        str(entry.message).removeprefix("ras_compile: ") for entry in caught if entry.category is ras_compile.RASWarning
    ]
    return how, " ".join(said)


def table() -> str:
    """The table, from what happens."""
    rows = ["| what you use | how it goes | what is said |", "| --- | --- | --- |"]
    for feature in FEATURES:
        how, said = tried(feature)
        rows.append(f"| {feature.name} | {how} | {said} |")
    return "\n".join(rows) + "\n"


def put(page: str, rows: str) -> str:
    """The page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + "\n" + rows + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(put(path.read_text(), table()))
