"""`noise_reuse`: inactive tokens on the line of their last two noises, or with the clean sample that they had."""

import diffusers
import pytest
import torch
from schedulers import SCHEDULERS as FOLLOWED
from tiny import EAGER, LATENT, TEXT, TinyDiT

import ras_compile
from ras_compile.passes.algebra.layout import Frame
from ras_compile.passes.algebra.tokens import token_view
from ras_compile.pipelines.sample import picture_window, sample_map
from ras_compile.pipelines.samplers import SCHEDULERS, check_clean, clean_coefficients
from ras_compile.sampling.reuse import CleanSample, Extrapolation, active_tokens


def test_a_line_is_continued_exactly():
    """Noise that is linear in time comes back exactly, whenever a token was computed twice and however times are spaced."""
    base, slope = torch.randn(2, 5, 1, 3), torch.randn(2, 5, 1, 3)
    line, held = Extrapolation(), torch.zeros(2, 5, 1, 3)
    for step, time in enumerate((1.0, 0.9, 0.6, 0.5, 0.1)):
        truth = base + time * slope
        rows = None if step < 2 else torch.tensor([[step - 2], [4]])
        active = torch.ones(2, 5, dtype=torch.bool) if rows is None else active_tokens(rows, 5)
        held = torch.where(active[..., None, None], truth, held)
        torch.testing.assert_close(line(held, rows, time), truth, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(held, truth, atol=1e-2)


def test_computed_once_or_at_the_same_time_holds():
    first, second = torch.randn(1, 4, 1, 2), torch.randn(1, 4, 1, 2)
    rows = torch.tensor([[1]])
    line = Extrapolation()
    line(first, None, 3)
    assert torch.equal(line(first, rows, 2), first)
    line = Extrapolation()
    line(first, None, torch.tensor([3.0]))
    line(second, None, torch.tensor([3.0]))  # Heun, PNDM: time stands still
    assert torch.equal(line(second, rows, torch.tensor([2.0])), second)


def test_samples_have_times_of_their_own():
    noise = torch.randn(2, 4, 1, 2)
    line = Extrapolation()
    line(noise, None, torch.tensor([3.0, 3.0]))
    line(noise + 1, None, torch.tensor([2.0, 1.0]))
    ahead = line(noise + 1, torch.tensor([[0], [0]]), torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(ahead[:, 1:] - noise[:, 1:], torch.full((2, 3, 1, 2), 2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_changes_inactive_tokens_alone(dtype):
    """On the same latents: active tokens as with "hold", bit for bit; the others on the line through what "hold" computed."""
    model, outputs = TinyDiT().eval().to(dtype), {}
    latents = [torch.randn_like(LATENT).to(dtype) for _ in range(7)]
    times = [1.0, 0.95, 0.8, 0.6, 0.55, 0.2, 0.1]
    for reuse in ("hold", "linear"):
        compiled = torch.compile(model, backend="ras", options={**EAGER, "noise_reuse": reuse})
        outputs[reuse] = []
        with torch.no_grad(), ras_compile.generation() as gen:
            for latent, time in zip(latents, times, strict=True):
                gen.step()
                outputs[reuse].append(compiled(latent, torch.full((2,), time, dtype=dtype), TEXT.to(dtype)))
        records = ras_compile.trace(compiled)
    assert [record.kind[0] for record in records] == list("ddsssss")
    view = token_view(Frame(tuple(LATENT.shape), ((2,), (4,), (4, 2), (6, 2))).layout(), _frame())
    line = Extrapolation()
    for step, record in enumerate(records):
        # half-precision timesteps are not exact, so there the number of the step is the time
        time = times[step] if dtype == torch.float32 else step
        wanted = line(view(outputs["hold"][step]), record.rows, time)
        torch.testing.assert_close(view(outputs["linear"][step]), wanted, atol=1e-6, rtol=1e-6)
        if record.rows is not None:
            assert not torch.equal(outputs["hold"][step], outputs["linear"][step])


def _frame() -> Frame:
    """Of LATENT: patches of two by two, four times six tokens."""
    frame = Frame.of(LATENT.shape)
    for dim in (2, 3):
        (axis,) = frame.atoms(dim)
        frame = frame.refined(axis.atom, LATENT.shape[dim] // 2)
        frame = frame.without(frozenset([frame.atoms(dim)[1].atom]))
    (channels,) = frame.atoms(1)
    return frame.without(frozenset([channels.atom]))


def test_x0_without_a_scheduler_is_refused():
    compiled = torch.compile(TinyDiT().eval(), backend="ras", options={**EAGER, "noise_reuse": "x0"})
    with torch.no_grad(), pytest.raises(ValueError, match="attach"):
        compiled(LATENT, torch.ones(2), TEXT)


def made(name, **options):
    return getattr(diffusers, name)(**{**FOLLOWED.get(name, {}), **options})


def predictions():
    for name, family in SCHEDULERS.items():
        if family == "flow":
            yield name, {}
        else:
            kinds = ["epsilon", "v_prediction"] + (["flow_prediction"] if family == "own" else [])
            if family == "preserving" and name != "PNDMScheduler":
                kinds.append("sample")
            for kind in kinds:
                yield (
                    name,
                    {
                        "prediction_type": kind,
                        **({"use_flow_sigmas": kind == "flow_prediction"} if family == "own" else {}),
                    },
                )


@pytest.mark.parametrize(("name", "options"), list(predictions()))
def test_the_clean_sample_of_every_scheduler(name, options):
    """A model that knows the truth implies one clean sample at every step, by the scheduler's own way of adding noise."""
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    scheduler = made(name, **options)
    check_clean(scheduler)
    scheduler.set_timesteps(7)
    clean, noise = torch.randn(2, 1, 4, 4, 4, dtype=torch.float64)
    kind = options.get("prediction_type", "flow_prediction")
    probe = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for time in scheduler.timesteps:
        if kind == "flow_prediction":  # time is the noise level; SASolver's add_noise knows no flow
            sigma = (time / 1000).item()
            alpha = 1 - sigma
        else:
            alpha, sigma = (scheduler.add_noise(x, n, time.reshape(1)).item() for x, n in (probe[::-1], probe))
        norm = (alpha**2 + sigma**2) ** 0.5
        sample = alpha * clean + sigma * noise
        prediction = {
            "epsilon": noise,
            "v_prediction": (alpha * noise - sigma * clean) / norm,
            "flow_prediction": noise - clean,
            "sample": clean,
        }[kind]
        a, b = clean_coefficients(scheduler, time)
        torch.testing.assert_close(a * sample + b * prediction, clean, atol=2e-3 / max(alpha, 0.01), rtol=0)
        more = {"old_pred_original_sample": None, "timestep_back": None} if "CogVideoXDPM" in name else {}
        scheduler.step(prediction.float(), timestep=time, sample=sample.float(), **more)


def test_a_scheduler_that_nothing_is_known_of():
    with pytest.raises(ValueError, match="KDPM2DiscreteScheduler.*DDIMScheduler"):
        check_clean(diffusers.KDPM2DiscreteScheduler())
    with pytest.raises(ValueError, match=r"prediction_type.*'epsilon_v'|epsilon, v_prediction"):
        scheduler = diffusers.DDIMScheduler()
        scheduler.register_to_config(prediction_type="epsilon_v")
        check_clean(scheduler)


def test_the_clean_sample_is_held():
    hold = CleanSample()
    a, b = torch.tensor(1.0), torch.tensor(-0.8)
    clean, noise, fresh = torch.randn(3, 1, 2, 3, 3).unbind(0)
    first = noise - clean
    assert torch.equal(hold(first, clean + 0.8 * first, None, a, b), first)
    active = torch.rand(1, 1, 3, 3) > 0.5
    a, b = torch.tensor(1.0), torch.tensor(-0.5)
    sample = 0.5 * clean + 0.5 * fresh  # a sampler that adds noise has other noise in it now
    found = hold(torch.zeros_like(first), sample, active, a, b)
    torch.testing.assert_close(found, torch.where(active, 0.0, fresh - clean), atol=1e-5, rtol=1e-5)


def test_masks_of_tokens_and_of_the_sample():
    view = token_view(_frame().layout(), _frame())
    mapped = sample_map(view, (2, 4, 8, 12), (1, 3, 8, 12))
    tokens = torch.rand(2, 24) > 0.5
    tokens[1] = tokens[0]
    mask = mapped.to_sample(tokens)
    assert mask.shape == (1, 1, 8, 12)
    assert torch.equal(mask[0, 0, ::2, ::2].flatten(), tokens[0]) and torch.equal(mask[..., ::2, :], mask[..., 1::2, :])
    assert torch.equal(mapped.to_tokens(mask.expand(1, 3, 8, 12)), tokens)
    mask = mask.clone()
    mask[0, 0, ::2, ::2] = False  # one pixel of each patch
    assert not mapped.to_tokens(mask).any()
    assert sample_map(view, (2, 4, 8, 12), (1, 4, 8, 10)) is None
    assert sample_map(view, (2, 4, 8, 12), (2, 24, 16)) is None


def test_the_window_of_the_picture():
    latent = torch.randn(2, 10, 4)
    latent[1, :6] = latent[0, :6]
    assert picture_window(latent, latent[:1, :6].clone()) == slice(0, 6)
    assert picture_window(latent, latent[:, 4:].clone()) == slice(4, 10)
    for other in (latent, latent[:, 2:8], latent[:1, :6] + 1e-3, latent[:, :6, :2]):
        assert picture_window(latent, other.clone()) is None
