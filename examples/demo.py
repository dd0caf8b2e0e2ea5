"""The main job, end to end: the shipped text-to-image model, sampled densely and region-adaptively.

    python examples/demo.py            # on the GPU if there is one, else on the CPU

It draws the same prompts from the same noise in several ways, all of them with DPM-Solver++: all steps dense (compiled by
Inductor), with RAS, and with as many dense steps as take the same time. What has to be compiled is compiled first; then the
ways take turns, so that a machine that is busy for a while is busy for all of them, and the medians count. It prints a table,
and writes one picture (dense | RAS | how many times each token was computed, with its scale | fewer dense steps in the same
time) and a page to step through. Two CPU cores take a few minutes; `--ratios 0.5 0.25` and `--turns 3` draw more.

How near pictures are to the dense ones says little of fewer steps, which are nearer to the exact solution of the same noise
where the solver is better. So they are compared with that, too: many steps, drawn once for the default prompts and kept beside
this file. `--exact 150` draws them anew, and those of other prompts.
"""

from __future__ import annotations

import argparse
import copy
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusion3Pipeline
from PIL import Image, ImageDraw
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from tqdm import tqdm

import ras_compile

PIPELINE = Path(__file__).parent / "emoji" / "pipeline"
EXACT = Path(__file__).parent / "results" / "demo_exact.png"  # of the default prompts, side by side
PROMPTS = ["a red apple", "a cat to the left of a tree", "three lemons on a blue background", "a rocket above a house"]
SIZE, SPEEDUP = 128, 1.9


@dataclass
class Run:
    """One way of sampling: its pictures [B, 3, H, W] in [0, 1], and what it cost."""

    name: str
    draw: Callable[
        [str, int | None], tuple[Tensor, list[float]]
    ]  # label, steps or None -> pictures, seconds of each step
    warm: int | None = None  # steps after which all is compiled; 0: others have compiled it
    first: list[float] = field(default_factory=list)  # seconds of each step of the first run, compilation included
    times: list[list[float]] = field(default_factory=list)  # seconds of every step, of each timed run
    pictures: Tensor = field(default_factory=lambda: torch.empty(0))
    kinds: list[str] = field(default_factory=list)
    computed: Tensor | None = None  # [B, N]: how many times each token was computed
    flops: float = 0.0  # of all steps, those of a dense step being 1

    @property
    def steps(self) -> list[float]:
        """Median seconds of every step."""
        return np.median(self.times, axis=0).tolist()

    @property
    def seconds(self) -> float:
        """Median seconds of a run."""
        return float(np.median(np.sum(self.times, axis=1)))

    @property
    def compiled(self) -> float:
        """Seconds that the first run took longer than its steps take later."""
        return sum(self.first) - sum(self.steps[: len(self.first)])


def main() -> None:
    """Runs the demo."""
    args = arguments()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = StableDiffusion3Pipeline.from_pretrained(PIPELINE, dtype=dtype, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler(  # of the pipeline's noise levels, and better than its Euler steps
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=pipe.scheduler.config.shift
    )
    print(f"{where(device)}, torch {torch.__version__}, {dtype}, {len(args.prompts)} prompts, {args.steps} steps")

    call = first_call(pipe, args)
    explained = ras_compile.explain(pipe.transformer, options=options(args, (args.ratios or [None])[0]), **call)
    print(explained if args.explain else str(explained).partition("\n\n")[0], end="\n\n")

    # a copy, so that dense and region-adaptive runs can take turns
    plain = StableDiffusion3Pipeline(**{**pipe.components, "transformer": copy.deepcopy(pipe.transformer)})
    plain.set_progress_bar_config(disable=True)
    plain.transformer.compile()
    with ras_compile.attach(pipe) as handle:
        runs = [dense(plain, args, "dense", args.steps, warm=1)]
        runs += [adaptive(pipe, args, ratio, handle, explained) for ratio in args.ratios or [None]]
        compare(runs, 1)
        for run in runs[1:]:  # the same time in dense steps
            steps = max(2, round(run.seconds / np.median(runs[0].steps)))
            runs.append(dense(plain, args, f"{steps} steps", steps, warm=0))
        compare(runs, args.turns)
        exact = exact_pictures(plain, args)
        args.output.mkdir(parents=True, exist_ok=True)
        page = handle.report(args.output / "demo.html", dense=runs[0].pictures[:1], prompt=args.prompts[0])
        print(f"\nlast run of RAS: {handle}")
    report(runs, explained, exact)
    path = args.output / "demo.png"
    grid(runs, args.prompts, explained.grid).save(path)
    print(f"\npictures: {path}\npage to step through: {page}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--preset", help="options of RAS: paper, fast, balanced (the defaults) or quality")
    parser.add_argument(
        "--speedup", type=float, help=f"of RAS, by FLOPs; {SPEEDUP} where no preset and no ratios are given"
    )
    parser.add_argument(
        "--ratios", type=float, nargs="+", help="share of the tokens, one run of RAS for each; else the preset's"
    )
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--exact", type=int, default=0, help="draw the exact pictures anew with so many steps, 150 or more"
    )
    parser.add_argument("--turns", type=int, default=2, help="timed runs of each way")
    parser.add_argument("--explain", action="store_true", help="list every splice and gather")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    return parser.parse_args()


def options(args: argparse.Namespace, ratio: float | None) -> dict[str, Any]:
    """Those of RAS: of a preset, with a ratio or a speed-up where one is given."""
    if ratio is not None:
        return {"preset": args.preset, "sample_ratio": ratio}
    speedup = args.speedup or (None if args.preset else SPEEDUP)
    return {"preset": args.preset} | ({} if speedup is None else {"speedup": speedup})


def where(device: torch.device) -> str:
    """The machine, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def sample(
    pipe: StableDiffusion3Pipeline, args: argparse.Namespace, label: str, steps: int | None = None
) -> tuple[Tensor, list[float]]:
    """``(pictures [B, 3, H, W], seconds of each step)`` from the seed's noise."""
    generators = [torch.Generator().manual_seed(args.seed + index) for index in range(len(args.prompts))]
    steps = args.steps if steps is None else steps
    times: list[float] = []
    with tqdm(total=steps, desc=label, leave=False) as bar:

        def tick(pipe, step, timestep, values):
            if pipe.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            bar.update()
            return values

        begin = time.perf_counter()
        pictures = pipe(
            args.prompts, num_inference_steps=steps, guidance_scale=args.guidance, height=SIZE, width=SIZE,
            generator=generators, max_sequence_length=1, callback_on_step_end=tick, output_type="pt",
        ).images  # fmt: skip
    return pictures.float().cpu(), np.diff([begin, *times]).tolist()


def first_call(pipe: StableDiffusion3Pipeline, args: argparse.Namespace) -> dict:
    """The keyword arguments of the pipeline's first transformer call."""
    calls: list[dict] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, given, named: calls.append(named), with_kwargs=True
    )
    sample(pipe, args, "look at one call", steps=1)
    hook.remove()
    return calls[0]


def compare(runs: list[Run], turns: int) -> None:
    """Compiles what is not compiled yet, and draws in turns until each way has been timed so often."""
    for run in runs:
        if run.warm != 0 and not run.first:
            run.first = run.draw(f"{run.name}, compiling", run.warm)[1]
    for turn in range(turns):
        for run in runs:
            if len(run.times) <= turn:
                run.pictures, steps = run.draw(run.name, None)
                run.times.append(steps)


def dense(pipe: StableDiffusion3Pipeline, args: argparse.Namespace, name: str, steps: int, warm: int) -> Run:
    """Every step dense, compiled by Inductor."""

    def draw(label: str, fewer: int | None) -> tuple[Tensor, list[float]]:
        return sample(pipe, args, label, fewer or steps)

    return Run(name, draw, warm, kinds=["dense"] * steps, flops=steps)


def exact_pictures(pipe: StableDiffusion3Pipeline, args: argparse.Namespace) -> Tensor | None:
    """Pictures [B, 3, H, W] of so many steps that more change nothing, drawn now or shipped; None where they are not known."""
    given = args.prompts, args.seed, args.guidance
    if not args.exact:
        if given != (PROMPTS, 0, 4.0):
            return None
        row = torch.from_numpy(np.array(Image.open(EXACT))).permute(2, 0, 1) / 255
        return torch.stack(row.split(SIZE, dim=2))
    pictures, _ = sample(pipe, args, f"exact, {args.exact} steps", args.exact)
    if given == (PROMPTS, 0, 4.0):
        row = torch.cat([*pictures], dim=2).permute(1, 2, 0).clamp(0, 1)
        Image.fromarray((row.numpy() * 255).round().astype(np.uint8)).save(EXACT)
    return pictures


def adaptive(
    pipe: StableDiffusion3Pipeline, args: argparse.Namespace, ratio: float | None, handle: ras_compile.Handle,
    explained: ras_compile.Explanation,
) -> Run:  # fmt: skip
    """Region-adaptive sampling at one ratio, or at the preset's. Only a whole run compiles for all its counts of tokens."""

    def draw(label: str, fewer: int | None) -> tuple[Tensor, list[float]]:
        handle.configure(**options(args, ratio))
        drawn = sample(pipe, args, label, fewer)
        records = ras_compile.trace(handle)
        samples = len(args.prompts)
        counts = torch.zeros(2 * samples, explained.tokens)
        for record in records:
            counts += 1 if record.rows is None else torch.zeros_like(counts).scatter_(1, record.rows.cpu(), 1.0)
        run.computed = counts[samples:]
        run.kinds = [record.kind for record in records]
        run.flops = sum(
            1.0 if record.kind == "dense" else explained.cost.flop_ratio(record.active) for record in records
        )
        return drawn

    run = Run("RAS" if ratio is None else f"RAS {100 * ratio:.4g}%", draw)
    return run


def report(runs: list[Run], explained: ras_compile.Explanation, exact: Tensor | None) -> None:
    """Prints the table."""
    base = runs[0]
    head = ["", "seconds", "speed-up", "compiling", "ms dense step", "ms sparse step", "sparse FLOPs", "FLOP speed-up"]
    head += ["dB to dense", "dB to exact"]
    rows = []
    for run in runs:
        ms = []
        for wanted in ("dense", "sparse"):
            of_kind = [1000 * s for s, kind in zip(run.steps, run.kinds, strict=True) if kind == wanted]
            ms.append(f"{np.mean(of_kind):.0f}" if of_kind else "-")
        sparse = run.kinds.count("sparse")
        rows.append(
            [
                run.name,
                f"{run.seconds:.2f}",
                f"{base.seconds / run.seconds:.2f}x",
                f"{run.compiled:.1f} s" if run.first else "-",
                *ms,
                f"{(run.flops - len(run.kinds) + sparse) / sparse:.3f}" if sparse else "-",
                f"{base.flops / run.flops:.2f}x",
                "-" if run is base else f"{nearness(run.pictures, base.pictures):.1f}",
                "-" if exact is None else f"{nearness(run.pictures, exact):.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def nearness(pictures: Tensor, others: Tensor) -> float:
    """PSNR in dB, the mean over the pictures."""
    pairs = zip(pictures, others, strict=True)
    return float(np.mean([peak_signal_noise_ratio(one, other, data_range=1.0).item() for one, other in pairs]))


def grid(runs: list[Run], prompts: list[str], tokens: tuple[int, ...], scale: int = 2) -> Image.Image:
    """One row per prompt: dense | RAS | how many times each token was computed | fewer dense steps in the time of RAS."""
    columns = []
    for run in runs:
        columns.append((run.name, run.pictures))
        if run.computed is not None:
            few, many = (int(value) for value in run.computed.aminmax())
            columns.append((f"{run.name}: times computed, black {few}, white {many}", heat(run, tokens)))
    side, top, left = SIZE * scale, 24, 4
    sheet = Image.new("RGB", (left + len(columns) * (side + 4), top + len(prompts) * (side + 22)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, pictures) in enumerate(columns):
        draw.text((left + column * (side + 4) + 4, 6), title, fill="black")
        for row, picture in enumerate(pictures):
            tile = Image.fromarray((picture.clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
            sheet.paste(
                tile.resize((side, side), Image.Resampling.NEAREST),
                (left + column * (side + 4), top + row * (side + 22)),
            )
    for row, prompt in enumerate(prompts):
        draw.text((left + 4, top + row * (side + 22) + side + 4), prompt, fill="black")
    return sheet


def heat(run: Run, tokens: tuple[int, ...]) -> Tensor:
    """Times computed [B, 3, H, W]: black where fewest in any picture, through red and yellow to white where most."""
    assert run.computed is not None
    few, many = run.computed.aminmax()
    share = ((run.computed - few) / (many - few).clamp_min(1)).reshape(-1, 1, *tokens)
    share = torch.nn.functional.interpolate(share, size=(SIZE, SIZE))
    return torch.cat([(3 * share).clamp(0, 1), (3 * share - 1).clamp(0, 1), (3 * share - 2).clamp(0, 1)], dim=1)


if __name__ == "__main__":
    main()
