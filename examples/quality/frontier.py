"""The frontier: what a picture costs in time, and how near it comes to the exact one, for every way of sampling.

    python examples/emoji/data.py --cache .cache/emoji       # once: artwork, for the distances to real pictures
    python examples/quality/frontier.py --out OUT [--model emoji|pixart|wan] [--n 1000] [--rows points,caches]

A turn draws one batch with each setting, so that what disturbs a machine for a while disturbs all settings alike. The
first turns compile; the median of the `--turns` that follow is the time. One line is printed for each setting after the last
turn: milliseconds of a picture (transformer and scheduler), share of the work of its steps, captions that are right in
every fact (%), PSNR to the 200-step solution of the same noise (dB) and its 5th percentile, FID, and the seconds that the row
took in all. `OUT/frontier_MODEL.json` has all of it, with intervals. A row that fails is told there, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import Distances, likeness, overall
from models import MODELS, Emoji
from others import METHODS, Other, calibrated, module_flops
from run import REAL_SEED, machine, rounded
from sampler import Sampler
from settings import EXACT_STEPS, FRONTIER, GUIDANCE, Setting, frontier
from torch import Tensor

PROMPT_SEED, CALIBRATION_SEED = 2024, 2025
CALIBRATED = 16  # captions that MagCache's ratios are taken from
Row = dict[str, Any]


class Calibration:
    """MagCache's ratios, from captions that are not measured; one run for each solver and count of steps.

    Args:
        kind: the model.
        device: where.
        dtype: of the transformer.
        count: captions.
    """

    def __init__(self, kind: Emoji, device: str, dtype: torch.dtype, count: int) -> None:
        self._kind, self._device, self._dtype, self._count = kind, device, dtype, count
        self._found: dict[tuple[str, int], list[float]] = {}

    def __call__(self, sampler: str, steps: int) -> list[float]:
        """The ratios of a run of `steps` steps."""
        if (sampler, steps) not in self._found:
            captions, _ = self._kind.asked(self._count, CALIBRATION_SEED, self._device)
            drawer = Sampler(captions, len(captions), self._device, self._dtype, "eager", GUIDANCE, self._kind)

            def draw(model: Other) -> None:
                drawer.one_batch(model, drawer.scheduler(sampler), 0, steps, around=model.around)

            self._found[sampler, steps] = calibrated(draw, drawer.plain, steps)
        return self._found[sampler, steps]


class Turns:
    """The pictures and times of one setting, as its turns come."""

    def __init__(self, setting: Setting, sampler: Sampler, ratios: Callable[[str, int], list[float]]) -> None:
        self.setting, self.sampler, self._ratios = setting, sampler, ratios
        self.pictures: dict[int, Tensor] = {}
        self.seconds: list[float] = []
        self.kinds: list[tuple[str, int]] = []
        self.took = 0.0  # in all, compilation, decoding and measuring as well
        self.other: Other | None = None
        self.failed = ""

    def take(self, at: int, timed: bool) -> None:
        """Draws the batch of pictures from number `at` on."""
        setting, sampler = self.setting, self.sampler
        adaptive = setting.method == "RAS"
        if setting.method in METHODS:
            model, scheduler = self._other(), sampler.scheduler(setting.sampler)
            pictures, seconds, _ = sampler.one_batch(model, scheduler, at, setting.steps, around=model.around)
        else:
            model, scheduler = sampler.ready(dict(setting.options) if adaptive else None, setting.sampler)
            pictures, seconds, _ = sampler.one_batch(model, scheduler, at, setting.steps)
        self.pictures[at] = pictures
        if timed:
            self.seconds.append(seconds / sampler.batch)
        if adaptive:
            self.kinds = sampler.kinds()

    def _other(self) -> Other:
        setting = self.setting
        if self.other is None:
            more = {"ratios": self._ratios(setting.sampler, setting.steps)} if setting.method == "MagCache" else {}
            make = METHODS[setting.method]
            self.other = make(self.sampler.plain, self.sampler.inner_backend, setting.steps, **setting.options, **more)
        return self.other

    def work(self, prices: Callable[[], dict[str, int]]) -> float:
        """Share of the work of the same steps whole: of their tokens, or of their FLOPs where layers are skipped."""
        if self.other is not None:
            return self.other.flops(self.setting.steps, prices()) / (self.setting.steps * prices()[""])
        return sum(active for _, active in self.kinds) / (len(self.kinds) * self.kinds[0][1]) if self.kinds else 1.0

    def row(
        self, judge: Any, facts: dict[str, Tensor], exact: Tensor, distances: Distances | None,
        prices: Callable[[], dict[str, int]],
    ) -> Row:  # fmt: skip
        """What is measured on them."""
        setting = self.setting
        row: Row = {
            "key": setting.key, "method": setting.method, "variant": setting.variant, "steps": setting.steps,
            "sampler": setting.sampler,
            "options": {name: value if isinstance(value, (str, int, float, type(None))) else type(value).__name__
                        for name, value in setting.options.items()},
        }  # fmt: skip
        if not self.failed:
            pictures = torch.cat([self.pictures[at] for at in sorted(self.pictures)])[: len(facts["item"])]
            asked = {name: value[: len(pictures)] for name, value in facts.items()}
            looks = self.sampler.kind.looks(judge, pictures, asked, self.sampler.batch)
            near = likeness(pictures[: len(exact)], exact[: len(pictures)], self.sampler.batch)
            row |= {
                "ms": 1e3 * median(self.seconds), "ms_turns": [1e3 * seconds for seconds in self.seconds],
                "work": self.work(prices), "active": [active for _, active in self.kinds],
                "n": len(pictures), **overall(looks, looks.scores | near, distances),
            }  # fmt: skip
        return row | ({"failed": self.failed} if self.failed else {})


def line(row: Row) -> str:
    """A row in words."""
    if "failed" in row:
        return f"{row['key']:<62} failed after {row['took']:.1f} s: {row['failed']}"
    return (
        f"{row['key']:<62} {row['ms']:8.3f} ms  work {row['work']:.3f}  right {100 * row['accuracy']:5.1f} %  "
        f"{row['psnr']:6.2f} dB  5th {row['psnr_5th']:6.2f} dB  FID {row.get('fid', float('nan')):6.2f}  {row['took']:5.1f} s"
    )


def told(error: Exception) -> str:
    """What went wrong, in a line."""
    words = str(error).strip().splitlines()
    return f"{type(error).__name__}: {words[0]}" if words else type(error).__name__


def real(kind: Emoji, judge: Any, args: argparse.Namespace) -> Distances | None:
    """Distances to real pictures, where there is artwork to draw them from."""
    if not (args.cache / "atlas.json").exists():
        print(f"no FID: {args.cache} has no artwork; python examples/emoji/data.py --cache {args.cache}", flush=True)
        return None
    pictures, facts = kind.real(args.cache, args.real, REAL_SEED, args.device, args.batch)
    return Distances.to(kind.looks(judge, pictures, facts, args.batch), facts)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--out", type=Path, required=True, help="folder of frontier_MODEL.json")
    parser.add_argument("--model", choices=tuple(MODELS), default="emoji", help="its folder in examples/")
    parser.add_argument("--n", type=int, default=1000 if cuda else 2, help="pictures per setting")
    parser.add_argument("--batch", type=int, default=500, help="pictures at once; guidance doubles them")
    parser.add_argument("--turns", type=int, default=2, help="timed turns")
    parser.add_argument("--exact-steps", type=int, default=EXACT_STEPS if cuda else 8, help="of the exact solution")
    parser.add_argument("--rows", default="points,caches", help=f"groups of settings: {', '.join(FRONTIER)}, or all")
    parser.add_argument("--only", default="", help="regular expression: settings whose key has it")
    parser.add_argument("--list", action="store_true", help="name the settings and stop")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no turn begins")
    parser.add_argument("--cache", type=Path, default=Path(".cache/emoji"), help="folder of examples/emoji/data.py")
    parser.add_argument("--real", type=int, default=5000 if cuda else 40, help="real pictures that FID is taken to")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--inner-backend", default="inductor" if cuda else "eager")
    args = parser.parse_args(argv)
    args.batch = min(args.batch, args.n)
    return args


def main(argv: list[str] | None = None) -> None:
    """Draws and measures."""
    begin, args = time.monotonic(), arguments(argv)
    chosen = [setting for setting in frontier(args.rows) if re.search(args.only, setting.key)]
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
    distances = real(kind, judge, args)
    sampler = Sampler(captions, args.batch, args.device, dtype, args.inner_backend, GUIDANCE, kind)
    exact, *_ = sampler.one_batch(sampler.plain, sampler.scheduler(kind.exact), 0, args.exact_steps)
    print(f"real pictures and the exact solution: {time.monotonic() - begin:.0f} s", flush=True)
    ratios = Calibration(kind, args.device, dtype, min(CALIBRATED, args.n))
    turns = [Turns(setting, sampler, ratios) for setting in chosen]
    starts = list(range(0, args.n, args.batch))
    # the first turn compiles; pictures that are left are drawn in timed turns
    order = [starts[0], *(starts[turn % len(starts)] for turn in range(1, 1 + max(args.turns, len(starts) - 1)))]
    longest = 0.0
    for number, at in enumerate(order):
        turn_begin = time.monotonic()
        if number > 1 and turn_begin - begin + longest > args.budget:
            print(f"the budget ends after {number - 1} timed turns", flush=True)
            break
        for turn in turns:
            if not turn.failed:
                attempt(turn, turn.take, at, number > 0)
        longest = time.monotonic() - turn_begin
        print(f"turn {number}: {longest:.0f} s", flush=True)
    prices: dict[str, int] = {}

    def priced() -> dict[str, int]:
        return prices or prices.update(module_flops(sampler.plain, sampler.one_call())) or prices

    meta = machine(args.device) | {"model": args.model, "n": args.n, "batch": args.batch, "real": args.real}
    content: Row = {"meta": meta | {"exact_steps": args.exact_steps, "exact": len(exact)}, "rows": []}
    args.out.mkdir(parents=True, exist_ok=True)
    for turn in turns:
        row = attempt(turn, turn.row, judge, facts, exact, distances, priced)
        row = row or turn.row(judge, facts, exact, distances, priced)  # one that failed says so
        content["rows"].append(row | {"took": turn.took})
        print(line(content["rows"][-1]), flush=True)
        (args.out / f"frontier_{args.model}.json").write_text(json.dumps(rounded(content), indent=1) + "\n")
    sampler.detach()


def attempt(turn: Turns, what: Callable[..., Any], *given: Any) -> Any:
    """What it returns; None where it fails, which the setting remembers: one way that fails must not end the others."""
    begin = time.monotonic()
    try:
        return what(*given)
    except Exception as error:
        turn.failed = told(error)
        print(f"{turn.setting.key} failed: {turn.failed}", flush=True)
        if turn.setting.method == "RAS":
            turn.sampler.detach()  # nobody knows what it was left with
        return None
    finally:
        turn.took += time.monotonic() - begin


if __name__ == "__main__":
    main()
