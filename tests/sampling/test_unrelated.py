"""Calls that are no sampling, of a model that is compiled for it: each is answered as the model answers it.

Validation losses, tables of noise levels, callbacks, several samplers on one model, pairs of latents. What they are given
does not continue what the model returned before.
"""

import pytest
import torch
from tiny import EAGER, LATENT, TEXT, kinds, model, run
from torch import Tensor

import ras_compile
from ras_compile import notices

pytestmark = pytest.mark.filterwarnings("ignore:ras_compile. every transformer call:ras_compile.RASWarning")
TIMES = [0.95, 0.85, 0.7, 0.5, 0.3, 0.15, 0.05]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    notices.reset()


def noise(seed: int) -> Tensor:
    return torch.randn(LATENT.shape, generator=torch.Generator().manual_seed(seed))


def level(clean: Tensor, seed: int, time: float) -> Tensor:
    """A clean picture with noise, as flow matching mixes them."""
    return (1 - time) * clean + time * noise(seed)


def asked(kind: str) -> list[tuple[Tensor, float]]:
    """Latents and times of calls in a row."""
    clean = noise(100)
    return {
        "pure noise": [(noise(n), time) for n, time in enumerate(TIMES)],
        "losses of other pictures": [(level(noise(50 + n), n, time), time) for n, time in enumerate(TIMES)],
        "losses of one picture": [(level(clean, n, time), time) for n, time in enumerate(TIMES)],
        "a table of noise levels": [(level(clean, 0, time), time) for time in TIMES],
        "a table of times": [(clean, time) for time in TIMES],
        "copies at several times": [(clean.clone(), time) for time in TIMES],
        "pairs": [(level(noise(60 + k), 70 + k, time), time) for time in TIMES for k in range(2)],
    }[kind]


KINDS = ["pure noise", "losses of other pictures", "losses of one picture", "a table of noise levels", "a table of times",
         "copies at several times", "pairs"]  # fmt: skip


def check(compiled, plain, latent, time, text=TEXT):
    given = latent, torch.full((len(latent),), time), text
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), plain(*given))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rising", [False, True])
def test_a_compiled_model_that_is_called_outside_of_sampling(kind, rising):
    """Before its first picture, and after one."""
    plain = model()
    compiled = torch.compile(plain, backend="ras", options=EAGER)
    for _ in range(2):
        for latent, time in asked(kind)[:: -1 if rising else 1]:
            check(compiled, plain, latent, time)
        run(compiled, LATENT, TEXT)
        assert kinds(compiled) == "dd" + "ssss"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("said", [False, True])
def test_a_look_at_the_model_in_the_middle_of_a_picture(kind, said):
    """In a generation of its own it is no part of the picture."""
    plain = model()
    compiled = torch.compile(plain, backend="ras", options=EAGER)
    latent, seen = LATENT, ""
    with torch.no_grad(), ras_compile.generation(num_steps=9) as gen:
        for step in range(9):
            if said:
                gen.step()
            latent = latent - compiled(latent, torch.full((2,), 1 - step / 9), TEXT) / 9
            seen = kinds(compiled)
            if step == 5:
                with ras_compile.generation():
                    for other, time in asked(kind)[3:5]:
                        check(compiled, plain, other, time)
    assert seen == "dd" + "s" * 7


def test_a_look_between_two_steps_of_a_loop_that_says_nothing():
    plain = model()
    compiled = torch.compile(plain, backend="ras", options=EAGER)
    latent = LATENT
    with torch.no_grad():
        for step in range(12):
            latent = latent - compiled(latent, torch.full((2,), 1 - step / 12), TEXT) / 12
            if step == 4:
                for seed, time in ((1, 0.6), (2, 0.55), (3, 0.5)):
                    check(compiled, plain, noise(seed), time)
    assert kinds(compiled) == "dd" + "s" * 5


@pytest.mark.parametrize("context", ["shared", "own"])
def test_two_samplers_in_turns(context):
    """Nobody says which call is whose: all run dense, and both pictures are those of the model."""
    plain = model()
    compiled = torch.compile(plain, backend="ras", options=EAGER)
    texts = [TEXT, TEXT if context == "shared" else TEXT + 1]
    latents = [noise(1), noise(2)]
    for step in range(8):
        for which in range(2):
            time = 1 - step / 8
            check(compiled, plain, latents[which], time, texts[which])
            with torch.no_grad():
                latents[which] = latents[which] - plain(latents[which], torch.full((2,), time), texts[which]) / 8
