"""What `handle.summary()` says of steps, without any model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from ras_compile.config import RASConfig
from ras_compile.execute.compiling import compiling, seconds_spent
from ras_compile.history import Past
from ras_compile.kernels.fallbacks import Fallback
from ras_compile.notices import REFUSED
from ras_compile.pipelines.clock import Clock
from ras_compile.sampling.records import Record
from ras_compile.summary import Step, Summary, memory, summarise


def steps(kinds: str, **more) -> tuple[Step, ...]:
    """One step a letter: d(ense) of 10 s, s(parse) with a quarter of 64 tokens, of 4 s and a third of the FLOPs."""
    dense = Step(0, "dense", 64, 64, None, flops=3.0, dense_flops=3.0, seconds=10.0)
    sparse = replace(dense, kind="sparse", active=16, rows=torch.arange(16), flops=1.0, seconds=4.0)
    return tuple(replace(dense if kind == "d" else sparse, number=at, **more) for at, kind in enumerate(kinds))


def test_a_run_in_a_sentence():
    told = Summary(steps("ddss"), cache_bytes=1_300_000_000)
    assert str(told) == (
        "4 steps in 28 s: 2 dense, 2 sparse at 25 % of 64 tokens; 1.5x by FLOPs, 1.4x by the clock against dense steps; "
        "caches 1.3 GB"
    )


def test_a_reference_that_counts_as_picture_at_first_is_not_told():
    first, *others = steps("ddss")
    told = Summary((replace(first, tokens=128, active=128), *others))
    assert str(told).startswith("4 steps in 28 s: 2 dense, 2 sparse at 25 % of 64 tokens;")


def compiled_at(told: Sequence[Step], *places: int) -> tuple[Step, ...]:
    return tuple(
        replace(step, seconds=step.seconds + 30, compiled=20.0) if step.number in places else step for step in told
    )


def test_what_was_compiled_is_told_and_left_out_of_the_clock():
    """Capture by Dynamo happens outside of what is counted as compilation: the step's own time tells it, too."""
    plain, told = Summary(steps("ddsds")), Summary(compiled_at(steps("ddsds"), 0, 2))
    assert told.speedup == plain.speedup
    assert told.compiled == pytest.approx(60)
    assert "compiled 60 s at step 0 and 2" in str(told)


def test_no_speed_is_told_where_each_step_of_a_kind_compiled():
    told = Summary(compiled_at(steps("dds"), 2))
    assert told.speedup is None and "by the clock" not in str(told)
    assert "the clock counts once nothing compiles" in str(told)


def test_without_a_scheduler_there_is_no_clock():
    told = Summary(steps("ddss", seconds=None))
    assert told.speedup is None and told.seconds is None
    assert str(told) == "4 steps: 2 dense, 2 sparse at 25 % of 64 tokens; 1.5x by FLOPs against dense steps"


def test_dense_steps_that_nobody_planned_are_told_with_their_reason():
    run = steps("ddssss")
    run = (*run[:3], *(replace(step, kind="dense", reason="its latent was replaced") for step in run[3:5]), run[5])
    assert str(Summary(run)).endswith("\nnot as planned: steps 3 to 4 dense: its latent was replaced")
    assert "not as planned" not in str(Summary(steps("dd", reason="warm-up")))


def test_what_fell_back_is_told():
    told = Summary(steps("ds"), fallbacks=(Fallback("a program runs uncompiled", "RuntimeError: no compiler", 3),))
    assert str(told).endswith(
        "\nnot as planned: in this process so far: 3 x a program runs uncompiled (RuntimeError: no compiler)"
    )


def test_memory_is_told_as_people_say_it():
    told = [memory(count) for count in (560_000, 5_600, 1_300_000, 25_400_000, 999_999_999, 1_300_000_000)]
    assert told == ["560 kB", "5.6 kB", "1.3 MB", "25 MB", "1,000 MB", "1.3 GB"]


def test_a_refused_model_is_not_told_with_another_ones_run(monkeypatch):
    monkeypatch.setattr(
        "ras_compile.kernels.fallbacks.fallbacks", lambda: (Fallback(REFUSED, "X", 1), Fallback("slow", "X", 1))
    )
    assert [fallback.what for fallback in summarise(Past([], 0), RASConfig()).fallbacks] == ["slow"]


def test_before_the_first_picture():
    assert "call the pipeline" in str(Summary()) and Summary().speedup is None


def test_a_notebook_shows_one_bar_a_step_and_no_markup_from_outside():
    html = Summary((*steps("ds"), *steps("d", reason="<script>alert(1)</script>")))._repr_html_()
    assert html.count("<span") == 3 and "<script" not in html


def test_a_record_prints_as_one_line():
    rows = torch.arange(512).reshape(1, 512)
    record = Record(5, "0", "sparse", 512, rows, "transformer", "", torch.zeros(4096))
    assert repr(record) == "<step 5, transformer, branch 0: sparse, 512 tokens>"


def test_nested_compilations_count_once(monkeypatch):
    now = iter([0.0, 7.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now, 100.0))
    before = seconds_spent()
    with compiling(announced=False), compiling(announced=False):
        pass
    assert seconds_spent() - before == pytest.approx(100.0)  # the outer one's end, less its beginning


def test_the_clock_tells_seconds_and_how_far_the_noise_moved(caplog):
    clock, host = Clock(), torch.device("cpu")
    clock.tick(host)  # no generation has begun: nothing to tell
    assert clock.seconds() == []
    clock.begin(host)
    with caplog.at_level(logging.INFO):
        for value in (1.0, 1.0, 2.0):
            clock.see(torch.full((1, 4, 64, 64), value))
            clock.tick(host)
    assert len(clock.seconds()) == 3 and clock.compiled() == [0.0] * 3 and not caplog.records
    assert clock.changes() == [None, 0.0, pytest.approx(0.5)]
    clock.begin(host)
    assert clock.seconds() == [] and clock.changes() == []


@pytest.mark.parametrize("first", [0, 2])
def test_a_noise_that_is_not_a_number_is_told_from_its_first_step_on(first):
    clock, host = Clock(), torch.device("cpu")
    clock.begin(host)
    for step in range(4):
        clock.see(torch.full((1, 4, 8, 8), 1.0 if step < first else float("nan")))
        clock.tick(host)
    run = [replace(step, change=change) for step, change in zip(steps("ddss"), clock.changes(), strict=True)]
    assert str(Summary(tuple(run))).endswith(f"\nnot as planned: the noise is not a number from step {first} on")
    assert "not a number" not in str(Summary(tuple(run[:first])))


def test_a_step_that_compiles_says_so_in_the_log(monkeypatch, caplog):
    spent = iter([0.0, 3.0, 3.0])
    monkeypatch.setattr("ras_compile.pipelines.clock.seconds_spent", lambda: next(spent))
    clock, host = Clock(), torch.device("cpu")
    clock.begin(host)
    with caplog.at_level(logging.INFO):
        clock.tick(host)
        clock.tick(host)
    assert [record.getMessage() for record in caplog.records] == ["step 0 compiled for 3.0 s"]
    assert clock.compiled() == [3.0, 0.0]


class Event:
    """An event of a device on which a step takes a quarter of a second, whatever the host's clock says."""

    made = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        Event.made += 1
        self.at, self.waited = 250 * Event.made, False

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, later):
        assert later.waited, "it may not have happened yet"
        return later.at - self.at


def test_on_a_gpu_events_tell_the_time_and_nobody_waits_for_them_before(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    clock, first, second = Clock(), torch.device("cuda", 0), torch.device("cuda", 1)
    clock.begin(first)
    clock.tick(first)
    clock.tick(first)
    clock.tick(second)  # a model that is split over devices: events of two of them cannot be compared
    taken = clock.seconds()
    assert taken[:2] == [0.25, 0.25] and 0 <= taken[2] < 0.25
