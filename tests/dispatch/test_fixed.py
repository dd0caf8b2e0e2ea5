"""An order of tokens in a buffer: plans rest on its values, and another order gets another plan."""

from __future__ import annotations

import pytest
import torch
from handwritten import MODELS

import ras_compile
from ras_compile.dispatch.fixed import Fixed


def run(model, latents, **options):
    compiled = torch.compile(
        model, backend="ras", options={"inner_backend": "eager", "sample_ratio": 1.0, "warmup_steps": 1, **options}
    )
    others = {name: value for name, value in MODELS["base"].inputs().items() if name != "latent"}
    with torch.no_grad(), ras_compile.generation(num_steps=len(latents)) as generation:
        found = []
        for latent in latents:
            generation.step()
            found.append(compiled(latent, *others.values()))
    return found, [record.kind for record in ras_compile.trace(compiled)]


@pytest.mark.parametrize("in_place", [True, False])
def test_another_order_is_followed(in_place: bool):
    """With all rows active a sparse step is the model, whatever order its buffer has by now."""
    torch._dynamo.reset()
    model = MODELS["tokens in the order of a buffer"].build().eval()
    latents = [torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    others = list(MODELS["base"].inputs().values())[1:]
    for turn in range(3):
        found, kinds = run(model, latents)
        assert kinds == ["dense", "sparse", "sparse"]
        with torch.no_grad():
            for latent, noise in zip(latents, found, strict=True):
                torch.testing.assert_close(noise, model(latent, *others), rtol=1e-4, atol=1e-5)
        order = torch.randperm(24, generator=torch.Generator().manual_seed(turn))
        if in_place:
            model.order.copy_(order)
        else:
            model.order = torch.nn.Buffer(order)


def test_values_are_told_apart_by_what_they_are():
    from ras_compile.capture.inputs import GraphInput

    inputs = [GraphInput("latent", "latent"), GraphInput(None, "order", weight=True)]
    latent, order = torch.randn(2), torch.arange(4)
    fixed = Fixed(inputs, [latent, order])
    assert fixed.places == [1]
    assert fixed.token([latent, order]) == fixed.token([latent, order.clone()]) == 0
    assert fixed.token([latent, order.flip(0)]) == 1
    order.copy_(order.flip(0))
    assert fixed.token([latent, order]) == 1
    order.copy_(order.flip(0))
    assert fixed.token([latent, order]) == 0
