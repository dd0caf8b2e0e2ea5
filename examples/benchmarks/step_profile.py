"""What a step's time goes to: the kernels of sparse (or dense) steps, by time, those of CUDA graphs included.

    python examples/benchmarks/step_profile.py --model sd3-medium --ratio 0.25 --out profiles

Writes `DIR/profile-<model>-<kind>-<ratio>-<context>-<gpu>.json` and `.txt`. `busy_ms` is the time of all kernels of a
step, `span_ms` the time from the first one's begin to the last one's end: what lies between the two are gaps.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from machine import describe, dtype_of, short_name
from sizes import MODELS, SIZES, WARMUP, build, sample
from torch.autograd import DeviceType
from ways import Way, set_up

__all__ = ["main"]

# Families of kernels, by parts of their names; the first that fits counts.
FAMILIES = {
    "scatter-GEMM": ("scatter_linear",),
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "GEMM": ("gemm", "nvjet", "cutlass", "cublas", "many_linears", "addmm", "aten::mm", "aten::linear"),
    "Inductor": ("triton_",),
    "copy": ("memcpy", "memset", "copy", "aten::clone"),
}
STEPS = 4  # how many are profiled


def family(name: str) -> str:
    lowered = name.lower()
    return next((kind for kind, parts in FAMILIES.items() if any(part in lowered for part in parts)), "other")


class Window:
    """A mark for `sample`: profiles the steps from `first` to `last`, with the device idle at both ends."""

    def __init__(self, first: int, last: int, device: torch.device) -> None:
        self._first, self._last, self._cuda = first, last, device.type == "cuda"
        self.profiler = torch.profiler.profile()

    def __call__(self, index: int) -> None:
        if index in (self._first, self._last) and self._cuda:
            torch.cuda.synchronize()
        if index == self._first:
            self.profiler.start()
        if index == self._last:
            self.profiler.stop()


def kernels(profiler: Any, device: torch.device) -> list[dict]:
    """`[{name, family, ms, count}]` of the profiled window, longest first; of a CPU its ops."""
    cuda = device.type == "cuda"
    found = []
    for entry in profiler.key_averages():
        if entry.device_type != (DeviceType.CUDA if cuda else DeviceType.CPU) or entry.is_user_annotation:
            continue
        microseconds = entry.self_device_time_total if cuda else entry.self_cpu_time_total
        if microseconds > 0:
            found.append(dict(name=entry.key, family=family(entry.key), ms=microseconds / 1e3, count=entry.count))
    return sorted(found, key=lambda kernel: -kernel["ms"])


def span_ms(profiler: Any, device: torch.device) -> float:
    """Milliseconds from the first kernel's begin to the last one's end."""
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    events = [event for event in profiler.profiler.kineto_results.events() if event.device_type() == kind]
    if not events:
        return 0.0
    end = max(event.start_ns() + event.duration_ns() for event in events)
    return (end - min(event.start_ns() for event in events)) / 1e6


def main(argv: list[str] | None = None) -> dict:
    """Profiles and writes; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--context", choices=["fresh", "frozen"], default="fresh")
    parser.add_argument("--kind", choices=["sparse", "dense", "compile"], default="sparse",
                        help="compile: a step of torch.compile, without RAS")  # fmt: skip
    parser.add_argument("--size", choices=SIZES, default="real")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner-backend", default="inductor")
    parser.add_argument("--options", type=json.loads, default={}, help="further options of RAS, as JSON")
    parser.add_argument("--top", type=int, default=40, help="kernels in the table")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)

    device = torch.device(args.device)
    work = build(args.model, args.size, device, dtype_of(device))
    work.steps = WARMUP + STEPS + 1
    last = range(work.steps - STEPS, work.steps)
    options = args.options | ({"reset_steps": tuple(last)} if args.kind == "dense" else {})
    way = Way("compile") if args.kind == "compile" else Way("ras", args.ratio, args.context)
    setup = set_up(work, way, args.inner_backend, options)
    work.transformer._compiled_call_impl = setup.compiled
    for _ in range(2):
        sample(work, work.transformer, setup.scheduler, work.steps)
    window = Window(last.start, last.stop, device)
    sample(work, work.transformer, setup.scheduler, work.steps, window)
    told = {kind for step, (kind, _) in setup.kinds().items() if step in last}

    found = [kernel | dict(ms=kernel["ms"] / STEPS, count=kernel["count"] / STEPS)
             for kernel in kernels(window.profiler, device)]  # fmt: skip
    busy = sum(kernel["ms"] for kernel in found)
    families = {
        kind: sum(kernel["ms"] for kernel in found if kernel["family"] == kind) for kind in (*FAMILIES, "other")
    }
    given = sys.argv[1:] if argv is None else argv
    content = dict(
        meta=describe(__file__, given, device, size=args.size), model=args.model, kind=args.kind, kinds=sorted(told),
        sample_ratio=args.ratio, context=args.context, steps=STEPS, busy_ms=busy,
        span_ms=span_ms(window.profiler, device) / STEPS, families=families, kernels=found,
    )  # fmt: skip
    text = report(content, args.top)
    name = "-".join(("profile", args.model, args.kind, f"{args.ratio:g}", args.context, short_name(device)))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (args.out / f"{name}.txt").write_text(text)
    print(text)
    return content


def report(content: dict, top: int) -> str:
    """The profile as text: families, then kernels."""
    busy = content["busy_ms"] or 1.0
    lines = [
        f"{content['model']}, {content['kind']} step, {content['sample_ratio']:.1%} of tokens, context {content['context']}",
        f"span {content['span_ms']:.3f} ms, busy {content['busy_ms']:.3f} ms, a step",
        "",
        *(f"{ms:9.3f} ms {ms / busy:6.1%}  {kind}" for kind, ms in content["families"].items() if ms),
        "",
        f"{'ms':>9} {'share':>7} {'launches':>9}  kernel",
        *(
            f"{k['ms']:9.3f} {k['ms'] / busy:7.1%} {k['count']:9.1f}  {k['name'][:150]}"
            for k in content["kernels"][:top]
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
