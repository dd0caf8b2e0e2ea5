"""Inputs and models that cannot be sampled adaptively: one clear error, or dense with one warning, and what is allowed."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

import ras_compile

EAGER = {"inner_backend": "eager", "warmup_steps": 1, "reset_interval": None}


class Patches(nn.Module):
    """`b 4 h w -> b 4 h w` by patches of two and one attention; ``cut`` makes the patches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Conv2d(4, 8, 2, stride=2), nn.Linear(8, 16)
        self.qkv = nn.Linear(8, 24)

    def cut(self, latent):
        return self.enter(latent)

    def mask(self, x):
        return None

    def forward(self, hidden_states, timestep):
        x = self.cut(hidden_states)
        height, width = x.shape[2:]
        x = x.flatten(2).mT + timestep.reshape(-1, 1, 1)
        q, k, v = (part[:, None] for part in self.qkv(x).chunk(3, -1))
        x = self.leave(x + nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x))[:, 0])
        x = x.reshape(len(x), height, width, 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(len(x), 4, 2 * height, 2 * width)


class Viewed(Patches):
    """Its patches are views: a side that two does not divide is an error of the model."""

    def cut(self, latent):
        b, c, h, w = latent.shape
        return super().cut(latent.view(b, c, h // 2, 2, w // 2, 2).reshape(b, c, h, w))


class ViewedAndBroken(Viewed):
    """The same, and its code reads a value."""

    def cut(self, latent):
        return super().cut(latent) * int(torch.ones(2).sum())


class MaskOfValues(Patches):
    """Dark tokens are not attended to: a mask that hangs on the latent."""

    def mask(self, x):
        return (x.mean(-1) > x.mean() - 9)[:, None, None, :]


class MaskOfPlaces(Patches):
    """Tokens attend to those before them: the same mask at each step."""

    def mask(self, x):
        return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()


class Summary(nn.Module):
    """`b c h w -> b 8`: no tokens come out."""

    def forward(self, hidden_states, timestep):
        return hidden_states.mean((2, 3)).repeat(1, 2) * timestep[:, None]


class Sum(Patches):
    """Two inputs of one size."""

    def forward(self, first, second, timestep):
        return super().forward(first + second, timestep)


class Pipe:
    """A pipeline that holds a transformer and says nothing of steps."""

    scheduler = None
    config: dict = {}


def call(height=8, width=12):
    generator = torch.Generator().manual_seed(3)
    return dict(hidden_states=torch.randn(1, 4, height, width, generator=generator), timestep=torch.ones(1))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr("ras_compile.notices._said", set())
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


CASES = {
    "mask of values": (MaskOfValues, call(), "mask computed from the latent's values; masks of positions.*test_bad_input"),
    "odd side": (Patches, call(7, 12), "side of 7 that the patch size 2 does not divide.*test_bad_input"),
    "no tokens": (Summary, call(), "no output carries the token grid of `hidden_states`"),
    "not a grid": (nn.Linear, dict(input=torch.randn(2, 4)), "no token grid"),
    "ambiguous": (Sum, dict(first=call()["hidden_states"], second=torch.randn(1, 4, 8, 12), timestep=torch.ones(1)),
                  "'first' and 'second' could each be the latent; the option latent="),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_dense_with_one_warning_or_one_error(name):
    kind, given, reason = CASES[name]
    model = nn.Linear(4, 4) if kind is nn.Linear else kind()
    with torch.no_grad():
        with pytest.raises(ras_compile.RASError, match=reason):
            torch.compile(model, backend="ras", options={**EAGER, "unsupported": "error"})(**given)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="ras", options=EAGER)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                found = compiled(**given)
        told = [item for item in caught if issubclass(item.category, ras_compile.RASWarning)]
        assert len(told) == 1
        assert torch.allclose(found, model(**given))
    explanation = ras_compile.explain(model, **given)
    assert not explanation.supported
    assert explanation.reason in str(told[0].message)


def test_a_mask_of_places_is_gathered():
    explanation = ras_compile.explain(MaskOfPlaces(), **call())
    assert explanation.supported
    assert any("mask" in (source or "") for _, source in explanation.gathers)


def test_the_option_latent_decides():
    _, given, _ = CASES["ambiguous"]
    explanation = ras_compile.explain(Sum(), options={"latent": "second"}, **given)
    assert explanation.supported and explanation.latent == "second"


def test_the_option_timestep_has_to_name_an_argument():
    complaint = "option timestep='time' names no argument of Patches.forward; there are 'hidden_states', 'timestep'"
    with pytest.raises(ras_compile.ConfigError, match=complaint):
        ras_compile.explain(Patches(), options={"timestep": "time"}, **call())
    pipe = Pipe()
    pipe.transformer = Patches()
    with pytest.raises(ras_compile.ConfigError, match=complaint):
        ras_compile.attach(pipe, timestep="time")
    assert ras_compile.explain(Patches(), options={"timestep": "timestep"}, **call()).supported


def test_a_latent_without_a_grid_is_called_by_its_name():
    given = dict(call(), timestep=torch.ones(1, 1))
    explanation = ras_compile.explain(Patches(), options={"latent": "timestep"}, **given)
    assert "no dimension of `timestep` [1, 1] reaches the output as tokens" in explanation.reason


@pytest.mark.parametrize("kind", [Viewed, ViewedAndBroken])
def test_a_side_on_which_the_model_itself_fails(kind):
    """`explain` and `attach` say what is wrong, and of what sizes the inputs were; plain torch.compile cannot always."""
    given, reason = (
        call(7, 12),
        r"cannot run on these inputs.*multiples of its patch size.*hidden_states \[1, 4, 7, 12\]",
    )
    explanation = ras_compile.explain(kind(), **given)
    assert not explanation.supported
    assert re.search(reason, explanation.reason)
    pipe = Pipe()
    pipe.transformer = kind()
    with ras_compile.attach(pipe, **EAGER), torch.no_grad():
        with pytest.raises(ras_compile.UnusableInput, match=reason) as caught:
            pipe.transformer(**given)
        assert caught.value.__cause__ is not None
        assert pipe.transformer(**call()).shape == (1, 4, 8, 12)
