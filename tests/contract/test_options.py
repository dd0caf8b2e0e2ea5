"""Every option on a tiny pipeline of diffusers, alone and in pairs; and what is wrong is refused before it draws a picture."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import fields
from functools import cache

import pytest
import torch
from contract import error
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import EAGER, draw_sd3, kinds, sd3
from tiny import LATENT, TEXT, TinyDiT

import ras_compile
from ras_compile import RASConfig
from ras_compile.config import PRESETS, RUNTIME_OPTIONS
from ras_compile.passes.analysis.cost import ACTIVE
from ras_compile.sampling.reuse import active_tokens
from ras_compile.sampling.rows import RowChooser
from ras_compile.sampling.schedule import Schedule
from ras_compile.sampling.selection import SelectionInfo

STEPS, TOKENS = 7, 16


def loudest(noise, info):
    return noise.abs().amax(-1)


class Drifting:
    """A metric of the user's that needs a state: how much each token's noise has changed, times how long it is ago."""

    def __init__(self):
        self.step = None

    def __call__(self, noise, info):
        if self.step is None or info.step <= self.step or noise.shape != self.last.shape:  # a generation begins
            self.rate = torch.ones(noise.shape[:2])
        else:
            moved = (noise != self.last).any(-1)
            self.rate = torch.where(moved, (noise - self.last).norm(dim=-1), 2 * self.rate)
        self.last, self.step = noise.clone(), info.step
        return self.rate


def best(metric, drops, k, info):
    return metric.topk(k, dim=1).indices


# a line runs ahead too far where a token waits for long
LINE = {"noise_reuse": "linear", "ratio_schedule": "constant", "sample_ratio": 0.5}
RUNTIME = [
    {"sample_ratio": 0.25},
    {"speedup": 1.1},
    {"warmup_steps": 1},
    {"reset_interval": 2},
    {"reset_from": "start"},
    {"reset_steps": [3, 6]},
    {"ratio_schedule": "linear"},
    {"ratio_schedule": "ends"},
    {"ratio_schedule": "sigmas"},
    {"tolerance": 10.0},
    {"metric": "std"},
    {"metric": "l2norm"},
    {"metric": "random"},
    {"metric": loudest},
    {"metric": Drifting()},
    {"focus": "low"},
    {"focus": 0.4},
    {"starvation_scale": 0.0},
    {"max_absence": 1},
    {"selector": best},
    LINE,
    {"noise_reuse": "forecast"},
    {"noise_reuse": "x0"},
    {"cache_reuse": "forecast"},
]
PROGRAM = [
    {"context": "frozen"},
    {"kv_cache": False},
    {"inner_backend": "aot_eager"},
    {"cache_dtype": "int8"},
    {"cache_dtype": "float8", "cache_device": "cpu"},
    {  # these change nothing with this backend on a CPU
        "mode": "reduce-overhead",
        "inner_options": {"shape_padding": True},
        "cuda_graphs": False,
        "cache_budget": 0,
        "unsupported": "error",
        "latent": "hidden_states",
        "timestep": "timestep",
    },
]
DEFAULTS = {option.name: option.default for option in fields(RASConfig) if option.name in RUNTIME_OPTIONS}


@cache
def pipeline():
    pipe = sd3()
    pipe.set_progress_bar_config(disable=True)
    torch._dynamo.reset()
    return pipe, draw_sd3(pipe, steps=STEPS)


def check(handle, bound: float = 1.0) -> None:
    """A picture whose steps are those of the options' schedule, and not far from the dense one."""
    pipe, plain = pipeline()
    picture = draw_sd3(pipe, steps=STEPS)
    records = ras_compile.trace(handle)
    schedule = Schedule(handle.config, handle.follower.noise_levels())
    if handle.config.tolerance is not None:
        assert {record.active for record in records} <= {*schedule.tolerable(TOKENS), TOKENS}
        assert kinds(records).startswith("d" * handle.config.warmup_steps) and "s" in kinds(records)
    else:
        assert kinds(records) == "".join(schedule.kind(step, STEPS)[0] for step in range(STEPS))
    if handle.config.speedup is None and handle.config.tolerance is None:
        wanted = [schedule.active(record.step, TOKENS, STEPS) for record in records if record.kind == "sparse"]
        assert [record.active for record in records if record.kind == "sparse"] == wanted
    gap = float((picture - plain).norm() / plain.norm())
    assert 1e-5 < gap < bound, gap


def test_every_runtime_option_is_here():
    assert {name for option in RUNTIME for name in option} == set(RUNTIME_OPTIONS)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    """Each runs as its options say; with all tokens it gives the dense picture, and without what it forecasts, two alike."""
    pipe, plain = pipeline()
    torch._dynamo.reset()
    with ras_compile.attach(pipe, inner_backend="eager", unsupported="error", preset=preset) as handle:
        assert handle.config == RASConfig(**PRESETS[preset], inner_backend="eager", unsupported="error")
        check(handle)
        first = draw_sd3(pipe, steps=STEPS)
        assert torch.equal(draw_sd3(pipe, steps=STEPS), first)
        handle.configure(preset=preset, sample_ratio=1.0)
        assert error([draw_sd3(pipe, steps=STEPS)], [plain]) < 1e-4
        handle.configure(preset=preset, speedup=1.1)
        check(handle)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_sparse_step_on_the_inputs_of_the_dense_one_before(preset):
    """The contract's consistency and locality through the whole runtime, at each preset's options.

    The same inputs give the same noise, whatever is active. On a new latent the tokens that are not active hold their
    noise bit for bit; so do those of a preset that forecasts, since time stands still here.
    """
    torch._dynamo.reset()
    model = TinyDiT().double().eval()
    options = {"inner_backend": "eager", "unsupported": "error", "preset": preset, "reset_interval": None}
    compiled = torch.compile(model, backend="ras", options={**options, "warmup_steps": 3})
    first, other, text = LATENT.double(), torch.randn_like(LATENT).double(), TEXT.double()
    with torch.no_grad(), ras_compile.generation(num_steps=20) as gen:
        outputs = []
        for latent in (first, first, first, first, other):
            gen.step()
            outputs.append(compiled(latent, torch.full((2,), 0.5, dtype=torch.float64), text))
    records = ras_compile.trace(compiled)
    assert [record.kind[0] for record in records] == list("dddss")
    assert error([outputs[3]], [outputs[2]]) < 1e-9
    height, width = LATENT.shape[2] // 2, LATENT.shape[3] // 2
    active = active_tokens(records[4].rows, height * width).reshape(-1, 1, height, width)
    active = active.repeat_interleave(2, 2).repeat_interleave(2, 3).expand_as(first)
    assert torch.equal(outputs[4][~active], outputs[3][~active])
    assert not torch.equal(outputs[4][active], outputs[3][active])


def test_runtime_options_in_pairs():
    pipe, plain = pipeline()
    torch._dynamo.reset()
    with ras_compile.attach(pipe, inner_backend="eager", unsupported="error") as handle:
        for option in RUNTIME:
            handle.configure(**{**DEFAULTS, "reset_interval": None, **option})
            check(handle)
            if "speedup" not in option:
                handle.configure(sample_ratio=1.0)
                assert error([draw_sd3(pipe, steps=STEPS)], [plain]) < 1e-4  # all tokens: the dense picture
        for one, two in itertools.combinations(RUNTIME, 2):
            if set(one) & set(two) or {*one, *two} >= {"sample_ratio", "speedup"}:
                continue
            if {*one, *two} & {"metric", "speedup"} and "tolerance" in {*one, *two}:
                with pytest.raises(ras_compile.ConfigError, match="option tolerance=10"):
                    handle.configure(**{**DEFAULTS, **one, **two})
                continue
            try:
                handle.configure(**{**DEFAULTS, "reset_interval": None, **one, **two})
                check(handle, bound=1.5)
            except Exception as problem:
                problem.add_note(f"with {one} and {two}")
                raise


@pytest.mark.parametrize("option", PROGRAM, ids=lambda option: next(iter(option)))
def test_options_of_the_programs(option):
    pipe, plain = pipeline()
    torch._dynamo.reset()
    with ras_compile.attach(pipe, **{"inner_backend": "eager", **option}) as handle:
        for more in ({}, LINE):
            handle.configure(**{**DEFAULTS, "reset_interval": None, **more})
            check(handle)
        handle.configure(**{**DEFAULTS, "sample_ratio": 1.0})
        picture = draw_sd3(pipe, steps=STEPS)
        if option != {"context": "frozen"}:  # its text is that of the last dense step
            assert error([picture], [plain]) < (1e-2 if "cache_dtype" in option else 1e-4)


BAD_RUNS = {
    "reset_steps": [7],
    "speedup": 50.0,
    "region": (0, 8),  # this latent is no row of packed tokens
    "latent": "noise",
    "timestep": "time",
}


def late(good, bad, calls: int):
    """`good` for so many calls, then `bad`."""
    count = itertools.count()
    return lambda *given: bad(*given) if next(count) >= calls else good(*given)


BAD_CALLABLES = {
    "rows chosen twice": ("selector", lambda m, d, k, i: torch.zeros(len(m), k, dtype=torch.int64), "twice"),
    "rows out of range": ("selector", lambda m, d, k, i: best(m, d, k, i) + TOKENS, r"0\.\.15"),
    "negative rows": ("selector", lambda m, d, k, i: best(m, d, k, i) - TOKENS, r"0\.\.15"),
    "rows of another shape": ("selector", lambda m, d, k, i: best(m, d, k, i)[0], r"\[2, 8\], not \(8,\)"),
    "rows that are no integers": ("selector", lambda m, d, k, i: best(m, d, k, i).float(), "integers"),
    "no rows": ("selector", lambda m, d, k, i: None, "NoneType"),
    "NaN": ("metric", lambda noise, info: noise.sum(-1) * math.nan, "not a number"),
    "negative": ("metric", lambda noise, info: -loudest(noise, info) - 1, "negative"),
    "another shape": ("metric", lambda noise, info: noise, r"\[2, 16\]"),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_what_this_run_cannot_have_is_refused_at_its_first_step(name):
    pipe, _ = pipeline()
    torch._dynamo.reset()
    steps = []
    with (
        pytest.raises(ras_compile.RASError, match=f"option {name}"),
        ras_compile.attach(pipe, inner_backend="eager", unsupported="error", **{name: BAD_RUNS[name]}),
    ):
        draw_sd3(pipe, steps=STEPS, callback_on_step_end=lambda pipe, step, time, given: steps.append(step) or {})
    assert not steps


def test_bad_callables_spoil_no_picture():
    """Also when they go wrong late: the run ends with an error, and the next picture is as it should be."""
    pipe, _ = pipeline()
    torch._dynamo.reset()
    options = {**DEFAULTS, "warmup_steps": 2, "reset_interval": None, "ratio_schedule": "constant", "sample_ratio": 0.5}
    with ras_compile.attach(pipe, **EAGER) as handle:
        handle.configure(**options)
        wanted = draw_sd3(pipe, steps=6)
        for (option, bad, complaint), calls in itertools.product(BAD_CALLABLES.values(), (0, 2)):
            good = best if option == "selector" else loudest
            handle.configure(**{**options, option: late(good, bad, calls)})
            with pytest.raises(ras_compile.ConfigError, match=f"option {option}.*{complaint}"):
                draw_sd3(pipe, steps=6)
            handle.configure(**options)
            assert torch.equal(draw_sd3(pipe, steps=6), wanted)


def test_a_speedup_is_reached():
    """Within the rounding of half a token a step; what cannot be had is refused with what can."""
    pipe, _ = pipeline()
    torch._dynamo.reset()
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: calls.append(k), with_kwargs=True)
    draw_sd3(pipe, steps=1)
    hook.remove()
    options = {"inner_backend": "eager", "reset_interval": 8}
    explained = ras_compile.explain(pipe.transformer, options=options, **calls[0])
    cost = explained.cost

    def run(records, shift: float) -> float:
        """Speed-up of a run by FLOPs, had each sparse step `shift` more tokens."""
        sparse = [float(cost.sparse_flops.subs(ACTIVE, r.active + shift)) for r in records if r.kind == "sparse"]
        return len(records) * cost.dense_flops / ((len(records) - len(sparse)) * cost.dense_flops + sum(sparse))

    with ras_compile.attach(pipe, **options) as handle:
        for steps, share in itertools.product((9, 28), (0.0, 0.3, 0.6, 0.9)):
            most = explained.speedup(1 / TOKENS, num_steps=steps)
            target = 1 + share * (most - 1)
            handle.configure(speedup=target)
            draw_sd3(pipe, steps=steps)
            records = ras_compile.trace(handle)
            assert kinds(records) == "".join(
                Schedule(RASConfig(reset_interval=8)).kind(step, steps)[0] for step in range(steps)
            )
            assert run(records, 0.51) <= target <= run(records, -0.51), (steps, target)
        handle.configure(speedup=2 * most)
        with pytest.raises(ras_compile.ConfigError, match=f"option speedup.*1.00 to {most:.2f} can be had"):
            draw_sd3(pipe, steps=steps)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_speedup_of_a_run_without_a_sparse_step_is_one_error(steps):
    pipe, _ = pipeline()
    torch._dynamo.reset()
    with (
        warnings.catch_warnings(action="error", category=ras_compile.RASWarning),
        ras_compile.attach(pipe, **{**EAGER, "warmup_steps": 4}, speedup=2),
        pytest.raises(ras_compile.ConfigError, match=f"option speedup=2.*none of the {steps} steps can be sparse"),
    ):
        draw_sd3(pipe, steps=steps)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(8, 400),
    ratio=st.floats(0.06, 0.95),
    bound=st.integers(1, 9),
    steps=st.integers(6, 60),
    kind=st.sampled_from(["constant", "linear", "ends"]),
    metric=st.sampled_from(["std", "drift"]),
    focus=st.sampled_from(["low", "high", 0.5]),
    scale=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 99),
)
def test_a_run_starves_no_token_and_computes_what_was_asked_for(
    tokens, ratio, bound, steps, kind, metric, focus, scale, seed
):
    """A whole run: absence stays within `max_absence + ceil(N / A)`, A the fewest of its steps; the sum of A is right.

    That is: within half a token a step for a constant ratio, and for a linear one within half a token a step of its last
    level, to which the rounding of the others is handed on. (Grids of 512 tokens and more round to a multiple of 8 to 64.)
    """
    config = RASConfig(
        sample_ratio=ratio, max_absence=bound, ratio_schedule=kind, metric=metric, focus=focus, starvation_scale=scale,
        reset_interval=None, warmup_steps=1, cuda_graphs=False,
    )  # fmt: skip
    schedule, chooser, info = Schedule(config), RowChooser(config), SelectionInfo()
    generator, latent = torch.Generator().manual_seed(seed), torch.zeros(1, tokens, 1)
    fixed = torch.rand(1, tokens, 1, 4, generator=generator)
    away, worst, counts = torch.zeros(tokens), 0, []
    for step in range(steps):
        if step:
            chooser.advance(dense=False)
            rows = chooser.rows(latent, 1, tokens, schedule.active(step, tokens, steps), info)
            counts.append(rows.shape[1])
            away += 1
            away[rows[0]] = 0
            worst = max(worst, int(away.max()))
        noise = fixed if seed % 2 else torch.rand(1, tokens, 1, 4, generator=generator)
        chooser.observe(noise, info)
    assert worst <= bound + math.ceil(tokens / min(counts))
    level = {"constant": len(counts), "linear": counts.count(counts[-1]), "ends": counts.count(min(counts))}[kind]
    if min(counts) > 1 and max(counts) < tokens:
        assert abs(sum(counts) - ratio * tokens * len(counts)) <= level / 2 + 1e-6
