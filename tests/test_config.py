"""Options: what is allowed, what is refused, and that the refusal says what to do."""

import dataclasses
import pickle
from typing import get_args, get_type_hints

import numpy as np
import pytest

from ras_compile import RASConfig, RASError
from ras_compile.config import (
    PRESETS,
    RUNTIME_OPTIONS,
)
from ras_compile.options import Options
from ras_compile.sampling.locate import Generation


def test_defaults_are_the_documented_ones():
    assert dataclasses.asdict(RASConfig()) == {
        "sample_ratio": 0.1,
        "warmup_steps": 4,
        "reset_interval": 3,
        "reset_from": "end",
        "reset_steps": None,
        "ratio_schedule": "ends",
        "metric": "drift",
        "focus": "high",
        "starvation_scale": None,
        "max_absence": None,
        "selector": None,
        "region": None,
        "context": "fresh",
        "noise_reuse": "forecast",
        "cache_reuse": "hold",
        "kv_cache": True,
        "inner_backend": "inductor",
        "inner_options": {},
        "cuda_graphs": True,
        "cache_budget": None,
        "cache_dtype": None,
        "cache_device": None,
        "unsupported": "dense",
        "latent": None,
        "timestep": None,
        "speedup": None,
        "tolerance": None,
    }


BAD = {
    "sample_ratio": [0, 0.0, -0.5, 1.01, float("nan"), "0.5", True],
    "warmup_steps": [0, -1, 1.5, True, "4", None],
    "reset_from": ["middle", None, 3, True],
    "reset_interval": [0, -1, 2.0, "8", False],
    "reset_steps": [3, "34", [1.5], [-1], [True]],
    "ratio_schedule": ["cosine", None, 1],
    "metric": ["var", None, 3],
    "focus": ["middle", -0.1, 1.1, None, True],
    "starvation_scale": [-0.1, float("inf"), "0.1"],
    "max_absence": [0, 1.5, True],
    "selector": ["top", 3],
    "region": [5, "0:3", slice(0, 10, 2), (1, 2, 3), slice(0.0, 1.0)],
    "context": ["cold", None],
    "noise_reuse": ["drop", None],
    "cache_reuse": ["linear", None, True],
    "kv_cache": [1, None],
    "inner_backend": ["", None, "ras"],
    "inner_options": [None, [1], {"mode": "fastest"}],
    "cuda_graphs": ["yes"],
    "unsupported": ["ignore"],
    "cache_budget": [-1, 1.5, "1GB", True],
    "cache_dtype": ["bfloat16", 8, True],
    "cache_device": ["cuda", "host", True],
    "latent": ["", "two words", "['x']", 3],
    "timestep": [0, "a.b"],
    "tolerance": [0, 0.0, -1.0, float("nan"), float("inf"), "0.1", True],
    "speedup": [0.9, 0, "2", True, float("nan")],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_names_its_option(name, value):
    with pytest.raises(ValueError, match="mode" if value == {"mode": "fastest"} else name) as caught:
        RASConfig.from_options({name: value})
    assert isinstance(caught.value, RASError)


def test_every_option_has_bad_values_above():
    assert set(BAD) == {option.name for option in dataclasses.fields(RASConfig)}


def test_an_unknown_option_lists_all_and_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'sample_ratio'") as caught:
        RASConfig.from_options({"sampling_ratio": 0.5})
    assert all(option.name in str(caught.value) for option in dataclasses.fields(RASConfig))


def test_a_choice_lists_what_is_allowed():
    with pytest.raises(ValueError, match="'constant' or 'ends' or 'linear' or 'sigmas'"):
        RASConfig(ratio_schedule="cosine")


def test_mode_goes_to_the_inner_backend():
    config = RASConfig.from_options({"mode": "max-autotune", "inner_options": {"shape_padding": True}})
    assert config.inner_options == {"shape_padding": True, "mode": "max-autotune"}
    with pytest.raises(ValueError, match="reduce-overhead"):
        RASConfig.from_options({"mode": "fast"})


def test_equal_configs_share_a_key():
    first = RASConfig.from_options({"region": (0, 64), "inner_options": {"a": [1]}, "reset_steps": [9, 5, 9]})
    second = RASConfig(region=slice(0, 64), inner_options={"a": [1]}, reset_steps=(5, 9))
    assert first == second and hash(first) == hash(second) and len({first, second}) == 1
    assert first != RASConfig(region=slice(0, 32), inner_options={"a": [1]}, reset_steps=(5, 9))


@pytest.mark.parametrize(("focus", "share"), [("low", 1.0), ("high", 0.0), (0.25, 0.25), (1, 1.0)])
def test_focus_is_the_share_dropped_from_the_high_end(focus, share):
    assert RASConfig(focus=focus).high_share == share


def test_from_no_options_at_all():
    assert RASConfig.from_options(None) == RASConfig.from_options({}) == RASConfig()


def test_a_ratio_or_a_speedup():
    assert RASConfig(speedup=2).speedup == 2.0
    for given in ({"sample_ratio": 0.5}, {"sample_ratio": 0.25}):
        with pytest.raises(ValueError, match=r"sample_ratio=0.*speedup=2 exclude"):
            RASConfig(speedup=2, **given)
        with pytest.raises(ValueError, match="exclude"):
            RASConfig().with_runtime(speedup=2, **given)
    config = RASConfig(sample_ratio=0.5).with_runtime(speedup=1.5)
    assert config.speedup == 1.5 and config.with_runtime(warmup_steps=2).speedup == 1.5
    assert config.with_runtime(sample_ratio=0.5) == RASConfig(sample_ratio=0.5)


def test_a_tolerance_needs_drift_and_excludes_a_speedup():
    assert RASConfig(tolerance=0.1).tolerance == 0.1
    with pytest.raises(ValueError, match="option tolerance=0.1 needs metric='drift'"):
        RASConfig(tolerance=0.1, metric="std")
    with pytest.raises(ValueError, match="option tolerance=0.1 excludes speedup"):
        RASConfig(tolerance=0.1, speedup=2)


@pytest.mark.parametrize(
    "other", [{"cache_dtype": "int8"}, {"cache_device": "cpu"}, {"context": "frozen"}, {"kv_cache": False}], ids=str
)
def test_caches_go_on_only_where_they_may_be_written(other):
    (name,) = other
    with pytest.raises(ValueError, match=f"options cache_reuse='forecast' and {name}=.* exclude each other"):
        RASConfig(cache_reuse="forecast", **other)
    with pytest.raises(ValueError, match=name):
        RASConfig(**other).with_runtime(cache_reuse="forecast")
    assert RASConfig(cache_reuse="hold", **other).cache_reuse == "hold"


def test_a_speedup_outlives_a_copy():
    config = RASConfig(speedup=2, warmup_steps=3)
    for other in (pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        assert other == config and other.with_runtime(warmup_steps=2) == RASConfig(speedup=2, warmup_steps=2)
        assert other.with_runtime(speedup=None) == RASConfig(warmup_steps=3)
    assert config.sample_ratio is None and config.ratio == 0.1
    assert RASConfig(speedup=2, metric="std").ratio == 0.5


def test_a_starvation_scale_fits_the_metric():
    assert [RASConfig(metric=metric).starvation for metric in ("std", "l2norm", len, "drift")] == [2.0, 2.0, 2.0, 0.0]
    assert RASConfig(metric="drift", starvation_scale=0.3).starvation == 0.3
    assert RASConfig(metric="drift").with_runtime(metric="std").starvation == 2.0


OLD = dict(sample_ratio=0.5, reset_interval=8, ratio_schedule="constant", noise_reuse="hold")


@pytest.mark.parametrize("metric", ["std", "l2norm", "random", len])
def test_other_defaults_follow_the_metric(metric):
    """A metric given alone means what it did when "std" was the default; what is given beside it rules."""
    assert RASConfig(metric=metric) == RASConfig(metric=metric, **OLD)
    assert RASConfig(metric=metric, reset_interval=3).ratio_schedule == "constant"
    assert RASConfig(metric="drift") == RASConfig() == RASConfig(preset="balanced")
    # also from one generation to the next, but for what was given
    assert RASConfig().with_runtime(metric=metric) == RASConfig(metric=metric)
    assert RASConfig(metric=metric).with_runtime(metric="drift") == RASConfig()
    assert RASConfig(sample_ratio=0.3).with_runtime(metric=metric) == RASConfig(metric=metric, sample_ratio=0.3)
    assert RASConfig(metric=metric).with_runtime(warmup_steps=2) == RASConfig(metric=metric, warmup_steps=2)
    assert RASConfig(speedup=2).with_runtime(metric=metric) == RASConfig(speedup=2, metric=metric)
    assert RASConfig(reset_interval=None).with_runtime(metric=metric).reset_interval is None


def test_a_config_takes_what_options_take():
    assert RASConfig(preset="fast", sample_ratio=0.22).sample_ratio == 0.22
    assert RASConfig(preset="fast") == RASConfig.from_options({"preset": "fast"})
    assert RASConfig(mode="max-autotune").inner_options == {"mode": "max-autotune"}
    with pytest.raises(RASError, match="sample_ratio=0.3 and speedup=2 exclude each other"):
        RASConfig(preset="fast", sample_ratio=0.3, speedup=2)
    with pytest.raises(RASError, match="option preset='best'"):
        RASConfig(preset="best")
    with pytest.raises(RASError, match="Did you mean 'sample_ratio'"):
        RASConfig(sampel_ratio=0.3)


def test_presets_are_options_and_what_is_given_rules():
    assert RASConfig.from_options({"preset": None}) == RASConfig()
    for name, preset in PRESETS.items():
        assert RASConfig.from_options({"preset": name}) == RASConfig(**preset)
        assert set(preset) <= set(RUNTIME_OPTIONS)
        found = RASConfig.from_options({"preset": name, "sample_ratio": 0.3, "metric": "l2norm", "context": "frozen"})
        assert found == RASConfig(**{**preset, "sample_ratio": 0.3, "metric": "l2norm", "context": "frozen"})
        # a runtime option too: nothing of the options before is left, but those that programs depend on
        before = RASConfig(speedup=3, metric="std", reset_steps=[5], focus="low", kv_cache=False)
        assert before.with_runtime(preset=name) == RASConfig(**preset, kv_cache=False)
        with_speedup = before.with_runtime(preset=name, speedup=2)
        assert with_speedup.speedup == 2 and with_speedup.metric == preset["metric"]
        assert RASConfig.from_options({"preset": name, "speedup": 2}).speedup == 2
    for bad in ("best", 3):
        with pytest.raises(ValueError, match="option preset.*'paper'.*'fast'.*'quality'"):
            RASConfig.from_options({"preset": bad})
    with pytest.raises(ValueError, match="Did you mean 'preset'"):
        RASConfig.from_options({"presets": "fast"})


def test_numbers_of_numpy_are_numbers():
    config = RASConfig(
        sample_ratio=np.float32(0.5), warmup_steps=np.int64(3), reset_steps=np.arange(4, 9, 2), focus=np.float64(0.25),
        region=(np.int64(0), np.int64(8)),
    )  # fmt: skip
    assert config == RASConfig(sample_ratio=0.5, warmup_steps=3, reset_steps=(4, 6, 8), focus=0.25, region=(0, 8))
    assert all(type(step) is int for step in (config.warmup_steps, *config.reset_steps))
    assert type(config.sample_ratio) is float
    assert type(Generation(np.int64(28)).num_steps) is int
    with pytest.raises(ValueError, match="warmup_steps"):
        RASConfig(warmup_steps=np.bool_(True))


def test_options_by_name_are_those_of_the_config():
    names = {option.name for option in dataclasses.fields(RASConfig)}
    assert set(Options.__annotations__) == names | {"preset", "mode"}
    assert get_args(get_args(get_type_hints(Options)["preset"])[0]) == tuple(PRESETS)
