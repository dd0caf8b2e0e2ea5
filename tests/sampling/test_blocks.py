"""A block of a transformer, or a fragment of a model that Dynamo broke, must not be taken for the whole: it runs dense."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from torch import Tensor, nn
from zoo import ZOO, redraw

import ras_compile
from ras_compile.config import RASConfig
from ras_compile.dispatch.traced import TracedModel, here
from ras_compile.errors import RASWarning, UnsupportedGraph

OPTIONS = {"inner_backend": "eager", "sample_ratio": 0.25, "warmup_steps": 1, "reset_interval": None}
DIM, TOKENS, STEPS = 8, 16, 5


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(hidden + embedded).chunk(3, -1))
        return hidden + self.out(nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1))


class TwoStreams(nn.Module):
    """Returns the text first: the tokens are its second output."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(this, tokens: Tensor, text: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        joint = this.attention(torch.cat([text, tokens], 1), embedded)
        return joint[:, : text.shape[1]], joint[:, text.shape[1] :]


class Timed(nn.Module):
    """Its `timestep` is a vector of features."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, hidden: Tensor, timestep: Tensor) -> Tensor:
        return self.attention(hidden, timestep.unsqueeze(1))


class Refiner(nn.Module):
    """Has the time itself."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.attention = nn.Linear(1, DIM), Attention()

    def forward(self, text: Tensor, timestep: Tensor) -> Tensor:
        return self.attention(text, self.time(timestep.reshape(-1, 1, 1)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave, self.time = nn.Linear(4, DIM), nn.Linear(DIM, 4), nn.Linear(1, DIM)
        self.refiner, self.alone = Refiner(), Attention()
        self.doubles, self.singles = nn.ModuleList(TwoStreams() for _ in range(2)), nn.ModuleList(Timed() for _ in "ab")

    def forward(this, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        x, embedded = this.enter(hidden_states), this.time(timestep.reshape(-1, 1, 1))
        text = this.refiner(text, timestep)
        for block in this.doubles:
            text, x = block(x, text, embedded)
        x = torch.cat([text, x], 1)
        for block in this.singles:
            x = block(x, embedded.squeeze(1))
        return this.leave(this.alone(x, embedded)[:, text.shape[1] :])


class Guided(nn.Module):
    """A module that calls a transformer, and has weights of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.decoder = model, nn.Linear(4, 3)

    def forward(self, latent: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return self.model(hidden_states=latent, timestep=time, text=text)


def error(model: Callable[..., Tensor], expected: nn.Module) -> float:
    """The largest difference in a generation, over the largest value."""
    found, generator = 0.0, torch.Generator().manual_seed(0)
    text = torch.randn(2, 3, DIM, generator=generator)
    with torch.no_grad(), ras_compile.generation(num_steps=STEPS) as gen:
        for step in range(STEPS):
            gen.step()
            given = torch.randn(2, TOKENS, 4, generator=generator), torch.full((2,), 1 - step / STEPS), text
            wanted = expected(*given)
            found = max(found, float((model(*given) - wanted).abs().max() / wanted.abs().max()))
    return found


def compiled_blocks(names: list[str], **more: object) -> Model:
    model = Model().eval()
    for name in names:
        found = getattr(model, name)
        for block in found if isinstance(found, nn.ModuleList) else [found]:
            block.compile(backend="ras", options=OPTIONS | more)
    return model


@pytest.mark.parametrize("names", [["doubles"], ["singles"], ["alone"], ["doubles", "singles", "alone"]], ids=str)
def test_blocks_run_dense(names):
    model = compiled_blocks(names)
    with pytest.warns(RASWarning, match="one block of a transformer .Model calls it"):
        assert error(model, Model().eval()) <= 1e-5


def test_what_a_block_gets_is_of_a_block():
    """The refiner looks like a transformer: it has a timestep."""
    model = compiled_blocks(["refiner", "doubles"])
    with pytest.warns(RASWarning, match="its output is the input of a block"):
        assert error(model, Model().eval()) <= 1e-5


def test_blocks_are_refused_if_asked_to():
    model = compiled_blocks(["singles"], unsupported="error")
    with pytest.raises(UnsupportedGraph, match="compile the whole transformer instead"):
        error(model, Model().eval())


def test_blocks_put_in_place_of_others():
    model = Model().eval()
    model.alone = torch.compile(model.alone, backend="ras", options=OPTIONS)
    with pytest.warns(RASWarning, match="one block of a transformer"):
        assert error(model, Model().eval()) <= 1e-5


def test_a_module_may_call_a_transformer():
    model = Model().eval()
    model.compile(backend="ras", options=OPTIONS)
    assert error(Guided(model), Model().eval()) > 1e-3
    assert [record.kind[0] for record in ras_compile.trace(model)] == list("dssss")


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_a_hook_of_a_model_is_no_model(kind):
    """Its graph takes what the model returned, and has no weights."""
    model = Model().eval()
    if kind == "pre":
        model.register_forward_pre_hook(lambda module, args: (args[0] * 1.0, *args[1:]))
    else:
        model.register_forward_hook(lambda module, args, output: output * 1.0)
    model.compile(backend="ras", options=OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RASWarning)
        assert error(model, Model().eval()) > 1e-3
    assert [record.kind[0] for record in ras_compile.trace(model)] == list("dssss")


@pytest.mark.slow
def test_fragments_of_a_refused_model_run_dense():
    """In a model of four blocks one that a cache has taken over holds a good part of the weights."""
    case = ZOO["Flux"]
    built = case.build()
    torch.manual_seed(0)
    model = redraw(type(built).from_config({**built.config, "num_layers": 2, "num_single_layers": 2})).eval()
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=1e-9))
    expected, given = copy.deepcopy(model), case.inputs()
    compiled = torch.compile(model, backend="ras", options=OPTIONS)
    with (
        pytest.warns(RASWarning, match="has a hook of diffusers"),
        torch.no_grad(),
        ras_compile.generation(num_steps=4) as gen,
    ):
        for _ in range(4):
            gen.step()
            given[case.region] = torch.randn_like(given[case.region])
            with model.cache_context("picture"), expected.cache_context("picture"):
                torch.testing.assert_close(compiled(**given)[0], expected(**given)[0])


def test_no_fragment_of_a_refused_model_is_the_whole():
    """Whatever its graph looks like."""
    model = Model().eval()
    refused = TracedModel(model, torch.compile(model, backend="ras", options=OPTIONS), RASConfig.from_options(OPTIONS))
    assert error(lambda *given: refused.fall_back(given, {}), Model().eval()) <= 1e-5
    assert not here.falling_back
