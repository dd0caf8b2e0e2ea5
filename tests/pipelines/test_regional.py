"""Parts that are compiled by themselves (diffusers' `compile_repeated_blocks`): the whole model is compiled in their place."""

import pytest
import torch
from contract import error
from pipelines import EAGER, draw_flux, flux, kinds
from torch import nn
from torch.nn import functional as F

import ras_compile
from ras_compile import notices


def by_blocks(transformer, **options):
    transformer.compile_repeated_blocks(**{"backend": "eager", "fullgraph": True, **options})


def by_wrapping(transformer):
    for blocks in (transformer.transformer_blocks, transformer.single_transformer_blocks):
        for index, block in enumerate(blocks):
            blocks[index] = torch.compile(block, backend="eager")


def by_our_backend(transformer):
    by_blocks(transformer, backend="ras", fullgraph=False)


def compiled_parts(module):
    return [part for part in module.modules() if part is not module and part._compiled_call_impl is not None]


def ready():
    torch._dynamo.reset()
    notices.reset()
    pipe = flux()
    pipe.set_progress_bar_config(disable=True)
    return pipe, draw_flux(pipe)


@pytest.mark.parametrize("regional", [by_blocks, by_wrapping, by_our_backend])
def test_blocks_that_are_compiled_are_no_obstacle(regional):
    pipe, plain = ready()
    regional(pipe.transformer)
    before = compiled_parts(pipe.transformer)
    with pytest.warns(ras_compile.RASWarning, match="compiled in their place until detach"):
        handle = ras_compile.attach(pipe, **EAGER, sample_ratio=1.0)
    assert error([draw_flux(pipe)], [plain]) < 1e-4
    assert kinds(ras_compile.trace(handle)) == "ddssss"
    handle.detach()
    assert compiled_parts(pipe.transformer) == before


@pytest.mark.parametrize("drawn", [False, True])
def test_blocks_that_are_compiled_later(drawn):
    pipe, plain = ready()
    with ras_compile.attach(pipe, **EAGER, sample_ratio=1.0) as handle:
        if drawn:
            draw_flux(pipe)
        by_blocks(pipe.transformer)
        assert error([draw_flux(pipe)], [plain]) < 1e-4
        assert kinds(ras_compile.trace(handle)) == "ddssss"
    assert compiled_parts(pipe.transformer)


@torch.no_grad()
def draw(model, steps=6):
    image, lengths = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([3])
    for step in range(steps):
        image = image - 0.1 * model(image, torch.tensor([1 - step / steps]), lengths)
    return image


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.inward, self.outward = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, tokens, time):
        query, key, value = self.inward(self.norm(tokens) + time[:, None]).unsqueeze(1).chunk(3, -1)
        return tokens + self.outward(F.scaled_dot_product_attention(query, key, value)[:, 0])


class Reading(nn.Module):
    """A model whose code reads a value, so that Dynamo breaks it and it is traced."""

    def __init__(self):
        super().__init__()
        self.inward, self.outward = nn.Linear(4, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, image, timestep, lengths):
        tokens, time = self.inward(image) * int(lengths.max()), timestep[:, None].expand(-1, 16).sin()
        for block in self.blocks:
            tokens = block(tokens, time)
        return self.outward(tokens)


@pytest.mark.parametrize("wrapped", [False, True])
def test_blocks_that_are_compiled_in_a_model_that_is_traced(wrapped):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Reading().eval()
    plain = draw(model)
    for index, block in enumerate(model.blocks):
        if wrapped:
            model.blocks[index] = torch.compile(block, backend="eager")
        else:
            block.compile(backend="eager", fullgraph=True)
    calls = [part.forward if wrapped else part._compiled_call_impl for part in model.blocks]
    options = {**EAGER, "sample_ratio": 1.0}
    compiled = torch.compile(model, backend="ras", options=options)
    with ras_compile.generation(num_steps=6) as generation:

        def called(*given):
            generation.step()
            return compiled(*given)

        assert error([draw(called)], [plain]) < 1e-4
    assert kinds(ras_compile.trace(compiled)) == "ddssss"
    assert [part.forward if wrapped else part._compiled_call_impl for part in model.blocks] == calls
