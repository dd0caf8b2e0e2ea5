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

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 8)

    def forward(self, hidden_states, timestep):
        return self.head(hidden_states.mean((2, 3))) * timestep[:, None]


class Sum(Patches):
    """Two inputs of one size."""

    def forward(self, first, second, timestep):
        return super().forward(first + second, timestep)


class Listed(Patches):
    """A list of samples."""

    def forward(self, latents, timestep):
        return super().forward(torch.stack(latents), timestep)


class Counted(Patches):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter.calls = nn.Buffer(torch.zeros(()))

    def cut(self, latent):
        self.enter.calls += 1
        return super().cut(latent)


class Wrapped(Patches):
    """Pads an odd side in front of the picture, with what stands on its other side."""

    def cut(self, latent):
        return super().cut(nn.functional.pad(latent, (0, 0, 1, 0), mode="circular"))


class Keywords(Patches):
    """Names none of its arguments but the latent."""

    def forward(self, hidden_states, **given):
        return super().forward(hidden_states, given["timestep"])


class Pipe:
    """A pipeline that holds a transformer and says nothing of steps."""

    scheduler = None
    config: dict = {}


def call(height=8, width=12):
    generator = torch.Generator().manual_seed(3)
    return dict(hidden_states=torch.randn(1, 4, height, width, generator=generator), timestep=torch.ones(1))


CASES = {
    "mask of values": (MaskOfValues, call(), "mask computed from the latent's values; masks of positions.*test_bad_input"),
    "odd side": (Patches, call(7, 12), "side of 7 that the patch size 2 does not divide.*test_bad_input"),
    "a side that is padded": (Wrapped, call(7, 12), "lost in aten.pad.*test_bad_input"),
    "a counter": (Counted, call(), r"writes into its inputs or buffers \((enter\.)?calls\)"),
    "no tokens": (Summary, call(), "no output carries the token grid of `hidden_states`"),
    "not a grid": (nn.Linear, dict(input=torch.randn(2, 4)), "no token grid"),
    "no samples": (Patches, dict(hidden_states=torch.ones(0, 4, 8, 12), timestep=torch.ones(0)),
                   r"`hidden_states` \[0, 4, 8, 12\] is empty"),
    "ambiguous": (Sum, dict(first=call()["hidden_states"], second=torch.randn(1, 4, 8, 12), timestep=torch.ones(1)),
                  "'first' and 'second' could each be the latent; the option latent="),
    "a list": (Listed, dict(latents=list(torch.randn(2, 4, 8, 12)), timestep=torch.ones(2)),
               "'latents' holds 2 latents, each a picture of its own"),
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
        assert all(type(buffer) in (torch.Tensor, nn.Buffer) for buffer in model.buffers())
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
    explanation = ras_compile.explain(Keywords(), options={"latent": "hidden_states"}, **call())
    assert explanation.supported and explanation.latent == "hidden_states"


def test_the_option_timestep_has_to_name_an_argument():
    complaint = "option timestep='time' names no argument of Patches.forward; there are 'hidden_states', 'timestep'"
    with pytest.raises(ras_compile.ConfigError, match=complaint):
        ras_compile.explain(Patches(), options={"timestep": "time"}, **call())
    pipe = Pipe()
    pipe.transformer = Patches()
    with pytest.raises(ras_compile.ConfigError, match=complaint):
        ras_compile.attach(pipe, timestep="time")
    torch._dynamo.reset()
    compiled = torch.compile(Patches(), backend="ras", options={"timestep": "time", "inner_backend": "eager"})
    with pytest.raises(ras_compile.ConfigError, match=complaint), torch.no_grad():
        compiled(**call())
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


def public_misuse():
    """What somebody who has not read the manual may try, and a part of the answer."""
    explanation = ras_compile.explain(Patches(), **call())
    yield "a pipeline's class", lambda: ras_compile.attach(Pipe), "Pipe is a class: give Pipe.from_pretrained"
    yield "nothing", lambda: ras_compile.attach(None), "attach takes a loaded diffusers pipeline, not None"
    yield (
        "a transformer",
        lambda: ras_compile.attach(Patches()),
        "attach takes a loaded diffusers pipeline, not Patches",
    )
    yield "options in one", lambda: ras_compile.attach(Pipe(), options={}), "attach takes options by name"
    yield "explain nothing", lambda: ras_compile.explain(None), "explain takes a transformer.*not NoneType"
    pipe = Pipe()
    pipe.transformer = Patches()
    yield "explain a pipeline", lambda: ras_compile.explain(pipe, **call()), "not Pipe; give its .transformer"
    yield "no inputs", lambda: ras_compile.explain(Patches()), "missing 2 required positional arguments"
    yield "options no dictionary", lambda: ras_compile.explain(Patches(), options="x", **call()), "dictionary, not str"
    yield "a ratio of two", lambda: explanation.speedup(2), "sample_ratio=2"
    yield "a ratio of zero", lambda: explanation.speedup(0), "sample_ratio=0"
    yield "no steps", lambda: explanation.speedup(0.5, num_steps=0), "num_steps=0"
    yield "steps of text", lambda: explanation.speedup(0.5, num_steps="28"), "num_steps='28'"
    yield "no steps to reach it", lambda: explanation.ratio_for(1.2, num_steps=0), "num_steps=0"
    yield "out of reach", lambda: explanation.ratio_for(99), r"99 is out of reach.*1\.00 to \d\.\d+ can be had"
    yield "no model", lambda: ras_compile.explain(Summary(), **call()).speedup(), "no output carries the token grid"
    for function in (ras_compile.trace, ras_compile.release):
        yield f"{function.__name__} of nothing", lambda f=function: f(None), "handle.*not NoneType"
        yield f"{function.__name__} of a pipeline", lambda f=function: f(pipe), "handle.*not Pipe itself"
    yield "steps in words", lambda: ras_compile.generation("four").__enter__(), r"generation\(num_steps='four'\)"
    yield (
        "an option misspelt",
        lambda: ras_compile.RASConfig.from_options({"sampling_ratio": 1}),
        "Did you mean 'sample_ratio'",
    )


def test_misuse_of_what_is_public_is_answered_in_a_sentence():
    seen = set()
    for name, misuse, answer in public_misuse():
        with pytest.raises((TypeError, ras_compile.RASError)) as caught:
            misuse()
        assert re.search(answer, str(caught.value)), (name, str(caught.value))
        seen.add(name)
    assert len(seen) == 21


def test_a_branch_has_a_name_and_a_run_the_steps_that_were_said():
    with ras_compile.generation(num_steps=1) as gen:
        gen.step()
        with pytest.raises(ras_compile.ConfigError, match=r"branch\(3\)"), gen.branch(3):
            pass
        with pytest.warns(ras_compile.RASWarning, match=r"generation\(num_steps=1\).*more often"):
            gen.step()
    for misuse in (gen.step, gen.branch("cond").__enter__):
        with pytest.raises(ras_compile.ConfigError, match=r"has ended.*belong inside `with ras_compile.generation"):
            misuse()
