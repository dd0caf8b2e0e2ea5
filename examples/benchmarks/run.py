"""How fast is region-adaptive sampling? One model, many ways of sampling it, one JSON.

    python examples/benchmarks/run.py --model sd3-medium --methods eager,compile,ras --out results
    python examples/benchmarks/run.py --model flux-dev --measure starts --out results --merge   # cold and warm starts
    python examples/benchmarks/run.py --model flux-dev --methods compile,ras --quantise float8-row float8-tensor
    python examples/benchmarks/run.py --model sd3-medium --size tiny --inner-backend eager --out results   # on a CPU

`DIR/<gpu or cpu>.json` is written after every row; `rows.py` says what its columns mean, `sizes.py` what the models are.
All rows of a run share one model. Where the way allows it, its runs and those of compiled dense sampling take turns, and
x_compiled is the ratio of these neighbours: a device that slows down slows down both. `--quantise` measures compiled dense
sampling and RAS once more with a quantised model (`quantise.py`), whose neighbour is compiled dense sampling of the plain one.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from machine import describe, dtype_of, short_name
from measure import HostClock, Marks, Memory, null_backend, synchronising, weight_bytes
from quantise import KINDS, quantised
from rows import FLOOR_TFLOPS, load, merge, new_row, save
from sizes import MODELS, SIZES, WARMUP, Workload, build, sample
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from ways import METHODS, NotAvailable, Setup, Way, set_up, ways_of

import ras_compile
from ras_compile.config import PRESETS

__all__ = ["main"]

_ENOUGH = 30  # seconds of timed runs after which a row has no more repeats


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--methods", default="eager,compile,ras,fewer-steps", help=f"some of {','.join(METHODS)}")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.5, 0.25, 0.125])
    parser.add_argument(
        "--presets", nargs="*", default=[], choices=list(PRESETS), help="rows of RAS beside the ratios'"
    )
    parser.add_argument("--contexts", nargs="+", default=["fresh", "frozen"], choices=["fresh", "frozen"])
    parser.add_argument("--steps", type=int, help="steps of a run; by default the model's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quantise", nargs="*", default=[], choices=KINDS, help="compile and ras once more, quantised")
    parser.add_argument("--measure", choices=["speed", "starts"], default="speed")
    parser.add_argument("--size", choices=SIZES, default="real")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner-backend", default="inductor", help="eager: nothing is compiled, to try things out")
    parser.add_argument("--options", type=json.loads, default={}, help="further options of RAS, as JSON")
    parser.add_argument(
        "--brief", action="store_true", help="no host time and no waiting calls, which take runs of their own"
    )
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no further row is begun")
    parser.add_argument("--out", type=Path, default=Path("benchmark_output"), help="folder of the JSON")
    parser.add_argument("--merge", action="store_true", help="keep the rows of an existing file that are not measured")
    parser.add_argument("--start-of", type=json.loads, help=argparse.SUPPRESS)  # a process of `--measure starts`
    args = parser.parse_args(argv)
    if args.repeats < 1 or (args.steps is not None and args.steps < 2):
        parser.error("--repeats takes at least 1, --steps at least 2")
    try:
        args.ways = ways_of(args.methods.split(","), [*args.ratios, *args.presets], args.contexts)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> dict:
    """Measures and writes; returns what was written."""
    begin = time.perf_counter()
    args = arguments(argv)
    if args.start_of is not None:
        print(json.dumps(_start(args)))
        return {}
    device = torch.device(args.device)
    path = args.out / f"{short_name(device)}.json"
    before = load(path) if args.merge else {"meta": {}, "rows": []}
    given = sys.argv[1:] if argv is None else argv
    meta = describe(__file__, given, device, size=args.size, floor_tflops=FLOOR_TFLOPS)
    merge(before, {"meta": meta, "rows": []})  # refuses now what could not be written later
    content = before
    measured = _starts if args.measure == "starts" else _speeds
    rows: list[dict] = []
    for row in measured(args, begin + args.budget):
        rows.append(row | {"date": meta["commands"][0]["date"]})
        content = merge(before, {"meta": meta, "rows": rows})
        save(path, content)
        print(_line(rows[-1]), flush=True)
    print(f"written: {path}")
    return content


def _workload(args: argparse.Namespace) -> Workload:
    device = torch.device(args.device)
    work = build(args.model, args.size, device, dtype_of(device))
    work.steps = args.steps or work.steps
    return work


def _text(said: Exception | Warning) -> str:
    """The first line of what was said; of files only the name, since results are read on other machines."""
    return re.sub(r"(?:/[^/\s:]+)+/([^/\s:]+)", r"\1", str(said).strip().partition("\n")[0])


# speed


class Bench:
    """One model on one device, and what its rows share.

    Args:
        args: the arguments.
        kind: of quantised linear layers, one of `KINDS`.
        plain: the bench of the plain model, beside a quantised one.

    Raises:
        NotAvailable: there is no such quantised model here.
    """

    def __init__(self, args: argparse.Namespace, kind: str | None = None, plain: Bench | None = None) -> None:
        self.args, self.plain = args, plain
        self.work = _workload(args) if kind is None else quantised(_workload(args), kind)
        self.device = torch.device(args.device)
        self.weights = weight_bytes(self.work.transformer)
        self.seconds: dict[Way, float] = {}  # medians of the rows so far
        # compiled dense sampling of the plain model, once its row has been measured
        self.dense: Setup | None = None if plain is None else plain.dense
        self.latents: dict[Way, Tensor] = {}  # at the end of the rows so far
        self.gain: float | None = None  # of compiled dense sampling of a quantised model over that of the plain one
        self.few = min(self.work.steps, WARMUP + 4)  # steps that reach every program
        self._adaptive: dict[str | None, tuple[Setup, Memory]] = {}

    def run(self, setup: Setup, steps: int | None = None, mark: Any = None, denoise: Any = None) -> Any:
        """One run of a way; returns the latents."""
        work = self.work
        count = steps or work.steps
        if setup.resets:  # a run that only warms up is shorter than where its resets would be
            setup.handle.configure(reset_steps=tuple(step for step in setup.resets if step < count))
        work.transformer._compiled_call_impl = setup.compiled
        try:
            return sample(work, denoise or work.transformer, setup.scheduler, count, mark or (lambda index: None))
        finally:
            work.transformer._compiled_call_impl = None
            setup.between()

    def timed(self, setup: Setup, steps: int | None = None) -> list[float]:
        """Milliseconds of every step of one run."""
        marks = Marks(self.device)
        self.run(setup, steps, marks)
        return marks.milliseconds()

    @cached_property
    def dense_flops(self) -> int | None:
        """FLOPs of a dense step, counted in an eager one; None on a CPU, where the counter misses attention."""
        if self.plain is not None:
            return self.plain.dense_flops
        return self.counted_flops(Setup(self.work.scheduler()), 2) // 2 if self.device.type == "cuda" else None

    @cached_property
    def null_ms(self) -> float:
        """Host time of a call whose backend returns at once."""
        self.work.transformer._compiled_call_impl = None
        self.work.transformer.compile(backend=null_backend)
        setup = Setup(self.work.scheduler(), self.work.transformer._compiled_call_impl)
        return statistics.median(self.host(setup).milliseconds[1:])

    def host(self, setup: Setup) -> HostClock:
        """The host's time of every transformer call of one run."""
        clock = HostClock(self.work.transformer, self.device)
        self.run(setup, denoise=clock)
        return clock

    def row(self, way: Way) -> dict:
        """Measures one row; a way that cannot be run gives a row with a reason in place of figures."""
        row = new_row(self.work.name, way.method, way.sample_ratio, way.context)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                if way.method == "fewer-steps":
                    self._fewer_steps(way, row)
                else:
                    self._measure(way, row)
            except (NotAvailable, ras_compile.RASError) as error:
                row["reason"] = _text(error)
            except Exception as error:  # a row that fails must not take the others with it
                row["reason"] = f"{type(error).__name__}: {_text(error)}"
        said = [_text(one.message) for one in told if issubclass(one.category, ras_compile.RASWarning)]
        return row | ({"warnings": said} if said else {})

    def _measure(self, way: Way, row: dict) -> None:
        work = self.work
        if self.device.type == "cuda":
            gc.collect()
        setup, memory = self._set_up(way)
        memory.settled()
        try:
            begin = time.perf_counter()
            self._first(setup, row)
            row["first_s"] = time.perf_counter() - begin
            last = self.run(setup)  # settles: captures, allocations
            memory.settled()
            runs = [self.timed(setup)]
            row |= dict(steps=work.steps, peak_gb=memory.peak_gb(), reserved_gb=memory.reserved_gb())
            neighbours = []
            pair = self.dense if not setup.exclusive else None
            for _ in range(self.args.repeats - 1):
                if sum(map(sum, runs)) > 1e3 * _ENOUGH:
                    break
                if pair is not None:
                    neighbours.append(sum(self.timed(pair)) / 1e3)
                runs.append(self.timed(setup))
            self._report(way, row, setup, runs, neighbours)
            row["finite"] = bool(last.isfinite().all())
            self._compare(way, row, last)
            self._look_inside(way, row, setup)
            if way.method == "compile" and self.plain is None:
                self.dense = setup
        finally:
            if setup.exclusive:
                setup.close()

    def _set_up(self, way: Way) -> tuple[Setup, Memory]:
        """The way, ready to run. The ratios of RAS share one attached pipeline, as they would in a server."""
        shared = way.method == "ras" and not isinstance(way.sample_ratio, str)
        if shared and way.context in self._adaptive:
            setup, memory = self._adaptive[way.context]
            setup.handle.configure(sample_ratio=way.sample_ratio)
            return setup, memory
        memory = Memory(self.device, self.weights)
        setup = set_up(self.work, way, self.args.inner_backend, self.args.options)
        if shared:
            self._adaptive[way.context] = setup, memory
        return setup, memory

    def _first(self, setup: Setup, row: dict) -> None:
        """A short first run that compiles everything; a cache that cannot be compiled runs eagerly."""
        row |= setup.note
        if setup.compiled is not None:
            row["compiled"] = True
        try:
            self.run(setup, self.few)
        except Exception as error:
            if not setup.exclusive:
                raise
            row |= dict(compiled=False, not_compiled=f"{type(error).__name__}: {_text(error)}")
            setup.compiled = None
            self.run(setup, self.few)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _report(self, way: Way, row: dict, setup: Setup, runs: list[list[float]], neighbours: list[float]) -> None:
        work = self.work
        totals = [sum(run) / 1e3 for run in runs]
        seconds = statistics.median(totals)
        steps = [statistics.median(values) for values in zip(*runs, strict=True)]
        kinds = setup.kinds()
        names = [kinds[index][0] if index in kinds else "dense" for index in range(work.steps)]
        for kind in ("dense", "sparse"):
            found = [ms for ms, name in zip(steps, names, strict=True) if name == kind]
            row[f"{kind}_ms"] = statistics.median(found) if found else None
        if setup.exclusive:
            row["dense_ms"] = None  # which of its steps are dense is the cache's own business
        self.seconds[way] = seconds
        whole = self.plain or self
        dense, eager = whole.seconds.get(Way("compile")), whole.seconds.get(Way("eager"))
        if neighbours:
            dense = statistics.median(neighbours)
        row |= dict(
            seconds=seconds, runs=totals, step_ms=steps, kinds=None if setup.exclusive else "".join(name[0] for name in names),
            x_compiled=dense / seconds if dense else None, x_eager=eager / seconds if eager else None,
        )  # fmt: skip
        ratio: float | None = 1.0
        flops = self.dense_flops
        if way.method == "ras":
            cost = setup.cost()
            flops = cost.dense_flops * work.branches
            ratio = statistics.fmean(
                cost.flop_ratio(active) if kind == "sparse" else 1.0 for kind, active in kinds.values()
            )
            row |= dict(cache_gb=cost.cache_bytes * work.branches / 1e9, resets=list(setup.resets), warmup=WARMUP)
        elif setup.exclusive:
            ratio = self.counted_flops(setup, work.steps) / (flops * work.steps) if flops else None
        row |= dict(flop_ratio=ratio, dense_tflop=flops / 1e12 if flops else None)
        if flops and ratio is not None and self.plain is None:  # the floor is one of bf16
            row["floor_share"] = flops * work.steps * ratio / (FLOOR_TFLOPS * 1e12) / seconds

    def _compare(self, way: Way, row: dict, latents: Tensor) -> None:
        """The distances of the latents at the end, and how many times faster it is than compiled dense sampling, quantised."""
        self.latents[way] = latents
        dense = (self.plain or self).latents.get(Way("compile"))
        if dense is not None:
            row["error"] = _distance(latents, dense)
        if self.plain is None:
            return
        if way in self.plain.latents:
            row["rounding"] = _distance(latents, self.plain.latents[way])
        if way == Way("compile"):
            self.gain = row["x_compiled"]
        if self.gain and row["x_compiled"]:  # both by their neighbours: what slowed the device down is in neither
            row["x_quantised"] = row["x_compiled"] / self.gain

    def counted_flops(self, setup: Setup, steps: int) -> int:
        """FLOPs of a run, counted while it runs eagerly."""
        compiled, setup.compiled = setup.compiled, None
        try:
            with FlopCounterMode(display=False) as counter:
                self.run(setup, steps)
        finally:
            setup.compiled = compiled
        return counter.get_total_flops()

    def _look_inside(self, way: Way, row: dict, setup: Setup) -> None:
        """Host time and waiting calls, in runs of their own."""
        if self.args.brief or way.method not in ("ras", "compile", "reduce-overhead"):
            return
        if self.device.type != "cuda":
            return  # a call returns when its work is done: the host has no time apart
        clock = self.host(setup)
        kinds, count, steps = setup.kinds(), len(clock.milliseconds), self.work.steps
        steady = [at for at in range(count) if not kinds or kinds.get(at * steps // count, ("",))[0] == "sparse"]
        if steady:
            host, launch = (statistics.median(ms[at] for at in steady) for ms in (clock.milliseconds, clock.launching))
            row |= dict(host_ms=host - self.null_ms, null_ms=self.null_ms, launch_ms=launch)
        row["syncs"] = synchronising(lambda mark: self.run(setup, self.few, mark), self.few - 3, self.few)

    def _fewer_steps(self, way: Way, row: dict) -> None:
        """Plain compiled sampling with as many steps as fit into the time of the RAS row."""
        adaptive, whole = self.seconds.get(Way("ras", way.sample_ratio, way.context)), self.seconds.get(Way("compile"))
        if self.dense is None or adaptive is None or whole is None:
            raise NotAvailable("needs the rows of compile and of ras")
        steps = min(self.work.steps, max(1, round(self.work.steps * adaptive / whole)))
        self.run(self.dense, steps)
        totals = [sum(self.timed(self.dense, steps)) / 1e3 for _ in range(min(2, self.args.repeats))]
        seconds = statistics.median(totals)
        eager = self.seconds.get(Way("eager"))
        row |= dict(
            steps=steps, seconds=seconds, runs=totals, x_compiled=whole / seconds,
            x_eager=eager / seconds if eager else None, flop_ratio=steps / self.work.steps,
            dense_ms=1e3 * seconds / steps,
        )  # fmt: skip


def _speeds(args: argparse.Namespace, until: float):
    """Rows of `--measure speed`, one after another."""
    bench = Bench(args)
    yield from _rows(bench, args.ways, until)
    for kind in args.quantise:
        ways = [way for way in args.ways if way.method in ("compile", "ras")]
        try:
            yield from _rows(Bench(args, kind, bench), ways, until)
        except NotAvailable as error:
            yield new_row(f"{args.model}, {kind}", "compile", reason=_text(error))


def _rows(bench: Bench, ways: list[Way], until: float):
    base: dict[str, float | None] = {}
    for way in ways:
        if time.perf_counter() > until:
            print("the budget is spent: the rest is left out", flush=True)
            return
        row = bench.row(way)
        if way.method == "compile":
            base["peak"] = row["peak_gb"]
        if way.method == "ras" and row["peak_gb"] is not None and base.get("peak") is not None:
            row["extra_gb"] = row["peak_gb"] - base["peak"]
        yield row


def _distance(latents: Tensor, others: Tensor) -> float:
    """Of two latents, over the size of the second one."""
    return float((latents.float() - others.float()).norm() / others.float().norm())


# starts


def _starts(args: argparse.Namespace, until: float):
    """Rows of `--measure starts`: each way twice in processes of its own, with empty and then with filled caches."""
    for way in args.ways:
        if way.method in ("eager", "fewer-steps"):
            continue
        with tempfile.TemporaryDirectory() as caches:
            found: list[float | None] = []
            for _ in ("cold", "warm"):
                if time.perf_counter() > until:
                    print("the budget is spent: the rest is left out", flush=True)
                    return
                found.append(start_process(args, way, caches))
        row = new_row(args.model, way.method, way.sample_ratio, way.context, starts_only=True)
        yield row | dict(cold_s=found[0], warm_s=found[1])


def start_process(args: argparse.Namespace, way: Way, caches: str) -> float | None:
    """Seconds that a process of its own takes to start, with the compilers' caches in a folder; None where it fails."""
    start_of = json.dumps([way.method, way.sample_ratio, way.context])
    command = [
        sys.executable, __file__, "--model", args.model, "--size", args.size, "--device", args.device, "--out",
        str(args.out), "--inner-backend", args.inner_backend, "--options", json.dumps(args.options), "--start-of",
        start_of,
    ]  # fmt: skip
    places = dict(TORCHINDUCTOR_CACHE_DIR=caches, TRITON_CACHE_DIR=f"{caches}/triton")
    done = subprocess.run(command, env=os.environ | places, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return None
    return json.loads(done.stdout.splitlines()[-1])["compile_s"]


def _start(args: argparse.Namespace) -> dict:
    """The process: seconds of the first run (its steps reach every program) over those of a later one."""
    bench = Bench(args)
    setup = set_up(bench.work, Way(*args.start_of), args.inner_backend, args.options)
    taken = []
    for _ in range(3):
        begin = time.perf_counter()
        bench.run(setup, bench.few)
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return dict(compile_s=taken[0] - taken[-1], runs=taken)


def _line(row: dict) -> str:
    """A row for the terminal."""
    name = f"{row['model']} {row['method']}"
    if row["sample_ratio"] is not None:
        name += f" {row['sample_ratio']} {row['context']}"
    figures = [
        f"{label} {row[column]:.3f}"
        for label, column in (
            ("s", "seconds"), ("x compiled", "x_compiled"), ("x quantised", "x_quantised"), ("x eager", "x_eager"),
            ("error", "error"), ("rounding", "rounding"), ("FLOPs", "flop_ratio"), ("dense ms", "dense_ms"),
            ("sparse ms", "sparse_ms"), ("peak GB", "peak_gb"), ("cold s", "cold_s"), ("warm s", "warm_s"),
        )
        if row.get(column) is not None
    ]  # fmt: skip
    extras = [f"{label} {row[label]}" for label in ("syncs", "reason", "warnings") if row.get(label)]
    return f"{name:<40} " + "  ".join(figures + extras)


if __name__ == "__main__":
    main()
