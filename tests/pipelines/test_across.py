"""A pipeline of diffusers whose transformer runs over two processes: both hold the same picture at the end."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from across import on_a_cpu, on_ranks
from pipelines import draw_flux, draw_wan, flux, normal, wan
from scripts import load

import ras_compile
from ras_compile.errors import RASWarning

pytestmark = pytest.mark.pipelines
(GUIDANCE,) = load(["distributed"], ["guidance"])
OPTIONS = {"inner_backend": "eager", "unsupported": "error"}
PROMPT = {"prompt_embeds": normal(1, 4, 16, seed=1)}  # as many tokens of text for each process


# Pictures that two processes draw, with options that are given while the pipeline is attached.
DEFAULTS = ras_compile.RASConfig()
DRAWN: dict[str, dict[str, Any]] = {
    "all tokens": {"sample_ratio": 1.0},
    **{reuse: {"sample_ratio": DEFAULTS.sample_ratio, "noise_reuse": reuse} for reuse in ("hold", "forecast", "x0")},
    "adds noise": {"noise_reuse": DEFAULTS.noise_reuse},
}
STEPS = {name: 8 if name == "all tokens" else 10 for name in DRAWN}


@pytest.fixture(scope="module")
def over_two() -> list[dict[str, Any]]:
    """What each of two processes draws, and the kinds of its steps: one pair of them draws all pictures."""
    pipe, noisy = flux(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)

    def work(rank: int) -> Any:
        on_a_cpu()
        pipe.transformer.set_attention_backend("native")
        pipe.transformer.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2))
        found = {}
        with ras_compile.attach(pipe, **OPTIONS) as handle:
            for name, options in DRAWN.items():
                if name == "adds noise":
                    pipe.scheduler = noisy
                handle.configure(**options)
                picture = draw_flux(pipe, STEPS[name], **PROMPT)
                found[name] = picture.numpy(), [record.kind for record in ras_compile.trace(handle)]
        return found

    return on_ranks(2, work)


@pytest.mark.parametrize("reuse", ["hold", "forecast", "x0"])
def test_both_hold_the_same_picture(reuse, over_two):
    (first, kinds), (second, others) = (each[reuse] for each in over_two)
    assert kinds == others and set(kinds) == {"dense", "sparse"}
    assert (first == second).all()


def test_what_is_asked_for_in_between_is_drawn(over_two):
    assert (over_two[0]["hold"][0] != over_two[0]["x0"][0]).any()


def test_a_scheduler_that_adds_noise(over_two):
    (first, kinds), (second, _) = (each["adds noise"] for each in over_two)
    assert "sparse" in kinds and (first == second).all()


def test_all_tokens_give_the_picture_of_one_process(over_two):
    picture, kinds = over_two[0]["all tokens"]
    assert "sparse" in kinds
    wanted = draw_flux(flux(), STEPS["all tokens"], **PROMPT)
    torch.testing.assert_close(torch.from_numpy(picture), wanted, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_shared_is_told_to_everyone():
    """In one sentence, before anything is exchanged: nobody waits for another one."""
    pipe = flux()
    config = {**pipe.transformer.config, "num_attention_heads": 3}
    other = flux(transformer=type(pipe.transformer).from_config(config))
    shared = diffusers.ContextParallelConfig(ulysses_degree=2)

    def refused(do: Callable[[], Any]) -> str:
        with pytest.raises(Exception) as told:
            do()
        return str(told.value)

    kinds = dict(sizes={"ulysses_degree": 2, "ulysses_anything": True}, ring={"ring_degree": 2})
    others = {kind: flux() for kind in kinds}

    def work(rank: int) -> Any:
        on_a_cpu()
        for each in (pipe, other):
            each.transformer.set_attention_backend("native")
            each.transformer.enable_parallelism(config=shared)
        said = [refused(lambda: pipe.transformer.enable_parallelism(config=shared))]
        said.append(refused(lambda: ras_compile.attach(other, **OPTIONS)))
        for kind, given in kinds.items():
            others[kind].transformer.enable_parallelism(config=diffusers.ContextParallelConfig(**given))
            said.append(refused(lambda kind=kind: ras_compile.attach(others[kind], **OPTIONS)))
        with ras_compile.attach(pipe, **OPTIONS):
            said.append(refused(lambda: draw_flux(pipe, 2, prompt_embeds=normal(1, 3, 16, seed=1))))
        return said

    for twice, heads, sizes, ring, tokens in on_ranks(2, work):
        assert "cannot be called twice" in twice
        assert (
            heads == "ulysses_degree=2 does not divide the 3 heads of FluxTransformer2DModel; take a degree that does."
        )
        assert sizes.startswith("ulysses_anything asks all processes for their sizes in every call")
        assert ring.startswith("ring_degree=2 needs a kernel that returns the log-sum-exp of attention")
        assert "only where their number divides the tokens of the picture and of the text" in tokens


def test_branches_of_guidance_on_two_processes():
    pipe = wan(transformer_2=None, boundary_ratio=None)
    wanted = draw_wan(pipe, 8)

    def work(rank: int) -> Any:
        warnings.simplefilter("error", RASWarning)  # also where a transformer stands around the attached one
        with ras_compile.attach(pipe, sample_ratio=1.0, **OPTIONS) as handle:
            pipe.transformer = GUIDANCE.OneBranch(pipe.transformer)
            video = draw_wan(pipe, 8)
            return video.numpy(), [record.kind for record in ras_compile.trace(handle)]

    (video, kinds), (other, others) = on_ranks(2, work)
    assert kinds == others and set(kinds) == {"dense", "sparse"}
    assert (video == other).all()
    torch.testing.assert_close(torch.from_numpy(video), wanted, rtol=1e-4, atol=1e-4)
