"""`explain` looks at a model that others may be calling: it changes nothing that they see."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from pipelines import sd3, sd3_prompt
from tiny import EAGER, LATENT, TEXT, model, run

import ras_compile
from ras_compile import preview


def test_a_model_that_is_explained_stays_compiled(monkeypatch):
    """Another thread may call it at any moment of the explanation."""
    plain = model()
    plain.compile(backend="ras", options={**EAGER, "unsupported": "error"})
    seen = []
    real = preview.describe_inputs

    def watching(graph):
        seen.append(plain._compiled_call_impl)
        return real(graph)

    monkeypatch.setattr(preview, "describe_inputs", watching)
    told = ras_compile.explain(plain, hidden_states=LATENT, timestep=torch.ones(2), text=TEXT)
    assert told.supported and seen and all(found is plain._compiled_call_impl for found in seen)


def test_a_model_is_sampled_and_explained_at_the_same_time():
    plain = model()
    wanted = run(torch.compile(plain, backend="ras", options=EAGER), LATENT, TEXT)
    torch._dynamo.reset()
    plain.compile(backend="ras", options=EAGER)
    found, told = [], []

    def explaining():
        for _ in range(3):
            told.append(ras_compile.explain(plain, hidden_states=LATENT, timestep=torch.ones(2), text=TEXT).supported)

    threads = [
        threading.Thread(target=explaining),
        threading.Thread(target=lambda: found.extend(run(plain, LATENT, TEXT) for _ in range(6))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == [True] * 3 and len(found) == 6
    assert all(torch.equal(picture, wanted) for picture in found)


def test_an_argument_that_is_written_is_told_with_its_line():
    class Writes(type(model())):
        def forward(self, hidden_states, timestep, text):
            text[:, -1:] = text[:, -1:] * 0
            return super().forward(hidden_states, timestep, text)

    told = ras_compile.explain(Writes().eval(), hidden_states=LATENT, timestep=torch.ones(2), text=TEXT.clone())
    assert "writes into its inputs or buffers (text)" in told.reason
    assert "test_explanation.py" in told.reason and "text[:, -1:] = text[:, -1:] * 0" in told.reason


def test_arguments_may_be_given_by_their_places():
    by_name = ras_compile.explain(model(), hidden_states=LATENT, timestep=torch.ones(2), text=TEXT)
    by_place = ras_compile.explain(model(), LATENT, torch.ones(2), text=TEXT)
    assert by_place.supported and by_place.words == by_name.words
    with pytest.raises(TypeError, match="too many positional arguments"):
        ras_compile.explain(model(), LATENT, torch.ones(2), TEXT, TEXT, TEXT, TEXT, TEXT)


def test_the_budget_of_a_run_is_told():
    def explained(**options):
        given = dict(hidden_states=LATENT, timestep=torch.ones(2), text=TEXT)
        return ras_compile.explain(model(), options={"inner_backend": "eager", **options}, **given)

    told = explained()
    budget = told.budget(14)
    assert len(budget) == 14 and budget.count(24) == told.dense_steps(14) == 8
    assert sum(budget) == pytest.approx(8 * 24 + 6 * 24 * 0.1, abs=4)
    assert "planned   28 steps: 12 dense, 6 of " in str(told)
    short = str(replace(told, num_steps=12))
    assert "planned   12 steps: " in short and "(by FLOPs, 12 steps)" in short and "28 steps" not in short
    assert "take a forecast from" in short and "keep the noise" in str(explained(noise_reuse="hold"))
    assert explained(sample_ratio=0.25, metric="std").budget(6) == (24, 24, 24, 24, 6, 6)
    # the option changes the plan as it does the run
    target = told.speedup(1 / 24) + 0.05
    fast = explained(speedup=target)
    assert fast.budget().count(24) < told.budget().count(24) and fast.speedup() == pytest.approx(target, rel=0.05)
    tolerant = explained(tolerance=0.1)
    assert tolerant.speedup(0.25) == told.speedup(0.25) and "no run can be planned" in str(tolerant)
    with pytest.raises(ras_compile.ConfigError, match="no run can be planned"):
        tolerant.budget()
    with pytest.raises(ras_compile.ConfigError, match="num_steps=0"):
        told.budget(0)


def test_an_attached_model_is_explained_with_its_own_options():
    pipe = sd3()
    given = {**sd3_prompt(), "height": 64, "width": 64, "num_inference_steps": 14}
    plain = ras_compile.explain(pipe, **given)
    with ras_compile.attach(pipe, preset="fast", inner_backend="eager") as handle:
        told = ras_compile.explain(pipe, **given)
        assert told.config == handle.config and told.budget(14) != plain.budget(14)
        assert ras_compile.explain(pipe, options={}, **given).budget(14) == plain.budget(14)
    assert f", {told.speedup(num_steps=14):.2f}x by FLOPs" in str(told)


def test_seconds_of_a_step_that_processes_share():
    told = ras_compile.explain(model(), hidden_states=LATENT, timestep=torch.ones(2), text=TEXT)
    alone, shared = (told.seconds(ranks, tflops=1e-6, gigabytes=1e-3, ratio=0.25) for ranks in (1, 4))
    cost = told.cost
    active = round(cost.tokens / 4)
    assert alone == (cost.dense_flops / 1e6, cost.flop_ratio(active) * (cost.dense_flops / 1e6))
    moved = cost.attended_bytes * 3 / 16 / 1e6
    assert moved > 0
    assert shared == pytest.approx((alone[0] / 4 + moved, alone[1] / 4 + active / cost.tokens * moved))
    with pytest.raises(ras_compile.ConfigError, match="ranks=0 is not allowed; it takes a number above 0"):
        told.seconds(0, tflops=1.0, gigabytes=1.0)
    with pytest.raises(
        ras_compile.ConfigError, match="ratio=2 is not allowed; it takes a number above 0 and at most 1"
    ):
        told.seconds(2, tflops=1.0, gigabytes=1.0, ratio=2)
