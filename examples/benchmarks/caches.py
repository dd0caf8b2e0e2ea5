"""What caches in float8, in int8 and in the host's memory cost and save: memory, seconds of a run, and the error of its latents.

    python examples/benchmarks/caches.py --model sd3-medium
    python examples/benchmarks/caches.py --model wan-1.3b --ratio 0.25
    python examples/benchmarks/caches.py --model flux-dev --size tiny --inner-backend eager   # on a CPU

All rows are of one run on one model; `extra` is the peak of the device's memory above weights and latents, `error` the distance
of the latents at the end from those of dense sampling, over the dense ones' size, and `rounding` likewise from those of caches
as they are.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from typing import Any

import torch
from machine import dtype_of, short_name
from measure import Memory, weight_bytes
from sizes import MODELS, SIZES, Workload, build, sample
from torch import Tensor
from ways import Way, set_up

__all__ = ["main"]

OPTIONS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "as they are, no CUDA graphs": {"cuda_graphs": False},
    "float8": {"cache_dtype": "float8"},
    "int8": {"cache_dtype": "int8"},
    "host": {"cache_device": "cpu"},
    "host, float8": {"cache_device": "cpu", "cache_dtype": "float8"},
}


def measured(work: Workload, way: Way, backend: str, options: dict, repeats: int) -> tuple[dict, Tensor]:
    """One row, and the latents at the end."""
    device = work.latents.device
    gc.collect()
    memory = Memory(device, 0)
    setup = set_up(work, way, backend, options)
    work.transformer._compiled_call_impl = setup.compiled
    seconds = []
    try:
        for run in range(repeats + 2):  # the first one compiles, the second one captures
            if run == 2:
                memory.settled()
            _wait(device)
            began = time.perf_counter()
            latents = sample(work, work.transformer, setup.scheduler, work.steps)
            _wait(device)
            seconds.append(time.perf_counter() - began)
        summary = setup.handle.summary() if setup.handle is not None else None
        row = dict(seconds=statistics.median(seconds[2:]), first_s=seconds[0], extra_gb=memory.peak_gb())
        return row | dict(caches_gb=0.0 if summary is None else summary.cache_bytes / 1e9), latents.float().cpu()
    finally:
        work.transformer._compiled_call_impl = None
        setup.close()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: list[str] | None = None) -> list[dict]:
    """Measures and prints, one JSON a row; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--size", choices=SIZES, default="real")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner-backend", default="inductor")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    work = build(args.model, args.size, device, dtype_of(device))
    work.steps = args.steps or work.steps
    ways = [("dense, compiled", Way("compile"), {})]
    ways += [(name, Way("ras", args.ratio, "fresh"), options) for name, options in OPTIONS.items()]
    rows: list[dict] = []
    dense, plain = None, None
    for name, way, options in ways:
        row, latents = measured(work, way, args.inner_backend, options, args.repeats)
        dense = latents if dense is None else dense
        plain = latents if way.method == "ras" and plain is None else plain
        row["error"] = float((latents - dense).norm() / dense.norm())
        row["rounding"] = 0.0 if plain is None else float((latents - plain).norm() / plain.norm())
        told = dict(model=args.model, device=short_name(device), caches=name, ratio=args.ratio, steps=work.steps)
        rows.append(told | dict(weights_gb=weight_bytes(work.transformer) / 1e9) | row)
        print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    main()
