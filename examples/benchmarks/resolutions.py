"""What pictures of other sizes cost: seconds of the first picture of each size, the compiled programs, and bytes kept.

    python examples/benchmarks/resolutions.py --sides 32x32,32x40,48x32,40x40,24x40
    python examples/benchmarks/resolutions.py --size thin --sides 8x10,9x11,10x12 --dynamic   # on a CPU: real depth, tiny width

Of FLUX, whose latents are packed, or of another model of `sizes.py` (`--model sd3-medium`), whose latents have height and
width in patches of two: `--sides` are tokens. *Cold* are the seconds of a size's first picture over those of its last one
(`--pictures 2`), by the clock and of the processors (all of them, if TORCHINDUCTOR_COMPILE_THREADS=1 keeps compilers from
living on). `--layers 12` takes fewer blocks; `--dynamic` attaches with `dynamic=True`, `--no-dynamic` with `dynamic=False`:
each size has programs of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from typing import Any

import diffusers
import torch
from machine import dtype_of, short_name
from sizes import MODELS, SIZES, Workload, build, sample
from torch import Tensor
from ways import Pipe

import ras_compile
from ras_compile.execute import inner
from ras_compile.execute.memory import keepers
from ras_compile.plans import family, plan

__all__ = ["main"]


def picture(work: Workload, scheduler: Any, rows: int, columns: int, steps: int) -> Tensor:
    """One picture of `rows` x `columns` tokens; returns the latents at the end, on the CPU."""
    given = work.inputs
    if "img_ids" not in given:
        like = work.latents
        shape = (*like.shape[:-2], 2 * rows, 2 * columns)
        generator = torch.Generator(like.device).manual_seed(0)
        latents = torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
        return sample(replace(work, latents=latents), work.transformer, scheduler, steps).float().cpu()
    like = given["hidden_states"]
    generator = torch.Generator(like.device).manual_seed(0)
    latents = torch.randn(1, rows * columns, like.shape[-1], generator=generator, device=like.device, dtype=like.dtype)
    ids = torch.zeros(rows, columns, 3, device=like.device, dtype=given["img_ids"].dtype)
    ids[..., 1] += torch.arange(rows, device=like.device)[:, None]
    ids[..., 2] += torch.arange(columns, device=like.device)[None]
    given = given | dict(img_ids=ids.reshape(-1, 3))
    scheduler.set_timesteps(steps, device=like.device)
    with torch.no_grad():
        for t in scheduler.timesteps:
            time_of = t.expand(1).to(like.dtype) / 1000
            noise = work.transformer(**given | dict(hidden_states=latents, timestep=time_of))[0]
            latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    return latents.float().cpu()


def processors() -> float:
    """Seconds that processors have worked for this process and for those that it started and that have ended."""
    told = os.times()
    return told.user + told.system + told.children_user + told.children_system


def counted() -> list[str]:
    """A list that grows by a name for each program that is compiled from now on."""
    names: list[str] = []

    def counting(module: Any, inputs: Any, config: Any, compile_inner: Any = inner.compile_inner) -> Any:
        names.append("sparse" if any(node.name == "rows" for node in module.graph.nodes) else "dense")
        return compile_inner(module, inputs, config)

    for place in (inner, plan, family):
        place.compile_inner = counting
    return names


def main(argv: list[str] | None = None) -> list[dict]:
    """Measures and prints, one JSON a size; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sides", default="64x64,48x64,64x80,56x72,48x48", help="rows x columns of tokens, in order")
    parser.add_argument("--model", choices=sorted(MODELS), default="flux-dev")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=2, help="how many of each size, two or more")
    parser.add_argument("--size", choices=SIZES, default="real")
    parser.add_argument("--layers", type=int, help="so many blocks of each kind; all, if it is not given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner-backend", default="inductor")
    parser.add_argument("--dynamic", action=argparse.BooleanOptionalAction, help="as torch.compile takes it")
    args = parser.parse_args(argv)
    if args.pictures < 2:
        parser.error("a size's first picture is compared with a later one; give --pictures 2 or more")
    device = torch.device(args.device)
    work = build(args.model, args.size, device, dtype_of(device), args.layers)
    packed = "img_ids" in work.inputs
    if packed and work.inputs["hidden_states"].shape != work.latents.shape:
        parser.error(f"{args.model} has reference tokens, and --sides say nothing of these; take another --model")
    pipe = Pipe(work.transformer, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0) if packed else work.scheduler())
    names = counted()
    handle = ras_compile.attach(pipe, dynamic=args.dynamic, inner_backend=args.inner_backend, unsupported="error")
    found: list[dict] = []
    for side in args.sides.split(","):
        rows, columns = map(int, side.split("x"))
        seconds, worked = [], []
        for _ in range(args.pictures):
            began, before = time.perf_counter(), processors()
            picture(work, pipe.scheduler, rows, columns, args.steps)
            seconds.append(time.perf_counter() - began)
            worked.append(processors() - before)
        kept = sum(keeper.bytes for keeper in list(keepers))
        told = dict(
            device=short_name(device), model=args.model, size=args.size, dynamic=args.dynamic, tokens=rows * columns
        )
        told |= dict(cold_s=seconds[0] - seconds[-1], cold_processor_s=worked[0] - worked[-1])
        told |= dict(picture_s=seconds[-1], programs=len(names), kept_bytes=kept)
        found.append(told | dict(cold_of_first=told["cold_s"] / (found[0]["cold_s"] if found else told["cold_s"])))
        print(json.dumps(found[-1]), flush=True)
    handle.detach()
    return found


if __name__ == "__main__":
    main()
