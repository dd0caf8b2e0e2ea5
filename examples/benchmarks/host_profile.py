"""What a sparse call costs the host, part by part, over what Dynamo's own call costs.

    python examples/benchmarks/host_profile.py --model sd3-medium --ratio 0.125 --out profiles

Twice: each call after a wait of 10 ms for the device, and with the host running ahead of the device, as it does when one
samples (a call may then have to wait until the device has caught up: such figures are the device's, not the host's). PyTorch's
own CUDA graphs (`mode="reduce-overhead"`, dense) stand beside it: they, too, compare the addresses of all weights, copy inputs
in and launch a graph. Writes `DIR/host-<model>-<ratio>-<context>-<gpu>.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from machine import describe, dtype_of, short_name
from measure import LAUNCHES, HostClock, null_backend
from sizes import MODELS, SIZES, Workload, build, sample
from ways import Setup, Way, set_up

from ras_compile.backend import CompiledGraph
from ras_compile.execute.cudagraphs import ProgramGraphs, Slot
from ras_compile.plans.plan import Plan
from ras_compile.sampling.rows import RowChooser, Selection
from ras_compile.sampling.state import TransformerState

__all__ = ["main"]

PLACES: dict[str, tuple[type, str]] = {
    "backend": (CompiledGraph, "__call__"),
    "decide": (TransformerState, "decide"),
    "choose rows": (RowChooser, "rows"),
    "selection": (Selection, "__call__"),
    "program": (Plan, "run_sparse"),
    "addresses of weights": (ProgramGraphs, "_addresses"),
    "copies in": (Slot, "fill"),
    "rows in": (Slot, "fill_rows"),
    "record": (TransformerState, "record"),
    **LAUNCHES,
}
STEADY = 12  # calls of a run, its last ones, over which medians are taken


def timed(work: Workload, setup: Setup, device: torch.device, wait: bool, places: Any = LAUNCHES) -> HostClock:
    """The clock of one run."""
    clock = HostClock(work.transformer, device, wait, places)
    if device.type == "cuda":
        torch.cuda.synchronize()
    _run(work, setup, clock)
    return clock


def _run(work: Workload, setup: Setup, denoise: Any = None) -> None:
    work.transformer._compiled_call_impl = setup.compiled
    try:
        sample(work, denoise or work.transformer, setup.scheduler, work.steps)
    finally:
        work.transformer._compiled_call_impl = None


def steady(values: list[float]) -> float:
    return statistics.median(values[-STEADY:])


def profile(work: Workload, setups: dict[str, Setup], device: torch.device, wait: bool) -> dict:
    """Microseconds of a call: Dynamo's own, what is added to it, and the parts of that."""
    own = steady(timed(work, setups["null"], device, wait).milliseconds)
    content: dict[str, Any] = dict(dynamo_us=1e3 * own)
    for name, setup in setups.items():
        if name != "null":
            clock = timed(work, setup, device, wait)
            content[name] = dict(
                added_us=1e3 * (steady(clock.milliseconds) - own), launch_us=1e3 * steady(clock.launching)
            )
    parts = [section.milliseconds for section in timed(work, setups["ras"], device, wait, PLACES).sections]
    paths = sorted({path for part in parts[-STEADY:] for path in part})
    return content | dict(parts_us={path: 1e3 * steady([part.get(path, 0.0) for part in parts]) for path in paths})


def main(argv: list[str] | None = None) -> dict:
    """Profiles and writes; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--ratio", type=float, default=0.125)
    parser.add_argument("--context", choices=["fresh", "frozen"], default="fresh")
    parser.add_argument("--size", choices=SIZES, default="real")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner-backend", default="inductor")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)

    device = torch.device(args.device)
    work = build(args.model, args.size, device, dtype_of(device))
    ways = [Way("reduce-overhead"), Way("ras", args.ratio, args.context)]
    setups = {way.method: set_up(work, way, args.inner_backend, {"reset_steps": ()}) for way in ways}
    work.transformer.compile(backend=null_backend)
    setups["null"] = Setup(work.scheduler(), work.transformer._compiled_call_impl)
    for setup in setups.values():
        for _ in range(2):
            _run(work, setup)
    kinds = {kind for step, (kind, _) in setups["ras"].kinds().items() if step >= work.steps - STEADY}

    given = sys.argv[1:] if argv is None else argv
    content = dict(
        meta=describe(__file__, given, device, size=args.size), model=args.model, sample_ratio=args.ratio,
        context=args.context, kinds=sorted(kinds), calls_of_a_step=work.branches, weights=_weights(work),
        waited=profile(work, setups, device, True), ahead=profile(work, setups, device, False),
    )  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    name = "-".join(("host", args.model, f"{args.ratio:g}", args.context, short_name(device)))
    (args.out / f"{name}.json").write_text(json.dumps(_rounded(content), indent=1) + "\n")
    print(report(content))
    return content


def _weights(work: Workload) -> int:
    return len([*work.transformer.parameters(), *work.transformer.buffers()])


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 1) if value >= 1 else value
    return {key: _rounded(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def report(content: dict) -> str:
    """The profile as text."""
    lines = [f"{content['model']}, {content['sample_ratio']:.1%} of tokens, context {content['context']}; microseconds"]
    for mode in ("waited", "ahead"):
        found = content[mode]
        lines += ["", f"{mode}: Dynamo's own call {found['dynamo_us']:.0f}, added to it"]
        for name in ("reduce-overhead", "ras"):
            lines.append(f"{found[name]['added_us']:9.0f}  {name}, of it {found[name]['launch_us']:.0f} in launches")
        lines += [
            f"{taken:9.0f}  {'  ' * path.count('/')}{path.rpartition('/')[2]}"
            for path, taken in found["parts_us"].items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
