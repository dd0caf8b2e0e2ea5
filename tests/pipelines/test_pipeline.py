"""The shipped pipeline: the contract on its trained weights, and whole pictures through diffusers' own code."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from contract import Subject, active_mask, error, subject

import ras_compile

FOLDER = Path(__file__).parents[2] / "examples" / "emoji" / "pipeline"
EAGER = {
    "inner_backend": "eager", "warmup_steps": 2, "reset_interval": None, "sample_ratio": 0.5,
    "ratio_schedule": "constant",
}  # fmt: skip


@cache
def pipeline():
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    torch._dynamo.reset()
    return pipeline()


def draw(pipe, prompt="a red apple", steps=5, seed=0, callback=None, height=64, width=64):
    """The final latent of one picture (a small one, for speed): the autoencoder adds nothing to what is tested."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        prompt, num_inference_steps=steps, guidance_scale=4.0, generator=generator, max_sequence_length=1,
        output_type="latent", callback_on_step_end=callback, height=height, width=width,
    ).images  # fmt: skip


@cache
def trained(size: int = 64) -> Subject:
    """The transformer in double precision, on noise and a prompt, guidance in one batch."""
    pipe = pipeline()
    calls: list[dict] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: calls.append(k), with_kwargs=True)
    draw(pipe, steps=1, height=size, width=size)
    hook.remove()
    inputs = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in calls[0].items()}
    module = type(pipe.transformer).from_config(pipe.transformer.config).double().eval()
    module.load_state_dict(pipe.transformer.state_dict())
    return subject(module, inputs)


def test_contract_on_trained_weights():
    model = trained()
    active = model.frame.tokens // 4
    dense, caches = model.dense(model.values)
    rows, latent = model.rows(active), model.other_latent()
    values = model.with_latent(latent)
    assert error(model.sparse(model.values, rows, caches)[0], dense) < 1e-9
    outputs, _ = model.sparse(values, rows, caches)
    assert error(outputs, model.oracle(values, rows, caches)) < 1e-9
    everything = torch.arange(model.frame.tokens).repeat(model.frame.samples, 1)
    assert error(model.sparse(values, everything, caches)[0], model.reference(values)) < 1e-9
    index = model.plan.noise
    mask = active_mask(model.plan.analysis.layouts[model.plan.analysis.output_nodes[index]], model.frame, rows)
    assert torch.equal(outputs[index][~mask], dense[index][~mask])
    for place in (0, len(caches) // 2, len(caches) - 1):
        corrupted = [cache * 1.5 if k == place else cache for k, cache in enumerate(caches)]
        assert error(model.sparse(values, rows, corrupted)[0], outputs) > 1e-6


def test_a_sparse_step_costs_a_third():
    """Counted on the graphs, attention included: at most 0.35 of a dense step at a quarter of the tokens."""
    from ras_compile.passes.analysis.cost import cost

    model = trained(128)
    assert cost(model.plan.analysis, model.plan.sparse).flop_ratio(model.frame.tokens // 4) <= 0.35


def test_attach_follows_the_scheduler(pipe):
    with ras_compile.attach(pipe, **EAGER) as handle:
        draw(pipe)
        records = ras_compile.trace(handle)
    assert [record.kind for record in records] == ["dense"] * 2 + ["sparse"] * 3
    assert [record.step for record in records] == list(range(5))
    rows = records[-1].rows
    assert rows.shape == (2, 128) and torch.equal(rows[0], rows[1])  # guidance's halves share the selection


def test_all_tokens_give_the_dense_picture(pipe):
    plain = draw(pipe)
    with ras_compile.attach(pipe, **{**EAGER, "sample_ratio": 1.0}):
        assert error([draw(pipe)], [plain]) < 1e-4
    assert torch.equal(draw(pipe), plain)  # detached: nothing is left


def test_an_aborted_picture_leaves_nothing_behind(pipe):
    class Stop(Exception):
        pass

    def stop(pipe, step, timestep, values):
        if step == 2:
            raise Stop
        return values

    with ras_compile.attach(pipe, **EAGER):
        alone = draw(pipe)
        with pytest.raises(Stop):
            draw(pipe, "a cat", steps=6, seed=1, callback=stop)
        assert torch.equal(draw(pipe), alone)
        draw(pipe, "a cat", steps=1, seed=1)  # a warm-up call of one step
        assert torch.equal(draw(pipe), alone)


def test_a_batch_is_its_pictures(pipe):
    """Rows are chosen per picture, of which guidance's halves share theirs: in a batch, of two prompts or of one, pictures
    are not far from those drawn alone."""
    given = {"num_inference_steps": 4, "guidance_scale": 4.0, "max_sequence_length": 1, "output_type": "latent"}
    given |= {"height": 64, "width": 64}
    alone = {}
    with ras_compile.attach(pipe, **EAGER) as handle:
        for prompts, several, seed in ((["a red apple", "a cat"], 1, 0), ("a red apple", 2, 1)):
            generator = [torch.Generator().manual_seed(number) for number in range(2)]
            both = pipe(prompts, num_images_per_prompt=several, generator=generator, **given).images
            rows = ras_compile.trace(handle)[-1].rows
            assert rows.shape == (4, 128) and torch.equal(rows[:2], rows[2:]) and not torch.equal(rows[0], rows[1])
            alone[seed] = both[seed : seed + 1]
        for seed, picture in alone.items():
            assert error([picture], [draw(pipe, steps=4, seed=seed)]) < 1e-2
