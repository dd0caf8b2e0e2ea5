"""Seconds to the first picture in fresh processes: cold, with a warm cache on disk, and loaded; one JSON a line.

    python examples/benchmarks/starts.py                        # the shipped model
    python examples/benchmarks/starts.py --model sd3-medium     # one of sizes.py, random weights, its transformer alone
    python examples/benchmarks/starts.py --model sd3-medium --size tiny --steps 8   # on a CPU

*Cold* is a process on a machine that has compiled nothing yet; *warm* finds what PyTorch and Triton keep on disk; *loaded* has
an empty disk again in the same place, and what `ras_compile.save` wrote in the cold process; *loaded, with Triton's folder* has
that, too, as a container image may (on a GPU: it should be no faster, as `save` takes along what is needed of it). The clock starts
when the weights are loaded. *Eager* is the first picture of the pipeline as it is, which compiles nothing: nobody can begin sooner.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

PIPELINE = Path(__file__).parents[1] / "emoji" / "pipeline"


def shipped(args: argparse.Namespace) -> tuple[Any, Callable[[], Any]]:
    """The shipped pipeline, and a function that draws one picture with it."""
    import torch
    from diffusers import StableDiffusion3Pipeline

    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    pipe = StableDiffusion3Pipeline.from_pretrained(PIPELINE, dtype=dtype, local_files_only=True).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    given = {"guidance_scale": 4.0, "max_sequence_length": 1, "output_type": "pt"}
    given["num_inference_steps"] = args.steps or 8

    return pipe, lambda: pipe("a red apple", generator=torch.Generator().manual_seed(0), **given).images


def workload(args: argparse.Namespace) -> tuple[Any, Callable[[], Any]]:
    """What is sampled of one of `sizes.MODELS`, and a function that does it once."""
    import torch
    from machine import dtype_of
    from sizes import build, sample
    from ways import Pipe

    device = torch.device(args.device)
    work = build(args.model, args.size, device, dtype_of(device))
    pipe = Pipe(work.transformer, work.scheduler())
    return pipe, lambda: sample(work, work.transformer, pipe.scheduler, args.steps or work.steps)


def draw(start: str, folder: str, args: argparse.Namespace) -> dict[str, object]:
    """Seconds of the first and of the second picture in this process."""
    import ras_compile

    pipe, picture = shipped(args) if args.model == "emoji" else workload(args)
    seconds, began = [], time.perf_counter()
    if start != "eager":
        ras_compile.attach(pipe)
    loaded = ras_compile.load(pipe, folder) if start.startswith("loaded") else None
    for _ in range(2):
        mean = float(picture().float().cpu().mean())
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    if start == "cold":
        ras_compile.save(pipe, folder)
    return {"start": start, "first": seconds[0], "second": seconds[1], "loaded": loaded, "mean": mean}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="emoji", help="the shipped one (emoji), or one of sizes.py")
    parser.add_argument("--size", choices=["real", "thin", "tiny"], default="real", help="of the models of sizes.py")
    parser.add_argument("--steps", type=int, help="of a picture; by default the model's, 8 of the shipped one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep", type=Path, help="an empty folder, where what the processes write stays for a look")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Runs each kind of start in a process of its own."""
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    if args.inside:
        print(json.dumps(draw(*args.inside, args)))
        return
    starts = ["eager", "cold", "warm", "loaded"] + ["loaded, with Triton's folder"] * (args.device == "cuda")
    with tempfile.TemporaryDirectory() if args.keep is None else nullcontext(args.keep) as place:
        disk, before = Path(place, "disk"), Path(place, "before")
        for start in starts:
            if start.startswith("loaded"):
                # the same place, empty: Inductor asks for what it chose by the path of its files
                disk.rename(Path(place, f"not for {start}") if before.exists() else before)
            triton = before if start.endswith("folder") else disk
            folders = {"TORCHINDUCTOR_CACHE_DIR": disk, "TRITON_CACHE_DIR": triton / "triton"}
            surroundings = {**os.environ, **{name: str(folder) for name, folder in folders.items()}}
            command = [sys.executable, __file__, *argv, "--inside", start, str(Path(place, "start"))]
            done = subprocess.run(command, env=surroundings, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps({"model": args.model, "device": args.device, **row}), flush=True)
        print(json.dumps({"saved_bytes": sum(file.stat().st_size for file in Path(place, "start").iterdir())}))


if __name__ == "__main__":
    main()
