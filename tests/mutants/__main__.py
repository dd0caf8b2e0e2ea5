"""Breaks the library in small ways, one at a time, and runs the tests that call what was broken.

    python tests/mutants 200 --seed 1                # all that call it: the nearest, then up to --further seconds of the others
    python tests/mutants 100 --seed 1 --near         # the nearest alone: minutes, not hours

    # On a machine of 32 cores that has no installed package (here below `build/laid`), 15 minutes:
    mkdir -p build/laid && cp -r ras_compile build/laid/ && cp -r passes kernels build/laid/ras_compile/
    PYTHONPATH=build/laid python tests/mutants 2000 --seed 31 --jobs 32 --further 60 --look 180 --minutes 15

Each mutant is told in one line, as soon as it is judged: the verdict, the file with its line, the function, the change, and why;
and the score so far from time to time. Many runs may go on at the same time. What tests call is looked at once (for `--look`
seconds at most) and kept in `build/mutants`; tests that fail without a mutant are counted at the start, and left out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

os.environ.setdefault("RAS_SPEC", "1")  # the spec holds after every pass of every program

from equivalents import EQUIVALENT
from forked import Picked, preload, run_tests
from mutations import Mutant, all_mutants, sample
from nearest import FURTHER, TESTS, Chosen, Nearest


class Verdict(NamedTuple):
    """What became of a mutant, and why.

    "killed", "survived", "equivalent", "no test" (none runs it), "unfinished" or "not begun" (the time was over).
    """

    what: str
    why: str


def score(counts: Counter[str]) -> str:
    """The share that is killed: of those that are judged, and where all that was begun and not finished had survived."""
    killed, judged = counts["killed"], counts["killed"] + counts["survived"] + counts["no test"]
    begun = judged + counts["unfinished"]
    return f"killed: {killed} of {judged}, {killed / max(judged, 1):.1%} (at least {killed / max(begun, 1):.1%})"


def tried(mutant: Mutant, stages: tuple[Chosen, ...], end: float) -> Verdict:
    """Runs the tests of each stage until one fails; ``end`` is when to stop, as `time.monotonic` counts."""
    if time.monotonic() >= end:
        return Verdict("not begun", "")
    if mutant.name in EQUIVALENT:
        return Verdict("equivalent", EQUIVALENT[mutant.name])
    passed, seconds = 0, 0.0
    for stage in stages:
        left = end - time.monotonic()
        if stage.seconds and left <= 0:
            return Verdict("unfinished", f"{passed} tests passed")
        if stage.seconds:
            found = run_tests(
                stage.files,
                [Picked(list(stage.seconds))],
                change=(mutant.path, mutant.source),
                limit=min(stage.limit, left),
                each=30 + 3 * max(stage.seconds.values()),
            )
            if found.ended == "slow" and time.monotonic() >= end:
                return Verdict("unfinished", f"{passed} tests passed")
            if found.ended in ("failed", "slow"):
                return Verdict("killed", found.said)
            if found.ended == "passed":
                passed, seconds = passed + len(stage.seconds), seconds + found.seconds
    return Verdict("survived", f"{passed} tests in {seconds:.0f} s") if passed else Verdict("no test", "none runs it")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="which ones: the same seed, the same mutants")
    parser.add_argument("--only", default="", help="those whose name (file:function:change) begins so")
    parser.add_argument("--near", action="store_true", help="the nearest tests alone")
    parser.add_argument("--further", type=float, default=300, help="seconds of further tests for one mutant")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at the same time")
    parser.add_argument("--look", type=float, default=1e6, help="seconds for looking at which tests call what")
    parser.add_argument("--minutes", type=float, default=1e6, help="after which all stops, and what is known is told")
    given = parser.parse_args()
    start, end = time.perf_counter(), time.monotonic() + 60 * given.minutes
    preload()
    mutants = [mutant for mutant in all_mutants() if mutant.name.startswith(given.only)]
    drawn = sample(mutants, given.count, given.seed)
    counts: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = {}
    with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("fork")) as pool:
        nearest = Nearest(pool, given.jobs, TESTS if given.near else TESTS + FURTHER, given.look)
        print(f"{len(nearest.seconds)} tests; {len(nearest.left_out)} fail or are skipped without a mutant", flush=True)
        running = {}
        for mutant in drawn:
            near, further = nearest.to(mutant.path, mutant.function, given.further)
            running[pool.submit(tried, mutant, (near,) if given.near else (near, further), end)] = mutant
        for number, done in enumerate(as_completed(running), 1):
            mutant, (what, why) = running[done], done.result()
            counts[what] += 1
            kinds.setdefault(mutant.kind, Counter())[what] += 1
            place = f"{mutant.path}:{mutant.line} {mutant.function}: {mutant.text}"
            if what != "not begun":
                print(f"{number:4d} {what:10s} {place}  [{' '.join(why.split())[-300:]}]", flush=True)
            if number % 25 == 0 and what != "not begun":
                print(f"     {score(counts)}", flush=True)
    took = time.perf_counter() - start
    print(f"{sum(counts.values())} of {len(mutants)} mutants, seed {given.seed}, in {took:.0f} s: {dict(counts)}")
    for kind, found in kinds.items():
        print(f"    {kind:10s} {dict(found)}")
    print(score(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
