"""Where the error of sparse steps comes from: tokens that are computed beside stale keys, or tokens that are not computed.

    python examples/quality/parts.py --model pixart --n 48 --out OUT

Runs of one model with DPM-Solver++ (or Euler, `--solver`), in float32 and without a compiler. Beside each sparse call the whole
model is asked as well, on the same latents:

    as is             what region-adaptive sampling gives
    computed exact    the tokens that were computed return what the whole model says of them
    held exact        the tokens that were not computed return it
    only STEP exact   all tokens return it, in one of the sparse steps

Settings with "half" compute half of the tokens in each sparse step, with a dense one every eight: by the paper's metric, by
drift, and by drift alone, without the turns that tokens take there (`sampling/rows.py`): as it is, with a floor of so many mean
rates, or with no token left out more than so many times in a row.

Each line has the steps, the dense ones among them, the work in dense steps (tokens that were computed), the PSNR to the solution of
`--exact-steps` steps of the same noise, and by how much that is above plain steps of as much work, which are drawn first and read
off between two of their numbers. Of "as is" it also has each sparse step: how far the guided prediction is off, relative to
its size, and the share of the squared error that is of the computed tokens; the shares of tokens by the steps since they were
computed, over all sparse steps; and how far the errors of all steps of a flow move a latent, beside how far they would if they
had no direction in common.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from measure import likeness
from models import MODELS
from rules import Drift
from run import machine
from sampler import Sampler
from settings import GUIDANCE
from torch import Tensor, nn

import ras_compile

MODES = ("as is", "computed exact", "held exact")
PLAIN = (10, 12, 14, 16, 18, 20, 22, 25, 28)
HALF: dict[str, Any] = dict(
    sample_ratio=0.5, ratio_schedule="constant", reset_interval=8, reset_from="start", noise_reuse="hold"
)
ALONE = dict(HALF, metric="drift", max_absence=8)
OWN = dict(ALONE, starvation_scale=0.0)  # for metrics of our own
SETTINGS: dict[str, dict[str, Any]] = {
    "quality": dict(preset="quality"),
    "quality, counted from the start": dict(preset="quality", reset_from="start"),
    "balanced": dict(preset="balanced"),
    "balanced, counted from the start": dict(preset="balanced", reset_from="start"),
    "quality, caches go on": dict(preset="quality", cache_reuse="forecast"),
    "balanced, caches go on": dict(preset="balanced", cache_reuse="forecast"),
    "half, std": dict(HALF, metric="std"),
    "half, drift": dict(HALF, metric="drift"),
    "half, drift alone": ALONE,
    "half, drift alone, floor 1": dict(OWN, metric=Drift(floor=1.0)),
    "half, drift alone, floor 4": dict(OWN, metric=Drift(floor=4.0)),
    "half, drift alone, age squared": dict(OWN, metric=Drift(power=2.0)),
    "half, drift alone, left out once": dict(ALONE, max_absence=1),
    "half, drift alone, left out twice": dict(ALONE, max_absence=2),
    "half, drift alone, forecast": dict(ALONE, noise_reuse="forecast"),
    "half, drift alone, dense every 3": dict(ALONE, reset_interval=3),
    "half, drift alone, dense every 3, left out once": dict(ALONE, reset_interval=3, max_absence=1),
    "a third, drift": dict(HALF, metric="drift", sample_ratio=1 / 3),
    "a third, drift, left out twice": dict(HALF, metric="drift", sample_ratio=1 / 3, max_absence=2),
    "a quarter, drift": dict(HALF, metric="drift", sample_ratio=0.25),
    "a quarter, drift, left out 3 times": dict(HALF, metric="drift", sample_ratio=0.25, max_absence=3),
}


class Beside(nn.Module):
    """The attached model, beside which the whole one is asked in sparse steps.

    Args:
        sampler: has both.
        mode: what is returned then, see above.
        handle: of the attached model.
    """

    def __init__(self, sampler: Sampler, mode: str, handle: ras_compile.Handle) -> None:
        super().__init__()
        self._models, self._mode, self._handle = [sampler.pipe.transformer, sampler.plain], mode, handle
        patch = sampler.pipe.transformer.config.patch_size
        self._patch = patch if isinstance(patch, int) else patch[-1]
        self.errors: list[tuple[int, float, float]] = []
        self.sparse: list[int] = []
        self.ages: list[int] = []  # of tokens in sparse steps, by the steps since they were computed
        self._absent: Tensor | None = None
        self._waiting: tuple[float, dict[str, Tensor]] | None = None
        self._sums: dict[str, Tensor] = {}
        self._squares: dict[str, float] = {}

    def forward(self, **given: Any) -> tuple[Tensor]:
        """The prediction [b, c, ..., h, w] of a call."""
        self._pass_to(given["timestep"].flatten()[0].item())
        sparse = self._models[0](**given)[0]
        record = ras_compile.trace(self._handle)[-1]
        if record.rows is None:
            self._absent = None
            return (sparse,)
        self.sparse.append(record.step)
        self._aged(record.rows, sparse)
        whole = self._models[1](**given)[0]
        if self._mode.startswith("only"):
            return (whole if record.step == int(self._mode.split()[1]) else sparse,)
        computed = self._computed(record.rows, sparse)
        if self._mode == "as is":
            uncond, cond = (sparse - whole).float().chunk(2)
            error = uncond + GUIDANCE * (cond - uncond)
            parts = {"computed": error * computed[: len(error)], "held": error * ~computed[: len(error)], "all": error}
            self._waiting = given["timestep"].flatten()[0].item(), parts
            squares = error**2
            uncond, cond = whole.float().chunk(2)
            size = ((uncond + GUIDANCE * (cond - uncond)) ** 2).mean()
            share = (squares * computed[: len(squares)]).sum() / squares.sum()
            self.errors.append((record.step, math.sqrt(squares.mean() / size), share.item()))
            return (sparse,)
        return (torch.where(computed if self._mode == "computed exact" else ~computed, whole, sparse),)

    def _grid(self, like: Tensor) -> tuple[int, int, int]:
        """Frames, height and width of a prediction, in tokens."""
        height, width = (size // self._patch for size in like.shape[-2:])
        return like.shape[2] if like.dim() == 5 else 1, height, width

    def _pass_to(self, time: float) -> None:
        """Adds the errors of the last sparse call up, each as far as a step of Euler's method up to a time follows it."""
        if self._waiting is not None:
            since, parts = self._waiting
            for name, error in parts.items():
                moved = error * (since - time) / 1000
                self._sums[name] = self._sums.get(name, 0) + moved
                self._squares[name] = self._squares.get(name, 0.0) + (moved**2).mean().item()
        self._waiting = None

    def added(self) -> dict[str, tuple[float, float]]:
        """Of a run that has ended: root mean squares of what errors move a latent by, and would if none had another's direction."""
        self._pass_to(0.0)
        return {
            name: ((moved**2).mean().sqrt().item(), math.sqrt(self._squares[name]))
            for name, moved in self._sums.items()
        }

    def _aged(self, rows: Tensor, like: Tensor) -> None:
        """Notes how old the noise is that each token returns in a sparse step."""
        if self._absent is None:
            self._absent = torch.zeros(len(rows), math.prod(self._grid(like)), dtype=torch.long, device=rows.device)
        self._absent = (self._absent + 1).scatter_(1, rows, 0)
        found = self._absent.flatten().bincount().tolist()
        self.ages = [sum(pair) for pair in zip_longest(self.ages, found, fillvalue=0)]

    def _computed(self, rows: Tensor, like: Tensor) -> Tensor:
        """Which entries of a prediction belong to the active tokens: bool, broadcasts to it."""
        frames, height, width = self._grid(like)
        found = torch.zeros(len(rows), frames * height * width, dtype=torch.bool, device=rows.device)
        found = found.scatter_(1, rows, True).repeat(len(like) // len(rows), 1)
        grid = found.reshape(len(like), 1, frames, height, width)
        grid = grid.repeat_interleave(self._patch, -1).repeat_interleave(self._patch, -2)
        return grid if like.dim() == 5 else grid[:, :, 0]


def above_plain(plain: dict[int, float], work: float, psnr: float) -> float:
    """dB above plain steps of as much work, between two of which PSNR is a line over the logarithm of the steps."""
    counts = sorted(plain)
    high = next((count for count in counts[1:] if count >= work), counts[-1])
    low = counts[counts.index(high) - 1]
    share = math.log(work / low) / math.log(high / low)
    return psnr - plain[low] - share * (plain[high] - plain[low])


def main(argv: list[str] | None = None) -> None:
    """Draws and prints, one JSON a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="emoji", help="its folder in examples/")
    parser.add_argument("--n", type=int, default=4, help="pictures")
    parser.add_argument("--solver", choices=("euler", "dpm++"), default="dpm++", help="of region-adaptive runs")
    parser.add_argument("--modes", nargs="*", default=MODES, choices=MODES, help="which lines, see above")
    parser.add_argument("--steps", type=int, nargs="*", default=[28, 20], help="of region-adaptive runs")
    parser.add_argument("--plain", type=int, nargs="*", default=PLAIN, help="steps of plain runs, two or more")
    parser.add_argument("--exact-steps", type=int, default=150)
    parser.add_argument(
        "--settings", nargs="*", default=list(SETTINGS)[:6], choices=SETTINGS, help="the first six, or others"
    )
    parser.add_argument("--each", action="store_true", help="also each sparse step exact alone")
    parser.add_argument("--out", type=Path, help="folder of parts_MODEL.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if len(set(args.plain)) < 2:
        parser.error("--plain takes two numbers of steps or more, between which others are read off")
    torch.set_float32_matmul_precision("high")
    kind = MODELS[args.model]()
    captions, _ = kind.asked(args.n, 2024, args.device)
    sampler = Sampler(captions, args.n, args.device, torch.float32, "eager", GUIDANCE, kind)
    exact, *_ = sampler.one_batch(sampler.plain, sampler.scheduler(kind.exact), 0, args.exact_steps)
    rows: list[dict[str, Any]] = [
        machine(args.device) | {"model": args.model, "n": args.n, "exact_steps": args.exact_steps}
    ]

    def tell(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"parts_{args.model}.json").write_text(json.dumps(rows, indent=1) + "\n")

    def near(pictures: Tensor) -> float:
        return likeness(pictures, exact)["psnr"].mean().item()

    plain = {}
    for steps in args.plain:
        pictures, *_ = sampler.one_batch(sampler.plain, sampler.scheduler("dpm++"), 0, steps)
        plain[steps] = near(pictures)
        tell({"plain": steps, "psnr": plain[steps]})
    for steps in args.steps:
        for name in args.settings:
            modes = list(args.modes)
            while modes:
                mode = modes.pop(0)
                _, scheduler = sampler.ready({**SETTINGS[name], "cuda_graphs": False}, args.solver)
                assert sampler.handle is not None
                model = Beside(sampler, mode, sampler.handle)
                pictures, *_ = sampler.one_batch(model, scheduler, 0, steps)
                if mode == "as is" and args.each:
                    modes += [f"only {step} exact" for step in model.sparse]
                kinds = sampler.kinds()
                work = sum(active for _, active in kinds) / kinds[0][1]
                dense = [step for step, (what, _) in enumerate(kinds) if what == "dense"]
                row = {"steps": steps, "setting": name, "mode": mode, "dense": dense}
                row |= {"work": work, "psnr": near(pictures), "above_plain": above_plain(plain, work, near(pictures))}
                if model.errors:
                    ages = [round(count / sum(model.ages), 4) for count in model.ages]
                    row |= {"errors": model.errors, "ages": ages, "added": model.added()}
                tell(row)
    sampler.detach()


if __name__ == "__main__":
    main()
