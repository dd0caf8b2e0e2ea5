"""The schedule: which steps are dense, and how many tokens the others compute."""

import math
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from ras_compile import RASConfig, notices
from ras_compile.errors import ConfigError, RASWarning
from ras_compile.passes.analysis.cost import ACTIVE, Cost
from ras_compile.sampling.schedule import Schedule, at_speedup


def kinds(steps, **options):
    schedule = Schedule(RASConfig(**options))
    return [schedule.kind(step, steps) for step in range(steps)]


def dense_steps(steps, **options):
    return [step for step, kind in enumerate(kinds(steps, **options)) if kind == "dense"]


def test_default_on_28_steps():
    assert dense_steps(28) == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    assert dense_steps(28, metric="std") == [0, 1, 2, 3, 12, 20]
    schedule = Schedule(RASConfig())
    counts = [schedule.active(step, 1024, 28) for step in range(28) if schedule.kind(step, 28) == "sparse"]
    # four steps in the first 30 % of the run and two in the last 10 % have seven times the tokens of the others
    assert counts == [224] * 4 + [32] * 10 + [224] * 2


def test_dense_steps_are_counted_from_the_end_where_it_is_known():
    assert dense_steps(28, preset="quality") == [0, 1, 2, 3, *range(5, 28, 2)]
    assert dense_steps(29, preset="quality") == [0, 1, 2, 3, *range(4, 29, 2)], "behind the warm-up, too"
    assert dense_steps(28, reset_from="start") == [0, 1, 2, 3, 7, 10, 13, 16, 19, 22, 25]
    assert dense_steps(28, metric="std", reset_from="end") == [0, 1, 2, 3, 11, 19, 27]
    unknown = Schedule(RASConfig())
    assert [step for step in range(28) if unknown.kind(step) == "dense"] == dense_steps(28, reset_from="start")
    assert kinds(5) == ["dense"] * 4 + ["sparse"] and kinds(7) == ["dense"] * 4 + ["sparse"] * 3
    assert kinds(8) == ["dense"] * 5 + ["sparse"] * 2 + ["dense"]
    assert kinds(4) == ["dense"] * 4


def test_the_defaults_of_old_given_as_options_make_the_schedule_of_old():
    for options in (
        dict(metric="std"),
        dict(reset_interval=8, metric="std", noise_reuse="hold", ratio_schedule="constant", sample_ratio=0.5),
    ):
        schedule = Schedule(RASConfig(**options))
        assert dense_steps(28, **options) == [0, 1, 2, 3, 12, 20]
        assert {schedule.active(step, tokens=1024, num_steps=28) for step in range(4, 28)} == {512}


def test_explicit_resets_rule_over_the_interval():
    assert dense_steps(28, reset_steps=[7, 2, 19]) == [0, 1, 2, 3, 7, 19]
    assert dense_steps(28, reset_steps=[]) == [0, 1, 2, 3]


def test_no_resets():
    assert dense_steps(100, reset_interval=None, warmup_steps=2) == [0, 1]


def test_interval_one_leaves_one_sparse_step():
    assert kinds(8, reset_interval=1, reset_from="start").count("sparse") == 1
    assert kinds(8, reset_interval=1) == ["dense"] * 8, "the last of them is dense, and each one before it"


@given(ratio=st.floats(0.001, 1), tokens=st.integers(1, 100_000))
def test_constant_count_is_close_and_in_range(ratio, tokens):
    active = Schedule(RASConfig(sample_ratio=ratio)).active(9, tokens)
    assert 1 <= active <= tokens
    multiple = 64 if tokens >= 4096 else 32 if tokens >= 2048 else 16 if tokens >= 1024 else 8 if tokens >= 512 else 1
    assert active == tokens or active % multiple == 0
    assert abs(active - ratio * tokens) <= multiple / 2 or active == multiple


def test_the_fewest_rows_of_a_step():
    for tokens in (1, 100, 512, 4096):
        assert Schedule.fewest(tokens) == Schedule(RASConfig(sample_ratio=1e-6)).active(5, tokens)


def test_hardware_friendly_counts():
    schedule = Schedule(RASConfig(sample_ratio=0.3))
    assert [schedule.active(5, tokens) for tokens in (4096, 1024, 100, 3, 1)] == [1216, 304, 30, 1, 1]


@given(tokens=st.integers(1, 10_000), steps=st.integers(5, 60), kind=st.sampled_from(["constant", "linear"]))
def test_ratio_one_takes_every_token(tokens, steps, kind):
    schedule = Schedule(RASConfig(sample_ratio=1.0, ratio_schedule=kind))
    assert schedule.active(4, tokens, steps) == tokens


@given(
    ratio=st.floats(0.05, 1),
    steps=st.integers(5, 100),
    tokens=st.integers(16, 8192),
    interval=st.one_of(st.none(), st.integers(2, 10)),
)
def test_linear_falls_in_four_levels_with_the_right_sum(ratio, steps, tokens, interval):
    schedule = Schedule(RASConfig(sample_ratio=ratio, ratio_schedule="linear", reset_interval=interval))
    sparse = [step for step in range(steps) if schedule.kind(step, steps) == "sparse"]
    ratios = [schedule.ratio(step, steps) for step in sparse]
    assert all(0 < value <= 1 for value in ratios)
    assert ratios == sorted(ratios, reverse=True)
    assert sum(ratios) / len(ratios) == pytest.approx(ratio)
    counts = [schedule.active(step, tokens, steps) for step in sparse]
    assert len(set(counts)) <= 4 and min(counts) >= 1 and max(counts) <= tokens
    # the last group's rounding alone is left over: at most half a multiple a step
    longest = -(-len(sparse) // min(4, len(sparse)))
    multiple = 64 if tokens >= 4096 else 32 if tokens >= 2048 else 16 if tokens >= 1024 else 8 if tokens >= 512 else 1
    if min(counts) > multiple and max(counts) < tokens:
        assert abs(sum(counts) - ratio * tokens * len(sparse)) <= longest * multiple / 2 + 1e-6


def test_linear_really_falls():
    schedule = Schedule(RASConfig(ratio_schedule="linear", sample_ratio=0.5, reset_interval=8, reset_from="start"))
    assert schedule.ratio(4, 28) == pytest.approx(0.6931818) and schedule.ratio(27, 28) == pytest.approx(0.3181818)


def test_linear_past_its_end_keeps_the_last_level():
    schedule = Schedule(RASConfig(ratio_schedule="linear"))
    assert schedule.active(40, 4096, 28) == schedule.active(27, 4096, 28) < schedule.active(5, 4096, 28)


def test_linear_without_a_number_of_steps_says_how_to_give_it():
    schedule = Schedule(RASConfig(ratio_schedule="linear"))
    for call in (lambda: schedule.active(5, 64), lambda: schedule.ratio(5), lambda: schedule.check(None)):
        with pytest.raises(ValueError, match=r"generation\(num_steps=") as caught:
            call()
        assert "attach" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "steps", "advice"),
    [
        ({"warmup_steps": 4}, 3, "Lower warmup_steps or take more steps"),
        ({"warmup_steps": 2}, 2, "Lower warmup_steps or take more steps"),
        ({"warmup_steps": 1}, 1, r"dense\. Take more steps"),
        ({"warmup_steps": 2, "reset_steps": [2, 3, 4]}, 5, "Give fewer reset_steps"),
        ({"reset_interval": 1}, 12, "Give a larger reset_interval"),
    ],
)
def test_the_advice_of_a_dense_run_can_be_followed(options, steps, advice):
    notices.reset()
    with pytest.warns(RASWarning, match=advice):
        Schedule(RASConfig(**options)).check(steps)


def test_resets_beyond_the_run():
    """An error, unless the run begins late and is shorter than it was asked for: then they are said to be left out."""
    schedule = Schedule(RASConfig(reset_steps=[6, 9]))
    with pytest.raises(ConfigError, match=r"this run has 9 steps, from 0 to 8"):
        schedule.check(9)
    schedule.check(10)
    with pytest.warns(RASWarning, match=r"reset_steps \[9\] do not come"):
        schedule.check(9, late=True)


def test_no_sparse_step_is_said_once():
    notices.reset()
    with pytest.warns(RASWarning, match="none of the 4 steps"):
        Schedule(RASConfig()).check(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Schedule(RASConfig()).check(4)
        Schedule(RASConfig()).check(5)
        Schedule(RASConfig()).check(None)


@given(
    ratio=st.floats(0.02, 1),
    steps=st.integers(1, 100),
    tokens=st.integers(16, 8192),
    interval=st.one_of(st.none(), st.integers(2, 10)),
    warmup=st.integers(1, 6),
)
def test_ends_compute_more_at_the_ends_with_the_right_sum(ratio, steps, tokens, interval, warmup):
    options = dict(sample_ratio=ratio, ratio_schedule="ends", reset_interval=interval, warmup_steps=warmup)
    schedule = Schedule(RASConfig(**options))
    sparse = [step for step in range(steps) if schedule.kind(step, steps) == "sparse"]
    if not sparse:
        return
    ratios = {step: schedule.ratio(step, steps) for step in sparse}
    assert all(0 < value <= 1 + 1e-9 for value in ratios.values()) and len(set(ratios.values())) <= 2
    assert sum(ratios.values()) / len(sparse) == pytest.approx(ratio)
    middle = [step for step in sparse if 0.3 <= step / max(steps - 1, 1) <= 0.9]
    ends = [step for step in sparse if step not in middle]
    if middle and ends:
        most, least = ratios[ends[0]], ratios[middle[0]]
        assert most == pytest.approx(8 * least) or (most == pytest.approx(1) and least < 1 + 1e-9)
    counts = [schedule.active(step, tokens, steps) for step in sparse]
    assert len(set(counts)) <= 2 and min(counts) >= 1 and max(counts) <= tokens
    multiple = 64 if tokens >= 4096 else 32 if tokens >= 2048 else 16 if tokens >= 1024 else 8 if tokens >= 512 else 1
    if min(counts) > multiple and max(counts) < tokens:
        last = len(middle) or len(ends)
        assert abs(sum(counts) - ratio * tokens * len(sparse)) <= last * multiple / 2 + 1e-6


def test_ends_of_a_run():
    schedule = Schedule(RASConfig(sample_ratio=0.25, ratio_schedule="ends", reset_interval=None))
    counts = [schedule.active(step, 1000, 28) for step in range(4, 28)]
    # 27 * 0.3 = 8.1 and 27 * 0.9 = 24.3: five steps and three have 60 %, the sixteen between an eighth of it, 7.5 %
    assert counts == [600] * 5 + [72] * 16 + [600] * 3
    assert schedule.active(40, 1000, 28) == counts[-1]


def test_ends_without_a_number_of_steps_or_without_a_middle_are_flat():
    schedule, flat = (Schedule(RASConfig(sample_ratio=0.3, ratio_schedule=kind)) for kind in ("ends", "constant"))
    schedule.check(None)
    assert schedule.ratio(9) == 0.3 and schedule.active(9, 4096) == flat.active(9, 4096)
    assert schedule.active(4, 4096, 5) == flat.active(4, 4096, 5)


def flow_levels(steps, shift=3.0):
    times = [1 - step / steps for step in range(steps + 1)]
    return [shift * time / (1 + (shift - 1) * time) for time in times]


@settings(deadline=None)
@given(
    ratio=st.floats(0.02, 1),
    steps=st.integers(1, 60),
    tokens=st.integers(16, 8192),
    twice=st.booleans(),
    stands=st.booleans(),
    rising=st.booleans(),
)
def test_sigmas_have_the_right_sum_in_three_levels(ratio, steps, tokens, twice, stands, rising):
    levels = flow_levels(steps)
    levels = [0.5] * (steps + 1) if stands else levels[::-1] if rising else levels
    levels = [level for level in levels[:-1] for _ in range(1 + twice)] + levels[-1:]
    steps = len(levels) - 1
    schedule = Schedule(RASConfig(sample_ratio=ratio, ratio_schedule="sigmas"), levels)
    sparse = [step for step in range(steps) if schedule.kind(step, steps) == "sparse"]
    if not sparse:
        return
    ratios = [schedule.ratio(step, steps) for step in sparse]
    assert all(0 < value <= 1 + 1e-9 for value in ratios) and len(set(ratios)) <= 3
    assert sum(ratios) / len(sparse) == pytest.approx(ratio, rel=1e-3)
    counts = [schedule.active(step, tokens, steps) for step in sparse]
    assert len(set(counts)) <= 3 and min(counts) >= 1 and max(counts) <= tokens


def test_sigmas_follow_the_error_that_is_expected():
    options = dict(sample_ratio=0.25, ratio_schedule="sigmas", reset_interval=None)
    schedule = Schedule(RASConfig(**options), flow_levels(28))
    counts = {step: schedule.active(step, 4096, 28) for step in range(4, 28)}
    assert counts[26] == max(counts.values()) > 4 * counts[14] and counts[4] >= counts[14] == min(counts.values())
    # evaluated twice at each level, both count alike
    levels = [level for level in flow_levels(28)[:-1] for _ in range(2)] + [0.0]
    twice = Schedule(RASConfig(**options), levels)
    assert twice.active(30, 4096, 56) == twice.active(31, 4096, 56) < twice.active(52, 4096, 56)


@pytest.mark.parametrize("ratio", [0.08, 0.125, 0.25, 0.6])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("times", [1, 2], ids=["each level once", "each level twice"])
def test_sigmas_make_the_expected_error_least(ratio, shift, times):
    """By its definition: w is a step's change of lambda times its length, and a share p leaves w exp(-p / 0.3) of it."""
    levels = flow_levels(20, shift)
    given = [level for level in levels[:-1] for _ in range(times)] + levels[-1:]
    schedule = Schedule(RASConfig(sample_ratio=ratio, ratio_schedule="sigmas", reset_interval=None), given)
    steps = range(4, 20 * times)
    cut = [min(max(level, 0.001), 0.999) for level in levels]
    signal = [math.log((1 - level) / level) for level in cut]
    error = [abs(signal[t] - signal[t - 1]) * abs(levels[t + 1] - levels[t]) for t in (step // times for step in steps)]
    least = min(1 / 16, ratio)

    def shares(constant: float) -> list[float]:
        return [min(max(0.3 * math.log(w) + constant, least), 1.0) for w in error]

    exact = shares(brentq(lambda constant: sum(shares(constant)) - ratio * len(steps), -9, 9))
    width = (max(exact) - min(exact)) / 3
    level_of = [min(int((share - min(exact)) / width + 1e-9), 2) for share in exact]
    for level in set(level_of):
        one = [place for place, other in enumerate(level_of) if other == level]
        wanted = sum(exact[place] for place in one) / len(one)
        assert [schedule.ratio(steps[place], len(given) - 1) for place in one] == pytest.approx(
            [wanted] * len(one), rel=1e-6
        )


def test_sigmas_of_nobody_are_ends():
    ends, sigmas = (Schedule(RASConfig(ratio_schedule=kind)) for kind in ("ends", "sigmas"))
    assert [ends.active(step, 1024, 28) for step in range(28)] == [sigmas.active(step, 1024, 28) for step in range(28)]
    assert ends.active(9, 1024) == sigmas.active(9, 1024)


PRICE = Cost(1000, 10 * ACTIVE, 0, 0 * ACTIVE, 0, 100)


@pytest.mark.parametrize(("speedup", "interval"), [(1.5, 3), (2.4, 4), (2.8, 6), (3.5, 8), (4, None), (6.5, None)])
def test_a_speedup_spaces_the_dense_steps_of_the_defaults_as_far_as_it_must(speedup, interval):
    solved = at_speedup(RASConfig(speedup=speedup), lambda: PRICE, 28)
    assert solved.reset_interval == interval and solved.speedup is None
    assert PRICE.speedup(solved.ratio, 28, Schedule(solved).dense_steps(28)) == pytest.approx(speedup, rel=0.03)


@pytest.mark.parametrize("options", [{"preset": "quality"}, {"metric": "std"}, {"reset_steps": range(4, 20)}])
def test_a_speedup_leaves_dense_steps_alone_that_somebody_chose(options):
    with pytest.raises(ValueError, match="option speedup: a speed-up of 6.5 is out of reach"):
        at_speedup(RASConfig(speedup=6.5, **options), lambda: PRICE, 28)
    with pytest.raises(ValueError, match="option speedup: a speed-up of 60 is out of reach with 4 dense steps of 28"):
        at_speedup(RASConfig(speedup=60), lambda: PRICE, 28)


def observed(steps, **options):
    schedule = Schedule(RASConfig(**options))
    return [step for step in range(steps) if schedule.observes(step)]


def test_noise_is_looked_at_where_a_later_step_chooses_by_it():
    given = {"warmup_steps": 3, "reset_interval": None, "reset_steps": (0, 1, 2, *range(6, 12))}
    assert observed(9, **given, metric="std") == [2, 3, 4]
    assert observed(9, **given, metric="drift") == [1, 2, 3, 4], "its change between two steps is what counts"
    assert observed(9, **given, metric="std", sample_ratio=1.0) == [], "nothing is chosen"


def test_the_programs_that_a_tolerance_chooses_among():
    assert Schedule.tolerable(2**14) == [2**10, 2**12, 2**13]


def test_a_speedup_needs_the_steps_and_the_costs():
    with pytest.raises(ConfigError, match="option speedup needs the number of steps"):
        at_speedup(RASConfig(speedup=2), lambda: PRICE, None)
    with pytest.raises(ConfigError, match="option speedup needs the costs"):
        at_speedup(RASConfig(speedup=2), None, 28)
    config = RASConfig(sample_ratio=0.3)
    assert at_speedup(config, None, None) is config
