"""The frontier: what a picture costs in time, and how near it comes to the exact one, for every way of sampling.

    python examples/quality/frontier.py --out OUT [--model emoji|pixart|wan] [--n 1000] [--only REGEX]

A turn draws one batch with each setting, so that what disturbs a machine for a while disturbs all settings alike. The
first turns compile; the median of the `--turns` that follow is the time. One line is printed for each setting at its last turn:
milliseconds of a picture (transformer and scheduler), share of the token work of its steps, captions that are right in
every fact (%), PSNR to the 200-step solution of the same noise (dB) and its 5th percentile. `OUT/frontier.json` has all of it.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import likeness
from models import MODELS
from run import machine
from sampler import Sampler
from settings import EXACT_STEPS, GUIDANCE, Setting, frontier
from torch import Tensor

from ras_compile.errors import RASError

PROMPT_SEED = 2024
Row = dict[str, Any]


class Turns:
    """The pictures and times of one setting, as its turns come."""

    def __init__(self, setting: Setting, sampler: Sampler) -> None:
        self.setting, self._sampler = setting, sampler
        self.pictures: dict[int, Tensor] = {}
        self.seconds: list[float] = []
        self.kinds: list[tuple[str, int]] = []

    def take(self, at: int, timed: bool) -> None:
        """Draws the batch of pictures from number `at` on."""
        setting = self.setting
        adaptive = setting.method == "RAS"
        model, scheduler = self._sampler.ready(dict(setting.options) if adaptive else None, setting.sampler)
        self.pictures[at], seconds, _ = self._sampler.one_batch(model, scheduler, at, setting.steps)
        if timed:
            self.seconds.append(seconds / self._sampler.batch)
        if adaptive:
            self.kinds = self._sampler.kinds()

    def row(self, judge: Any, facts: dict[str, Tensor], exact: Tensor) -> Row:
        """What is measured on them."""
        pictures = torch.cat([self.pictures[at] for at in sorted(self.pictures)])[: len(facts["item"])]
        near = likeness(pictures[: len(exact)], exact, self._sampler.batch)["psnr"]
        right = self._sampler.kind.right(judge, pictures, facts, self._sampler.batch)
        setting = self.setting
        return {
            "key": setting.key, "method": setting.method, "variant": setting.variant, "steps": setting.steps,
            "sampler": setting.sampler, "options": dict(setting.options), "ms": 1e3 * median(self.seconds),
            "ms_turns": [1e3 * seconds for seconds in self.seconds],
            "work": sum(active for _, active in self.kinds) / (len(self.kinds) * self.kinds[0][1]) if self.kinds else 1.0,
            "active": [active for _, active in self.kinds], "right": 100 * right.mean().item(),
            "psnr": near.mean().item(), "psnr_5th": near.quantile(0.05).item(), "n": len(pictures),
        }  # fmt: skip


def line(row: Row) -> str:
    """A row in words."""
    return (
        f"{row['key']:<78} {row['ms']:8.3f} ms  work {row['work']:.3f}  right {row['right']:5.1f} %  "
        f"{row['psnr']:6.2f} dB  5th {row['psnr_5th']:6.2f} dB"
    )


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--out", type=Path, required=True, help="folder of frontier.json")
    parser.add_argument("--model", choices=tuple(MODELS), default="emoji", help="its folder in examples/")
    parser.add_argument("--n", type=int, default=1000 if cuda else 2, help="pictures per setting")
    parser.add_argument("--batch", type=int, default=500, help="pictures at once; guidance doubles them")
    parser.add_argument("--turns", type=int, default=2, help="timed turns")
    parser.add_argument("--exact-steps", type=int, default=EXACT_STEPS if cuda else 8, help="of the exact solution")
    parser.add_argument("--only", default="", help="regular expression: settings whose key has it")
    parser.add_argument("--list", action="store_true", help="name the settings and stop")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--inner-backend", default="inductor" if cuda else "eager")
    args = parser.parse_args(argv)
    args.batch = min(args.batch, args.n)
    return args


def main(argv: list[str] | None = None) -> None:
    """Draws and measures."""
    args = arguments(argv)
    chosen = [setting for setting in frontier() if re.search(args.only, setting.key)]
    if args.list:
        print("\n".join(setting.key for setting in chosen))
        return
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # past it, models would run uncompiled without a word
    kind = MODELS[args.model]()
    if not (kind.folder / "pipeline" / "model_index.json").is_file():
        raise SystemExit(f"{kind.folder / 'pipeline'} has no weights: train them as the README beside it says")
    captions, facts = kind.asked(args.n, PROMPT_SEED, args.device)
    judge, dtype = kind.judge(args.device), torch.bfloat16 if args.device == "cuda" else torch.float32
    sampler = Sampler(captions, args.batch, args.device, dtype, args.inner_backend, GUIDANCE, kind)
    exact, *_ = sampler.one_batch(sampler.plain, sampler.scheduler(kind.exact), 0, args.exact_steps)
    starts = list(range(0, args.n, args.batch))
    turns = [Turns(setting, sampler) for setting in chosen]
    content: Row = {"meta": machine(args.device) | {"model": args.model, "n": args.n, "batch": args.batch}, "rows": []}
    args.out.mkdir(parents=True, exist_ok=True)
    # the first turn compiles; pictures that are left are drawn in timed turns
    order = [starts[0], *(starts[turn % len(starts)] for turn in range(1, 1 + max(args.turns, len(starts) - 1)))]
    for number, at in enumerate(order):
        for turn in list(turns):
            try:
                turn.take(at, timed=number > 0)
            except RASError as error:
                print(f"left out, {turn.setting.key}: {error}", flush=True)
                sampler.detach()
                turns.remove(turn)
                continue
            if number == len(order) - 1:
                content["rows"].append(turn.row(judge, facts, exact))
                print(line(content["rows"][-1]), flush=True)
                (args.out / "frontier.json").write_text(json.dumps(content, indent=1) + "\n")
    sampler.detach()


if __name__ == "__main__":
    main()
