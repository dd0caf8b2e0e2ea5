"""What an attached pipeline says of a call, and what it is told: the pipeline is a stand-in, and there is no network."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import ras_compile
from ras_compile import RASConfig
from ras_compile.errors import ConfigError, RASWarning
from ras_compile.execute.slopes import SLOPES
from ras_compile.passes.algebra.tokens import TokenView
from ras_compile.sampling.calls import CallInfo, Decision
from ras_compile.sampling.inference import TimeLine, sketch
from ras_compile.sampling.locate import AttachedCall, Said, attached_call, locate
from ras_compile.sampling.reuse import Extrapolation, active_tokens
from ras_compile.sampling.rows import RowChooser
from ras_compile.sampling.schedule import Schedule
from ras_compile.sampling.state import TransformerState
from ras_compile.sampling.velocity import predicted, terms, velocity

BATCH, TOKENS, CHANNELS = 2, 8, 3
LEVELS = [1 - step / 20 for step in range(21)]
TIMES = torch.tensor([1000 * level for level in LEVELS[:-1]])
VIEW = TokenView((), frozenset({1}), (BATCH, TOKENS, CHANNELS), (0, 1, 2), (BATCH, TOKENS, 1), None)
FEW: dict[str, Any] = {"warmup_steps": 2, "reset_interval": None, "cuda_graphs": False}


class Pipeline:
    """Follows one transformer through a scheduler of 20 noise levels."""

    def __init__(self, velocity: bool = False, **options: Any) -> None:
        self.config, self.key = RASConfig(**{**FEW, **options}), object()
        self.state, self.velocity = TransformerState(RASConfig()), velocity
        self.told: list[Any] = []
        self.asked: list[str] = []
        self.unused: Tensor | None = None

    def overwritten(self, view, latent):
        self.asked.append("overwritten")
        return self.unused

    def check_clean(self):
        self.asked.append("clean")

    def noise_levels(self):
        self.asked.append("levels")
        return LEVELS

    def velocity_terms(self):
        return terms("v_prediction", LEVELS) if self.velocity else ()

    def evaluated(self, evaluation):
        self.told.append(evaluation)

    def leave(self):
        self.asked.append("leave")

    def call(
        self, step: int, *, entry: int | None = None, latent=None, noise=None, branch=None, name=None, given=(), **more
    ) -> tuple[Decision, CallInfo, Tensor]:
        """One call of the transformer, in a step of the pipeline; what a sparse one does not compute it holds."""
        said: dict[str, Any] = dict(late=False, windows={}, refusal="", replaced=False, num_steps=20)
        said |= {word: more.pop(word) for word in list(more) if word in said}
        entry = step if entry is None else entry
        latent = torch.randn(BATCH, TOKENS, CHANNELS) if latent is None else latent
        noise = torch.randn(BATCH, TOKENS, CHANNELS) if noise is None else noise
        call = AttachedCall(self, "transformer", branch, Said(self.key, step, times=TIMES, entry=entry, **said))
        if more.pop("silent", False):
            call.said = None
        info = CallInfo("graph", latent, given, None, BATCH, TOKENS, (2, 4), **{"view": VIEW, **more})
        with attached_call(call):
            decision = self.state.decide(info)
            if decision.rows is not None:
                computed = active_tokens(decision.rows, TOKENS)[..., None]
                noise = torch.where(computed, noise, decision.slots["noise"])
            decision.slots["noise"] = noise
            output = noise.clone()
            self.state.record(info, decision, noise, output, VIEW)
            if decision.time is not None:
                self.state.extrapolate(info, decision, output, VIEW)
        return decision, info, output


def reasons(pipe: Pipeline, steps, **said) -> list[str]:
    return [pipe.call(step, **said)[0].reason for step in steps]


def test_a_pipeline_is_told_what_each_call_computed():
    pipe = Pipeline(noise_reuse="hold")
    calls = [pipe.call(step) for step in range(4)]
    for told, (decision, info, _) in zip(pipe.told, calls, strict=True):
        assert told.latent is info.latent and told.view is VIEW
        assert told.rows is decision.rows and told.noise_reuse == "hold"
    assert [told.rows is None for told in pipe.told] == [True, True, False, False]


def test_of_a_spread_latent_it_is_told_the_tokens_of_all_processes():
    pipe, everyone = Pipeline(), object()
    spread: Any = SimpleNamespace(view=everyone, rows=lambda rows: rows + 100)
    calls = [pipe.call(step, spread=spread) for step in range(4)]
    assert all(told.view is everyone for told in pipe.told) and [told.rows for told in pipe.told[:2]] == [None, None]
    assert torch.equal(pipe.told[2].rows, calls[2][0].rows + 100)


@pytest.mark.parametrize("without", [{"view": None}, {"silent": True}], ids=str)
def test_a_call_without_a_view_or_of_no_step_is_not_told(without):
    pipe = Pipeline()
    pipe.state.record = lambda *given: TransformerState.record(pipe.state, *given[:4])  # type: ignore[method-assign]
    pipe.call(0, **without)
    assert not pipe.told


def test_the_options_are_those_of_the_pipeline_at_the_generation_s_begin():
    pipe = Pipeline()
    assert reasons(pipe, range(4)) == ["warm-up", "warm-up", "", ""]
    pipe.config = RASConfig(**FEW | {"warmup_steps": 3})
    assert reasons(pipe, range(4, 6)) == ["", ""]
    pipe.key = object()
    assert reasons(pipe, range(4)) == ["warm-up"] * 3 + [""]


def test_steps_are_counted_from_where_a_generation_begins():
    """Also those of the schedule: the warm-up, dense steps in between, and those whose noise is looked at."""
    pipe = Pipeline(reset_steps=[2, 4])
    assert reasons(pipe, range(3, 9)) == ["warm-up", "warm-up", "error reset", "", "error reset", ""]
    pipe = Pipeline(ratio_schedule="linear", sample_ratio=0.5)
    counts = [pipe.call(step)[0].active for step in range(10, 20)]
    alone = Schedule(pipe.config)
    assert counts == [TOKENS] * 2 + [alone.active(step, TOKENS, 10) for step in range(2, 10)]
    assert counts != [TOKENS] * 2 + [alone.active(step, TOKENS, 20) for step in range(2, 10)]


@pytest.mark.parametrize(("metric", "wanted"), [("std", [4, 5]), ("drift", [3, 4, 5])])
def test_noise_is_looked_at_where_a_later_step_chooses_by_it(monkeypatch, metric, wanted):
    seen = []
    monkeypatch.setattr(RowChooser, "observe", lambda self, noise, info, *more: seen.append(info.step))
    monkeypatch.setattr(RowChooser, "rows", lambda self, *given: torch.arange(4).repeat(BATCH, 1))
    pipe = Pipeline(metric=metric, warmup_steps=3, reset_steps=[5, 6, 7, 8])
    for step in range(2, 8):
        pipe.call(step)
    assert seen == wanted


def test_a_scheduler_that_adds_noise_is_dense_and_says_so():
    pipe = Pipeline()
    with pytest.warns(RASWarning, match="this pipeline runs dense: its noise"):
        assert reasons(pipe, range(3), refusal="its noise") == ["warm-up", "warm-up", "its scheduler adds noise"]
    pipe = Pipeline(unsupported="error")
    with pytest.raises(ConfigError, match="its noise"):
        reasons(pipe, range(3), refusal="its noise")


def test_a_latent_that_was_replaced_is_dense():
    pipe = Pipeline()
    assert reasons(pipe, range(3)) == ["warm-up", "warm-up", ""]
    assert reasons(pipe, [3], replaced=True) == ["its latent was replaced"]
    assert reasons(pipe, [4]) == [""]


@pytest.mark.parametrize(("begin", "late"), [(0, False), (0, True), (1, False), (3, False)])
def test_dense_steps_beyond_a_run_that_begins_late(begin, late):
    """Such a run is shorter than it was asked for; elsewhere they are a mistake."""
    pipe = Pipeline(reset_steps=[2, 6])
    if begin or late:
        with pytest.warns(RASWarning, match=r"starts late and has 5 steps, so reset_steps \[6\] do not come"):
            pipe.call(begin, late=late, num_steps=begin + 5)
    else:
        with pytest.raises(ConfigError, match="this run has 5 steps"):
            pipe.call(begin, num_steps=5)


def test_the_levels_of_sigmas_are_those_from_the_run_s_first_on():
    pipe = Pipeline(ratio_schedule="sigmas")
    found = [pipe.call(step, entry=step + 3, num_steps=17)[0].active for step in range(17)]
    wanted = Schedule(pipe.config, LEVELS[3:])
    assert found[2:] == [wanted.active(step, TOKENS, 17) for step in range(2, 17)]
    assert found[2:] != [Schedule(pipe.config).active(step, TOKENS, 17) for step in range(2, 17)]
    assert pipe.asked.count("levels") == 1


@pytest.mark.parametrize("schedule", ["ends", "constant"])
def test_levels_are_asked_for_where_they_count(schedule):
    pipe = Pipeline(ratio_schedule=schedule)
    pipe.call(0)
    assert not pipe.asked


def test_the_clean_sample_needs_a_scheduler_that_tells_it():
    pipe = Pipeline(noise_reuse="x0")
    pipe.call(0)
    assert pipe.asked == ["clean"]
    with pytest.raises(ConfigError, match="noise_reuse='x0' needs the scheduler"):
        pipe.call(1, silent=True)
    alone = TransformerState(pipe.config)
    with ras_compile.generation(4) as gen, pytest.raises(ConfigError, match="noise_reuse='x0' needs the scheduler"):
        gen.step()
        alone.decide(CallInfo("graph", torch.zeros(BATCH, TOKENS, CHANNELS), (), None, BATCH, TOKENS))


def test_tokens_that_the_pipeline_puts_back_are_left_out():
    pipe = Pipeline(sample_ratio=0.5, ratio_schedule="constant")
    pipe.unused = torch.arange(TOKENS).repeat(BATCH, 1) < 4
    assert pipe.call(0)[0].rows is None and pipe.call(1)[0].rows is None and not pipe.asked, "nothing is chosen yet"
    assert pipe.call(2)[0].rows.tolist() == [[4, 5, 6, 7]] * BATCH and pipe.asked == ["overwritten"]


@pytest.mark.parametrize(("unused", "active"), [(0, TOKENS), (TOKENS, 1)])
def test_their_error_is_within_every_tolerance(unused, active):
    pipe = Pipeline(tolerance=1e-6)
    pipe.unused = torch.arange(TOKENS).repeat(BATCH, 1) < unused
    found = [pipe.call(step)[0] for step in range(3)][-1]
    assert found.active == active
    assert found.reason == ("" if active == 1 else "the expected error is above the tolerance")
    assert ("sparse" if active == 1 else "dense") == found.kind


def test_without_a_view_nobody_is_asked_for_tokens_that_are_put_back():
    pipe = Pipeline(noise_reuse="hold", metric="std")
    for step in range(3):
        pipe.call(step, view=None)
    assert not pipe.asked


def velocities(pipe: Pipeline, steps: int) -> list[tuple[Decision, CallInfo, Tensor]]:
    pairs, calls, held = torch.tensor(pipe.velocity_terms()), [], torch.zeros(BATCH, TOKENS, 1, CHANNELS)
    for step in range(steps):
        calls.append(pipe.call(step))
        decision, info, _ = calls[-1]
        active = torch.ones(BATCH, TOKENS, dtype=torch.bool)
        if decision.rows is not None:
            active = active_tokens(decision.rows, TOKENS)
        prediction = VIEW(decision.slots["noise"])
        (held,) = velocity(prediction, VIEW(info.latent), held, active, pairs[step])
        torch.testing.assert_close(decision.slots["velocity"], held)
    return calls


@pytest.mark.parametrize(
    "options", [{"metric": "drift", "noise_reuse": "hold"}, {"metric": "std", "noise_reuse": "linear"}], ids=str
)
def test_velocities_are_followed_where_drift_or_a_line_asks_for_them(monkeypatch, options):
    seen: list[Any] = []
    observe = RowChooser.observe

    def noting(self, noise, info, view=None, slots=None):
        seen.append((noise, view))
        observe(self, noise, info, view, slots)

    monkeypatch.setattr(RowChooser, "observe", noting)
    last = velocities(Pipeline(velocity=True, **options), 4)[-1][0]
    if options["metric"] == "drift":
        assert seen[-1][0] is last.slots["velocity"] and seen[-1][1] is None
    else:
        assert seen[-1][0] is last.slots["noise"] and seen[-1][1] is VIEW


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"metric": "std", "noise_reuse": "hold"}, {}),
        ({"metric": "drift", "velocity": False}, {}),
        ({"metric": "drift"}, {"spread": SimpleNamespace(view=VIEW, rows=lambda rows: rows)}),
        ({"metric": "drift", "noise_reuse": "hold"}, {"view": None}),
    ],
    ids=["no use for it", "a flow", "several processes", "no view"],
)  # fmt: skip
def test_elsewhere_predictions_stay_as_they_are(options, more):
    pipe = Pipeline(**{"velocity": True, **options})
    assert "velocity" not in [pipe.call(step, **more) for step in range(3)][-1][0].slots


def test_a_prediction_of_other_channels_than_the_sample_s_is_no_velocity():
    pipe = Pipeline(velocity=True, noise_reuse="hold")
    wide = TokenView((), frozenset({1}), (BATCH, TOKENS, 5), (0, 1, 2), (BATCH, TOKENS, 1), None)
    found = pipe.call(0, latent=torch.randn(BATCH, TOKENS, 5), view=wide)[0]
    assert "velocity" not in found.slots and found.run.terms is not None


@pytest.mark.parametrize("reuse", ["linear", "forecast"])
@pytest.mark.parametrize("turning", [False, True], ids=["a flow", "v-predictions"])
def test_inactive_tokens_go_on_along_their_lines(reuse, turning):
    """Those of the velocity, where predictions turn: what is returned is the prediction at the present sample."""
    pipe, line = Pipeline(velocity=turning, noise_reuse=reuse), Extrapolation(reuse == "forecast")
    for step in range(6):
        decision, info, found = pipe.call(step)
        computed = decision.slots["noise"]
        own = decision.slots["velocity"] if turning else VIEW(computed)
        ahead = line(own, decision.rows, TIMES[step])
        if turning and decision.rows is not None:
            pair, active = torch.tensor(terms("v_prediction", LEVELS))[step], active_tokens(decision.rows, TOKENS)
            (ahead,) = predicted(VIEW(computed), VIEW(info.latent), ahead, active, pair)
        wanted = computed if decision.rows is None else ahead[:, :, 0]
        torch.testing.assert_close(found, wanted)
    assert decision.rows is not None and (reuse == "forecast" or not torch.equal(found, computed))


@pytest.mark.parametrize("said", [True, False])
def test_a_pipeline_whose_loop_was_left_for_another_is_told(said):
    """A named branch has nothing left of a context that had stayed: these calls are another loop's, which says no steps."""
    pipe = Pipeline(context="fresh")
    kept = torch.zeros(2)
    gen = ras_compile.generation(20)
    with gen if not said else warnings.catch_warnings():
        for step in range(4):
            if not said:
                gen.step()
            pipe.call(step, branch="cond", given=(kept, torch.zeros(1)))
        if not said:
            gen.step()
        found = pipe.call(4, branch="cond", given=(torch.ones(2), torch.zeros(1)))[0]
    told = found.kind, "leave" in pipe.asked, found.run.line is not None
    assert told == (("dense", True, True) if said else ("sparse", False, False))
    assert (found.place.said is None) == said


def test_where_a_call_stands_may_be_asked_before():
    state = TransformerState(RASConfig())
    with ras_compile.generation(20) as gen:
        gen.step()
        gen.step()
        place = locate()
        found = state.decide(CallInfo("graph", torch.zeros(BATCH, TOKENS, CHANNELS), (), None, BATCH, TOKENS), place)
        assert found.place is place and (found.step, found.run.key) == (1, gen.key)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("calls", [16, 17])
def test_more_calls_in_a_step_than_a_step_can_have(attached, calls):
    pipe = Pipeline(warmup_steps=1)
    with warnings.catch_warnings(record=True) as told, ras_compile.generation() as gen:
        warnings.simplefilter("always")
        for step in range(2):
            if not attached:
                gen.step()
            for number in range(calls):
                found = pipe.call(step, branch=str(number))[0]
    said = [str(warning.message) for warning in told if "transformer calls within step" in str(warning.message)]
    assert len(said) == (0 if calls == 16 else 2)
    assert all(("attached scheduler's" if attached else "Call its step() once") in text for text in said)
    assert found.kind == ("sparse" if calls == 16 else "dense")


def alone(state: TransformerState, time: Any, **more) -> tuple[Decision, CallInfo, Tensor]:
    """A call of a loop that says nothing."""
    info = CallInfo("graph", torch.randn(BATCH, TOKENS, CHANNELS), (), time, BATCH, TOKENS, (2, 4), view=VIEW, **more)
    decision, noise = state.decide(info), torch.randn(BATCH, TOKENS, CHANNELS)
    if decision.rows is not None:
        noise = torch.where(active_tokens(decision.rows, TOKENS)[..., None], noise, decision.slots["noise"])
    decision.slots["noise"], output = noise, noise.clone()
    state.record(info, decision, noise, output, VIEW)
    if decision.time is not None:
        state.extrapolate(info, decision, output, VIEW)
    return decision, info, output


SAMPLES = torch.tensor([3.0, 2.0])


@pytest.mark.parametrize(
    ("time", "wanted"),
    [
        (SAMPLES, SAMPLES),
        (torch.tensor([[3.0, 1.0, 0.5], [1.0, 2.0, 0.5]]), SAMPLES),
        (torch.tensor([5.0]), torch.tensor(5.0)),
        (torch.tensor([1.0, 4.0, 2.0]), torch.tensor(4.0)),
        (torch.tensor(6), torch.tensor(6)),
        (SAMPLES.half(), 0),
        (SAMPLES.bfloat16(), 0),
        (torch.empty(0), 0),
        (None, 0),
        (7, 7.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("reuse", ["linear", "hold"])
def test_the_time_of_a_line_is_as_exact_as_the_call_tells_it(time, wanted, reuse):
    """Else it is the number of the step; an attached scheduler's own time comes first."""
    state = TransformerState(RASConfig(noise_reuse=reuse))
    found = alone(state, time)[0].time
    if reuse == "hold":
        assert found is None
    elif isinstance(wanted, Tensor):
        assert torch.equal(found, wanted)
    else:
        assert found == wanted and type(found) is type(wanted)


def test_an_attached_scheduler_says_the_time_of_a_line():
    assert Pipeline(noise_reuse="linear").call(2, entry=5)[0].time == TIMES[5]


@pytest.mark.parametrize("reuse", ["linear", "hold"])
def test_what_was_returned_is_what_the_next_latent_is_judged_by(monkeypatch, reuse):
    monkeypatch.setattr(TimeLine, "place", lambda line, *given: "begin" if given[0] is None else "advance")
    taken: list[list[Tensor]] = []
    take = TimeLine.take
    monkeypatch.setattr(TimeLine, "take", lambda line, noises: (taken.append(noises), take(line, noises)))
    state, outputs = TransformerState(RASConfig(**FEW, noise_reuse=reuse)), []
    for step in range(7):
        decision, _, output = alone(state, 1.0 - step / 8)
        outputs.append(output)
    assert decision.kind == "sparse" and len(taken) == 6
    for noises, output in zip(taken, outputs, strict=False):
        assert len(noises) == 1 and torch.equal(noises[0], sketch(output, VIEW))


def test_calls_that_tell_no_step_are_warned_of_once_they_have_begun_often_enough(monkeypatch):
    monkeypatch.setattr(
        TimeLine, "place", lambda line, time, *given: "begin" if time is None or time < 1 else "advance"
    )
    state = TransformerState(RASConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            alone(state, 0.5)
        alone(state, 1.5)  # one that gets on: counted anew
        for _ in range(8):
            alone(state, 0.5)
    with pytest.warns(RASWarning, match="looks like the first of a generation, so all run dense"):
        alone(state, 0.5)


def test_a_run_that_nobody_tells_is_judged_by_its_steps_when_it_is_over(monkeypatch):
    moves: list[Any] = []
    monkeypatch.setattr(TimeLine, "place", lambda *given: moves.pop(0))
    told = []
    monkeypatch.setattr(Schedule, "warn_if_dense", lambda schedule, steps: told.append(steps))
    state = TransformerState(RASConfig())
    alone(state, 9.0)
    for move in ("advance", "advance", "advance", "begin", "advance", "begin", "begin"):
        moves.append(move)
        alone(state, 9.0 - len(told))
    assert told == [], "equal times show no direction"
    state = TransformerState(RASConfig())
    alone(state, 9.0)
    for time, move in enumerate(("advance", "advance", "advance", "begin", "begin")):
        moves.append(move)
        alone(state, 8.0 - time)
    assert told == [4]


def test_weights_that_change_where_nobody_tells_the_steps_begin_a_generation():
    state, weight = TransformerState(RASConfig(**FEW)), torch.nn.Parameter(torch.zeros(2))
    moves = []
    for step in range(6):
        if step == 4:
            with torch.no_grad():
                weight.add_(1)
        info = CallInfo("graph", torch.full((1, 4, 2), -float(step)), (), None, 1, 4, (2, 2), weights=[weight])
        decision = state.decide(info)
        state.record(info, decision, torch.ones(1, 4, 1, 2), None)
        moves.append((decision.reason, len(state.records)))
    assert moves == [("warm-up", 1), ("warm-up", 2), ("", 3), ("", 4), ("warm-up", 1), ("warm-up", 2)]


def test_lines_of_caches_go_on_until_the_picture_is_another():
    pipe, lines = Pipeline(cache_reuse="forecast"), []
    for step in range(5):
        found = pipe.call(step, replaced=step == 3)[0]
        lines.append(found.slots[SLOPES])
        assert lines[-1].step == step
    assert lines[0] is lines[1] is lines[2] is not lines[3] is lines[4]
    pipe, lines, prompt = Pipeline(cache_reuse="forecast"), [], torch.zeros(2)
    for step in range(4):
        given = (prompt if step < 2 else torch.full((2,), float(step)),)
        lines.append(pipe.call(step, branch="cond", given=given)[0].slots[SLOPES])
    assert lines[0] is lines[1], "a named branch's context is not looked at where it may change"
    weight, lines, pipe = torch.nn.Parameter(torch.zeros(2)), [], Pipeline(cache_reuse="forecast")
    for step in range(4):
        if step == 2:
            weight.data = weight.data + 1
            with torch.no_grad():
                weight.add_(1)
        found = pipe.call(step, weights=[weight])[0]
        lines.append(found.slots[SLOPES])
        assert found.reason == ("warm-up" if step < 2 else "its weights have changed" if step == 2 else "")
    assert lines[0] is lines[1] is not lines[2] is lines[3]
    assert SLOPES not in Pipeline().call(0)[0].slots


def test_a_reset_keeps_what_was_told_last():
    pipe = Pipeline()
    reasons(pipe, range(3))
    state, records, graphs = pipe.state, pipe.state.records, pipe.state.graphs
    assert graphs == {"0": "graph"}
    state.reset()
    assert state.records == [] and state.graphs == {} and state.released == (records, graphs)
    state.reset()
    assert state.released[0] is records, "there was nothing more to tell"
    assert reasons(pipe, [3]) == ["warm-up"]


def test_what_is_told_of_a_call():
    pipe = Pipeline()
    for step in range(3):
        decision, info, _ = pipe.call(step, branch="cond")
    last = pipe.state.records[-1]
    assert (last.step, last.branch, last.kind, last.active) == (
        2,
        "cond",
        "sparse",
        decision.active,
    ) and last.rows is decision.rows
    assert (decision.of.last_step, decision.of.kept, decision.run.pending) == (2, True, None)
    assert decision.active == decision.rows.shape[1] == pipe.state.records[-1].active < TOKENS
