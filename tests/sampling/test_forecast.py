"""`noise_reuse="forecast"`: lines that are followed as far as they come true, against least squares written with NumPy."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from recorded import Recorded
from tiny import EAGER, LATENT, TEXT, TinyDiT

import ras_compile
from ras_compile import RASConfig
from ras_compile.execute import replay
from ras_compile.sampling.reuse import DECAY, Extrapolation, active_tokens, continued
from ras_compile.sampling.rows import Selection

BATCH, TOKENS, PIXELS, CHANNELS = 2, 6, 1, 3


class Reference:
    """What each token returns, token by token."""

    def __init__(self) -> None:
        self.points = [[[] for _ in range(TOKENS)] for _ in range(BATCH)]  # (time, noise) at which each was computed
        self.slopes = np.zeros((BATCH, TOKENS, PIXELS, CHANNELS))
        self.products = [[] for _ in range(BATCH)]  # of each step: change times line, line squared

    def __call__(self, truth: np.ndarray, active: np.ndarray, times: list[float]) -> tuple[np.ndarray, list[float]]:
        returned, alphas = truth.copy(), []
        for sample, points in enumerate(self.points):
            lines, changes, now = [], [], times[sample]
            for token in np.flatnonzero(active[sample]):
                if points[token]:
                    time, noise = points[token][-1]
                    if now != time:
                        lines.append(self.slopes[sample, token] * (now - time))
                        changes.append(truth[sample, token] - noise)
                        self.slopes[sample, token] = changes[-1] / (now - time)
                points[token].append((now, truth[sample, token].copy()))
            self.products[sample].append((np.sum(np.multiply(changes, lines)), np.sum(np.square(lines))))
            weights = DECAY ** np.arange(len(self.products[sample]))[::-1]
            over, under = (weights[:, None] * np.array(self.products[sample])).sum(0)
            alphas.append(float(np.clip(over / under, 0, 1)) if under else 0.0)
            for token in np.flatnonzero(~active[sample]):
                time, noise = points[token][-1]
                returned[sample, token] = noise + alphas[-1] * self.slopes[sample, token] * (now - time)
        return returned, alphas


TIMES = {
    "falling": [1000.0, 950.0, 800.0, 620.0, 600.0, 410.0, 300.0, 210.0, 120.0, 30.0],
    "rising": [0.0, 0.05, 0.2, 0.38, 0.4, 0.59, 0.7, 0.79, 0.88, 0.97],
    "repeated, as Heun's": [1000.0, 800.0, 800.0, 620.0, 620.0, 410.0, 410.0, 210.0, 210.0, 30.0],
}


@pytest.fixture(params=["as it is", "replayed", pytest.param("fused and replayed", marks=pytest.mark.compiles)])
def run(request, monkeypatch):
    if request.param == "as it is":
        return None
    monkeypatch.setattr(replay, "DEVICE", "cpu")
    monkeypatch.setattr(replay, "Graph", Recorded)
    inner = "inductor" if "fused" in request.param else "eager"
    return partial(Selection(), continued, RASConfig(inner_backend=inner))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("times", TIMES, ids=str)
def test_tokens_return_what_least_squares_say(times, apart, run):
    """Curves and noise: lines come true in part. Of two samples one may be behind the other in time."""
    generator = np.random.default_rng(0)
    held = np.zeros((BATCH, TOKENS, PIXELS, CHANNELS))
    line, reference, seen = Extrapolation(fitted=True, run=run), Reference(), []
    base, slope, curve = generator.standard_normal((3, BATCH, TOKENS, PIXELS, CHANNELS))
    span = abs(TIMES[times][0] - TIMES[times][-1])
    for step, now in enumerate(TIMES[times]):
        each = [now, now * 0.9 if apart else now]
        x = np.array(each).reshape(-1, 1, 1, 1) / span
        truth = base + slope * x + 2 * curve * x**2 + 0.05 * generator.standard_normal(base.shape)
        truth = truth.astype(np.float32).astype(float)
        rows = None if step < 3 or step == 6 else torch.tensor([[step % 3, 5], [1, 3 + step % 3]]).sort().values
        active = np.ones((BATCH, TOKENS), bool) if rows is None else active_tokens(rows, TOKENS).numpy()
        held = np.where(active[..., None, None], truth, held)
        wanted, alphas = reference(held, active, each)
        time = torch.tensor(each, dtype=torch.float64) if apart else now
        found = line(torch.tensor(held, dtype=torch.float32), rows, time)
        np.testing.assert_allclose(found.numpy(), wanted, atol=2e-5, rtol=2e-5)
        seen += alphas
    assert min(seen[6:]) > 0 and 0.2 < max(seen) <= 1


def test_a_line_that_comes_true_is_followed_and_one_that_does_not_is_not():
    base, slope = torch.randn(2, 8, 1, 4), torch.randn(2, 8, 1, 4)
    rows = torch.arange(4).repeat(2, 1)

    def ahead(noise_at) -> torch.Tensor:
        line = Extrapolation(fitted=True)
        for step in range(4):
            line(noise_at(step), None, float(step))
        held = torch.cat([noise_at(4)[:, :4], noise_at(3)[:, 4:]], 1)
        return line(held, rows, 4.0)[:, 4:] - noise_at(3)[:, 4:]

    torch.testing.assert_close(ahead(lambda step: base + step * slope), slope[:, 4:], atol=1e-4, rtol=1e-4)
    turning = ahead(
        lambda step: base + (-1) ** step * slope
    )  # each change is the last one's opposite: alpha is clipped
    assert torch.equal(turning, torch.zeros_like(turning))
    # beyond what the line said: never more than the line
    torch.testing.assert_close(ahead(lambda step: base + 3.0**step * slope), 18 * slope[:, 4:], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_spoils_one_token_alone(value):
    line, base, slope = Extrapolation(fitted=True), torch.randn(1, 5, 1, 2), torch.randn(1, 5, 1, 2)
    for step in range(6):
        truth = base + step * slope
        if step in (1, 2):
            truth[0, 3] = value
        line(truth, None, float(step))
    rows = torch.tensor([[0]])
    held = torch.cat([base[:, :1] + 6 * slope[:, :1], (base + 5 * slope)[:, 1:]], 1)
    found = line(held, rows, 6.0)
    torch.testing.assert_close(found, base + 6 * slope, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("reuse", ["linear", "forecast"])
def test_caches_keep_what_was_computed(reuse):
    """What is returned for inactive tokens enters neither the caches nor what is chosen."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, outputs = TinyDiT().eval(), {}
    first, direction = torch.randn(2, *LATENT.shape)
    latents = [first + 0.05 * step * direction for step in range(9)]
    for name in ("hold", reuse):
        options = {**EAGER, "noise_reuse": name, "metric": "drift"}
        compiled = torch.compile(model, backend="ras", options=options)
        outputs[name] = []
        with torch.no_grad(), ras_compile.generation(num_steps=9) as gen:
            for step, latent in enumerate(latents):
                gen.step()
                outputs[name].append(compiled(latent, torch.full((2,), 1 - step / 10), TEXT))
        outputs[name, "rows"] = [record.rows for record in ras_compile.trace(compiled)]
    pairs = list(zip(outputs["hold", "rows"], outputs[reuse, "rows"], strict=True))
    assert all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(outputs["hold"], outputs[reuse], strict=True))
