"""Random models, held to the laws: `python tests/fuzz 1000 --seed 0` prints what failed, each made as small as it goes.

Many can run at once, each from its own seed; every 50 graphs tell how many there were, so that one that is stopped is counted, too:

    for k in $(seq 0 63); do python tests/fuzz 320 --seed $((1000000 + 320 * k)) > fuzz.$k.log 2>&1 & done; wait
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter

import torch

os.environ.setdefault("RAS_SPEC", "1")  # the spec holds after every pass of every program

from laws import judged, smallest
from random_models import random_recipe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", type=int, help="how many models")
    parser.add_argument("--seed", type=int, default=0, help="of the first one; the others follow")
    parser.add_argument("--whole", action="store_true", help="do not make failures smaller")
    given = parser.parse_args()
    torch.set_num_threads(1)
    start, counts, reasons, coarse = time.perf_counter(), Counter[str](), Counter[str](), 0
    for done, seed in enumerate(range(given.seed, given.seed + given.graphs)):
        if done and done % 50 == 0:
            print(f"{done} graphs so far, seeds {given.seed} to {seed - 1}: {dict(counts)}", flush=True)
        recipe = random_recipe(seed)
        verdict = judged(recipe)
        counts[verdict.kind] += 1
        coarse += verdict.kind == "right" and verdict.share < 1
        if verdict.kind == "refused":
            reasons[re.sub(r"\[at: .*|\d+", "", verdict.reason).strip()] += 1
        if verdict.failed:
            print(f"seed {seed}: {verdict.kind}: {verdict.reason}")
            print(f"    {recipe if given.whole else smallest(recipe, verdict)}", flush=True)
    took = time.perf_counter() - start
    print(f"{given.graphs} graphs in {took:.0f} s: {dict(counts)}; coarser than the model's tokens: {coarse}")
    for reason, count in reasons.most_common():
        print(f"{count:5d} refused: {reason[:200]}")
    return any(counts[kind] for kind in ("wrong", "crashed"))


if __name__ == "__main__":
    sys.exit(main())
