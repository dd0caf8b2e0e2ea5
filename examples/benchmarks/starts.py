"""Seconds to the first picture of the shipped model in fresh processes: cold, with a warm cache on disk, and loaded.

    python examples/benchmarks/starts.py

*Cold* is a process on a machine that has compiled nothing yet; *warm* finds what PyTorch keeps on disk; *loaded* has an empty
disk again, and what `ras_compile.save` wrote in the cold process. The clock starts when the pipeline is loaded. *Eager* is the
first picture of the pipeline as it is, which compiles nothing: nobody can begin sooner.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PIPELINE = Path(__file__).parents[1] / "emoji" / "pipeline"


def draw(start: str, folder: str, steps: int) -> dict[str, object]:
    """Seconds of the first and of the second picture in this process."""
    import torch
    from diffusers import StableDiffusion3Pipeline

    import ras_compile

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = StableDiffusion3Pipeline.from_pretrained(PIPELINE, dtype=dtype, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": steps, "guidance_scale": 4.0, "max_sequence_length": 1, "output_type": "pt"}
    seconds, began = [], time.perf_counter()
    if start != "eager":
        ras_compile.attach(pipe)
    loaded = ras_compile.load(pipe, folder) if start == "loaded" else None
    for _ in range(2):
        picture = pipe("a red apple", generator=torch.Generator().manual_seed(0), **given).images.float().cpu()
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    if start == "cold":
        ras_compile.save(pipe, folder)
    return {"first": seconds[0], "second": seconds[1], "loaded": loaded, "mean": float(picture.mean())}


def main() -> None:
    """Runs each kind of start in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        print(json.dumps(draw(*args.inside, args.steps)))
        return
    with tempfile.TemporaryDirectory() as place:
        for start, disk in (("eager", "one"), ("cold", "one"), ("warm", "one"), ("loaded", "two")):
            surroundings = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(place, disk))}
            command = [
                sys.executable,
                __file__,
                "--steps",
                str(args.steps),
                "--inside",
                start,
                str(Path(place, "start")),
            ]
            done = subprocess.run(command, env=surroundings, stdout=subprocess.PIPE, text=True, check=True)
            print(start, done.stdout.strip().splitlines()[-1], flush=True)
        print("saved:", sum(file.stat().st_size for file in Path(place, "start").iterdir()), "bytes")


if __name__ == "__main__":
    main()
