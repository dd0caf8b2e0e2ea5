"""Alone: `torch.compile(transformer, backend="ras")` in a loop that says nothing about its steps.

FakeTransformer checks at each sparse call that it does not come too early and has the data of the step before; the
tests here say how soon it may come.
"""

import concurrent.futures
import contextvars
import math
import warnings

import pytest
import torch
from fakes import CHANNELS, TOKENS, FakeTransformer, denoise, falling, prompts, rising

import ras_compile
from ras_compile import notices
from ras_compile.errors import RASWarning
from ras_compile.sampling.inference import read_time

TWELVE = "dddd" + "ssssssss"
TWICE = "".join(kind * 2 for kind in TWELVE)


@pytest.mark.parametrize("times", [falling(12), rising(12), [1000 - 50 * step for step in range(12)], [None] * 12])
@pytest.mark.parametrize("in_place", [False, True])
def test_one_branch(times, in_place):
    model = FakeTransformer()
    denoise(model, times, prompts("cond"), in_place=in_place)
    assert model.kinds() == TWELVE


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("fresh_latent", [False, True])
@pytest.mark.parametrize("steps", [falling(12), rising(12)])
def test_two_branches(steps, in_place, fresh_latent):
    model = FakeTransformer()
    denoise(model, steps, prompts("cond", "uncond"), in_place=in_place, fresh_latent=fresh_latent)
    assert model.kinds() == TWICE


@pytest.mark.parametrize("in_place", [False, True])
def test_inference_tensors_have_no_version(in_place):
    model = FakeTransformer()
    with torch.inference_mode():
        denoise(model, falling(12), prompts("cond", "uncond"), in_place=in_place)
    assert model.kinds() == TWICE


def test_no_context_at_all():
    model = FakeTransformer()
    for _ in range(2):
        denoise(model, falling(12), {"only": ()})
        assert model.kinds() == TWELVE


def test_prompts_of_two_lengths_are_two_branches():
    model = FakeTransformer()
    denoise(model, falling(12), {**prompts("cond", length=5), **prompts("uncond", length=3)})
    assert model.kinds() == TWICE


@pytest.mark.parametrize("same_prompt", [True, False])
@pytest.mark.parametrize("times", [falling, rising])
def test_picture_after_picture(times, same_prompt):
    model = FakeTransformer()
    contexts = prompts("cond", "uncond")
    for steps in (12, 12, 6):
        denoise(model, times(steps), contexts)
        assert model.kinds() == TWICE[: 2 * steps]
        contexts = contexts if same_prompt else prompts("cond", "uncond")


@pytest.mark.parametrize("away", [0.0, 0.05])
def test_picture_after_picture_of_almost_one_noise_where_nothing_says_the_time(away):
    """All that lies between the last latent and such a first one is the noise of the steps, so that this alone tells nothing."""
    model, contexts, latent = FakeTransformer(), prompts("cond"), torch.randn(1, TOKENS, CHANNELS)
    for picture in range(3):
        denoise(model, [None] * 12, contexts, latent=latent + away * picture * torch.randn_like(latent))
        assert model.kinds() == TWELVE


@pytest.mark.parametrize("stop", range(1, 12))
@pytest.mark.parametrize("times", [falling, rising])
@pytest.mark.parametrize("same_prompt", [True, False])
def test_an_aborted_run_then_a_shorter_one(stop, times, same_prompt):
    model = FakeTransformer()
    contexts = prompts("cond", "uncond")
    denoise(model, times(28), contexts, stop=stop)
    denoise(model, times(10), contexts if same_prompt else prompts("cond", "uncond"))
    assert model.kinds() == "dd" * 4 + "ss" * 6


@pytest.mark.parametrize("time", [1000.0, 500.0, 1.0])
def test_a_call_to_warm_up_before_the_run(time):
    model = FakeTransformer()
    contexts = prompts("cond")
    denoise(model, [torch.tensor([time])], contexts)
    denoise(model, falling(12), contexts)
    assert model.kinds().lstrip("d") == "s" * model.kinds().count("s") and model.kinds().count("s") >= 6


@pytest.mark.parametrize("same_prompt", [True, False])
def test_the_same_call_again_is_no_step(same_prompt):
    model = FakeTransformer()
    contexts, latent = prompts("cond"), torch.randn(1, TOKENS, CHANNELS)
    for _ in range(9):
        model(latent, torch.tensor([1000.0]), *contexts["cond"], truth=(0, "cond", 0))
    denoise(model, falling(12), contexts if same_prompt else prompts("cond"), latent=latent)
    assert model.kinds() == TWELVE


def test_starting_late_as_image_to_image_does():
    model = FakeTransformer()
    for start in (20, 5):
        denoise(model, falling(28)[start:][:8], prompts("cond"))
        assert model.kinds() == "ddddssss"


def test_heun_evaluates_twice_at_a_time():
    times = falling(7)
    twice = [times[0], *(time for time in times[1:] for _ in range(2))]
    model = FakeTransformer(reset_interval=None)
    denoise(model, twice, prompts("cond", "uncond"))
    assert model.kinds() == "dd" * 4 + "ss" * 9


def test_pndm_repeats_its_second_time():
    times = falling(12)
    model = FakeTransformer(reset_interval=None)
    denoise(model, [*times[:2], *times[1:]], prompts("cond"))
    assert model.kinds() == "dddd" + "s" * 9


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("names", [("cond",), ("cond", "uncond")])
def test_ties_of_bfloat16(shift, names):
    sigmas = [1 - step / 50 for step in range(50)]
    times = [torch.tensor([1000 * shift * s / (1 + (shift - 1) * s)]).bfloat16() for s in sigmas]
    model = FakeTransformer(reset_interval=None)
    denoise(model, times, prompts(*names))
    cond = model.kinds(branch="cond")
    assert cond.lstrip("d") == "s" * cond.count("s") and cond.count("d") <= 4 + 2


@pytest.mark.parametrize("warmup", [1, 2, 3])
def test_short_warm_up_waits_for_the_direction_of_time(warmup):
    model = FakeTransformer(warmup_steps=warmup, reset_interval=None)
    contexts = prompts("cond")
    denoise(model, [torch.tensor([600.0])], contexts)
    denoise(model, falling(8), contexts)
    dense = model.kinds().count("d")
    assert model.kinds() == "d" * dense + "s" * (8 - dense) and dense <= warmup + 2


def test_per_token_times_are_reduced():
    times = [torch.cat([torch.zeros(1, 5), time.expand(1, 11)], dim=1) for time in falling(12)]
    model = FakeTransformer()
    for _ in range(2):
        denoise(model, times, prompts("cond"))
        assert model.kinds() == TWELVE


@pytest.mark.parametrize("what", ["uncond", "cond"])
def test_branches_that_come_and_go(what):
    """A branch missing in the middle: the other goes on, and the one that comes back starts dense."""
    model = FakeTransformer(reset_interval=None)
    contexts = prompts("cond", "uncond")
    denoise(model, falling(20), contexts, only=lambda name, step: name != what or step < 6 or step >= 10)
    other = "cond" if what == "uncond" else "uncond"
    assert model.kinds(branch=other) == "dddd" + "s" * 16
    assert model.kinds(branch=what) == "dddd" + "ss" + "d" + "s" * 9


def test_a_branch_that_appears_after_the_known_one():
    model = FakeTransformer(reset_interval=None)
    denoise(model, falling(12), prompts("cond", "uncond"), only=lambda name, step: name == "cond" or step >= 6)
    assert model.kinds(branch="cond") == "dddd" + "s" * 8
    assert model.kinds(branch="uncond") == "dsssss"


def test_a_branch_that_appears_before_the_known_one_costs_a_warm_up():
    model = FakeTransformer(reset_interval=None)
    denoise(model, falling(16), prompts("uncond", "cond"), only=lambda name, step: name == "cond" or step >= 6)
    assert model.kinds(branch="cond") == "ddddss" + "dddd" + "s" * 6
    assert model.kinds(branch="uncond") == "dddd" + "s" * 6


def test_contexts_made_anew_but_equal():
    model = FakeTransformer()
    for _ in range(2):
        contexts = prompts("cond", "uncond")
        denoise(model, falling(12), contexts, context_of=lambda context, step: tuple(x.clone() for x in context))
        assert model.kinds() == TWICE


def test_a_branch_vanishes_though_contexts_are_made_anew():
    model = FakeTransformer(reset_interval=None)
    denoise(
        model,
        falling(12),
        prompts("uncond", "cond"),
        only=lambda name, step: name == "cond" or step < 6,
        context_of=lambda context, step: tuple(x.clone() for x in context),
    )
    assert model.kinds(branch="cond") == "dddd" + "s" * 8


@pytest.mark.parametrize("names", [("cond",), ("cond", "uncond")])
def test_residuals_that_move_with_the_latent(names):
    """ControlNet: the prompt stays the same object, the residuals are new at each step."""
    model = FakeTransformer()
    for _ in range(2):
        denoise(
            model,
            falling(12),
            prompts(*names),
            context_of=lambda context, step: (*context, torch.randn(1, TOKENS, 2)),
        )
        assert model.kinds(branch="cond") == TWELVE


def test_a_changed_prompt_starts_over():
    model = FakeTransformer(reset_interval=None)
    context = prompts("cond")
    other = prompts("cond")["cond"][0]
    denoise(
        model,
        falling(16),
        context,
        context_of=lambda context, step: (other if step >= 6 else context[0], context[1]),
    )
    assert model.kinds() == "ddddss" + "dddd" + "s" * 6


def test_an_equal_prompt_in_a_new_object_is_another_run():
    """Two calls of a pipeline with one prompt: equal contexts in new objects, the second begins further along."""
    model = FakeTransformer()
    context = prompts("cond")
    denoise(model, falling(28), context, stop=6)
    denoise(model, falling(28)[14:], {"cond": tuple(value.clone() for value in context["cond"])})
    assert model.kinds().startswith("ddddss")


def test_a_changed_number_is_another_branch():
    model = FakeTransformer()
    prompt = torch.randn(1, 3, 8)
    denoise(model, falling(12), {"plain": (prompt, 1.0), "skip": (prompt, 0.5)})
    assert model.kinds() == TWICE


def test_a_generation_without_steps_marks_the_ends():
    """What nothing else can tell: a run is abandoned, and another with the same contexts goes on further along."""
    model = FakeTransformer()
    contexts = prompts("cond")
    with ras_compile.generation():
        denoise(model, falling(28), contexts, stop=6)
    with ras_compile.generation():
        denoise(model, falling(28)[14:], contexts)
    assert model.kinds().startswith("ddddss")


def test_interleaved_generations_with_help():
    """Generators that take turns, one of them in other threads with copied contexts, and that end in any order."""
    model = FakeTransformer(reset_interval=None)

    def steps(which):
        prompt, latent = prompts("cond")["cond"], torch.randn(1, TOKENS, CHANNELS)
        with ras_compile.generation() as gen:
            for step, time in enumerate(falling(8)):
                gen.step()
                model(latent + step, time, *prompt, truth=(which, "cond", step))
                yield

    runs = [steps(which) for which in range(3)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for _ in range(9):
            next(runs[0], None)
            pool.submit(contextvars.copy_context().run, next, runs[2], None).result()
            next(runs[1], None)
    assert model.kinds(0) == model.kinds(1) == model.kinds(2) == "ddddssss"
    denoise(model, falling(6), prompts("cond"))  # and none is left open
    assert model.kinds() == "ddddss"


@pytest.mark.parametrize("context_of", ["as they are", "shared object", "copies"])
def test_interleaved_generations_without_help_run_dense(context_of):
    model = FakeTransformer()
    contexts = [prompts("cond")["cond"] for _ in range(2)]
    for step, time in enumerate(falling(8)):
        for which in range(2):
            prompt, ids = contexts[which]
            if context_of == "shared object":
                ids = contexts[0][1]
            elif context_of == "copies":
                prompt, ids = prompt.clone(), ids.clone()
            model(torch.randn(1, TOKENS, CHANNELS), time, prompt, ids, truth=(which, "cond", step))
    assert "s" not in model.kinds(0) + model.kinds(1)


def test_a_copied_context_does_not_carry_a_run_into_another_thread():
    model = FakeTransformer()
    contexts, times = prompts("cond"), falling(28)
    denoise(model, times, contexts, stop=6)
    copied = contextvars.copy_context()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(copied.run, denoise, model, times[6:12], contexts).result()
    assert model.kinds() == "ddddss"


def test_a_time_that_never_moves_is_told_once():
    notices.reset()
    model = FakeTransformer()
    with pytest.warns(RASWarning, match="first of a generation"):
        denoise(model, [torch.tensor([1.0])] * 20, prompts("cond"))
    assert "s" not in model.kinds()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        denoise(FakeTransformer(), falling(20), prompts("cond"))


def test_time_is_read_as_documented():
    assert read_time(None) is None and read_time(3) == 3.0 and read_time(torch.tensor([1.0, 7.0])) == 7.0
    assert read_time(torch.zeros(0)) is None and math.isclose(read_time(torch.tensor(0.5).bfloat16()), 0.5)
