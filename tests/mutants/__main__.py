"""Breaks the library in small ways, one at a time, and runs the nearest tests: `python tests/mutants 200 --seed 1`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter

os.environ.setdefault("RAS_SPEC", "1")  # the spec holds after every pass of every program

from equivalents import EQUIVALENT
from forked import Picked, Short, preload, run_tests
from mutations import Mutant, all_mutants, sample
from nearest import FURTHER, SEEDS, Nearest

LONGEST = 600.0  # seconds of further tests


def tried(mutant: Mutant, nearest: Nearest, near: bool = False) -> tuple[str, str]:
    """What became of a mutant, and which test saw it."""
    if mutant.name in EQUIVALENT:
        return "equivalent", EQUIVALENT[mutant.name]
    tests = nearest.to(mutant.path, mutant.function)
    files = dict.fromkeys(name.split("::")[0] for name in tests)
    limit = 60 + 3 * sum(nearest.seconds[name] for name in tests)
    change = mutant.path, mutant.source
    found = run_tests(files, Picked(tests), change=change, limit=limit)
    if found.ended == "passed" and near:
        return "survived", f"{len(tests)} tests in {found.seconds:.0f} s"
    if found.ended == "passed":
        further = next(tests for place, tests in FURTHER.items() if mutant.path.startswith(place))
        more = run_tests(further, Short(SEEDS), change=change, limit=LONGEST)
        if more.ended != "failed":
            return (
                "survived",
                f"{len(tests)} tests in {found.seconds:.0f} s, and {more.ended} further in {more.seconds:.0f} s",
            )
        found = more
    return ("broken", found.said) if found.ended == "nothing" else ("killed", found.said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="which ones: the same seed, the same mutants")
    parser.add_argument("--only", default="", help="those whose name (file:function:change) begins so")
    parser.add_argument("--near", action="store_true", help="the nearest tests alone: minutes, not hours")
    given = parser.parse_args()
    start = time.perf_counter()
    preload()
    nearest = Nearest()
    mutants = [mutant for mutant in all_mutants() if mutant.name.startswith(given.only)]
    counts: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = {}
    for number, mutant in enumerate(sample(mutants, given.count, given.seed), 1):
        what, why = tried(mutant, nearest, given.near)
        counts[what] += 1
        kinds.setdefault(mutant.kind, Counter())[what] += 1
        print(f"{number:4d} {what:10s} {mutant.name}\n                {why}", flush=True)
    judged = counts["killed"] + counts["survived"]
    took = time.perf_counter() - start
    print(f"{sum(counts.values())} of {len(mutants)} mutants, seed {given.seed}, in {took:.0f} s: {dict(counts)}")
    for kind, found in kinds.items():
        print(f"    {kind:10s} {dict(found)}")
    print(f"killed: {counts['killed'] / max(judged, 1):.1%} of those that are not equivalent")
    return 0


if __name__ == "__main__":
    sys.exit(main())
