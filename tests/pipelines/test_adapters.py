"""What users put into a pipeline's transformer: LoRA (loaded, weighted, fused, unloaded) and IP-Adapters."""

from __future__ import annotations

import pytest
import torch
from contract import error
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from pipelines import EAGER, draw_flux, draw_sd3, flux, kinds, normal, redrawn, sd3

import ras_compile

ALL = {**EAGER, "sample_ratio": 1.0}
SPARSE_FROM_2 = "ddsss"


def lora(seed: int, rank: int = 2) -> dict[str, torch.Tensor]:
    """Weights of a LoRA for the attention of `pipelines.sd3`, as `load_lora_weights` takes them."""
    weights = {}
    for block in range(2):
        for index, name in enumerate(("to_q", "to_k", "to_v", "to_out.0")):
            place = f"transformer.transformer_blocks.{block}.attn.{name}"
            weights[f"{place}.lora_A.weight"] = normal(rank, 16, seed=100 * seed + 10 * block + index)
            weights[f"{place}.lora_B.weight"] = normal(16, rank, seed=100 * seed + 10 * block + index + 5)
    return weights


@pytest.mark.parametrize("before", [True, False])
def test_lora_as_users_load_it(before):
    """Each picture is the plain pipeline's in the same state: no stale weights, and sparse steps all the way."""
    pytest.importorskip("peft")
    pipe, twin = sd3(), sd3()
    for each in (pipe, twin):
        each.set_progress_bar_config(disable=True)
    states = [
        lambda p: p.load_lora_weights(lora(1), adapter_name="one"),
        lambda p: p.load_lora_weights(lora(2), adapter_name="two") or p.set_adapters(["one", "two"], [0.7, 0.3]),
        lambda p: p.disable_lora(),
        lambda p: p.enable_lora() or p.fuse_lora(lora_scale=0.5),
        lambda p: p.unfuse_lora() or p.unload_lora_weights(),
    ]
    if before:
        for each in (pipe, twin):
            states[0](each)
        states = states[1:3]
    pictures = []
    with ras_compile.attach(pipe, **ALL) as handle:
        for change in [lambda p: None, *states]:
            change(pipe)
            change(twin)
            found, wanted = draw_sd3(pipe, steps=3), draw_sd3(twin, steps=3)
            assert error([found], [wanted]) < 1e-4
            assert kinds(ras_compile.trace(handle)) == "dds"
            pictures.append(found)
    changed = [error([one], [two]) for one, two in zip(pictures, pictures[1:], strict=False)]
    assert min(changed) > 1e-3, changed  # every state draws another picture


def ip_sd3():
    pipe = sd3()
    processors = {
        name: redrawn(
            SD3IPAdapterJointAttnProcessor2_0(
                hidden_size=16, ip_hidden_states_dim=16, head_dim=8, timesteps_emb_dim=16, scale=1.0
            ),
            seed,
        )
        for seed, name in enumerate(pipe.transformer.attn_processors)
    }
    pipe.transformer.set_attn_processor(processors)
    pipe.transformer.image_proj = redrawn(
        IPAdapterTimeImageProjection(
            embed_dim=12, output_dim=16, hidden_dim=16, depth=1, dim_head=8, heads=2, num_queries=3, timestep_in_dim=8
        )
    )
    return pipe


def ip_flux():
    pipe = flux()
    image = {"proj.weight": normal(64, 12) / 4, "proj.bias": normal(64), "norm.weight": torch.ones(16)}
    keys = {f"0.to_{part}_ip.weight": normal(32, 16, seed=index) / 4 for index, part in enumerate("kv")}
    keys |= {f"0.to_{part}_ip.bias": normal(32, seed=index) for index, part in enumerate("kv")}
    weights = {"image_proj": {**image, "norm.bias": torch.zeros(16)}, "ip_adapter": keys}
    pipe.transformer._load_ip_adapter_weights(weights, low_cpu_mem_usage=False)
    return pipe


def draw_ip_flux(pipe, seed: int = 9):
    given = {"ip_adapter_image_embeds": [normal(1, 1, 12, seed=seed)]}
    given |= {"negative_ip_adapter_image_embeds": [normal(1, 1, 12, seed=8)]}
    return draw_flux(pipe, steps=5, **given)


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (ip_sd3, lambda pipe, seed=9: draw_sd3(pipe, steps=5, ip_adapter_image_embeds=normal(2, 5, 12, seed=seed))),
        (ip_flux, draw_ip_flux),
    ],
)
def test_ip_adapter(make, draw):
    pipe, pictures = make(), []
    pipe.set_progress_bar_config(disable=True)

    def weigh(scale):
        for processor in pipe.transformer.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [scale] if isinstance(processor.scale, list) else scale

    with ras_compile.attach(pipe, **ALL) as handle:
        for seed, scale in ((7, 0.3), (7, 1.0), (9, 1.0)):  # another weight of the picture, another picture
            weigh(scale)
            pictures.append((seed, scale, draw(pipe, seed)))
            assert kinds(ras_compile.trace(handle)) == SPARSE_FROM_2
        handle.configure(sample_ratio=0.5)
        assert 1e-5 < error([draw(pipe, seed)], [pictures[-1][2]]) < 0.7
    for seed, scale, found in pictures:
        weigh(scale)
        assert error([found], [draw(pipe, seed)]) < 1e-4
    assert error([pictures[0][2]], [pictures[1][2]]) > 1e-3 and error([pictures[1][2]], [pictures[2][2]]) > 1e-3


def test_the_scale_of_a_lora_is_a_number_like_any_other():
    """Dynamo makes the second value variable; it must not be read."""
    pytest.importorskip("peft")
    pipe, scales = sd3(), (0.2, 0.5, 0.9, 0.2)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(lora(1), adapter_name="one")
    plain = [draw_sd3(pipe, joint_attention_kwargs={"scale": scale}) for scale in scales]
    with ras_compile.attach(pipe, **{**EAGER, "sample_ratio": 1.0}) as handle:
        for scale, expected in zip(scales, plain, strict=True):
            assert error([draw_sd3(pipe, joint_attention_kwargs={"scale": scale})], [expected]) < 1e-4
            assert kinds(ras_compile.trace(handle)) == "ddssss"
