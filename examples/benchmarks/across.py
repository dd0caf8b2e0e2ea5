"""How fast is one picture or video over several GPUs, dense and region-adaptive? Ulysses' context parallelism, in one run.

    torchrun --nproc-per-node 2 examples/benchmarks/across.py --model wan-1.3b --out results/across-wan-2.json
    torchrun --nproc-per-node 1 examples/benchmarks/across.py --model wan-1.3b --out results/across-wan-1.json   # alone
    torchrun --nproc-per-node 2 examples/benchmarks/across.py --model flux-dev --cancel 200 --out cancelled.json
    torchrun --nproc-per-node 2 examples/benchmarks/across.py --model flux-dev --size tiny --device cpu --inner-backend eager

Runs of dense sampling by diffusers (`enable_parallelism`, compiled) and of RAS take turns on one model. Process 0 writes:

    ranks                   how many processes share each picture; their degree of Ulysses
    dense_ms, sparse_ms     median step of each kind in the slowest process, scheduler and guidance included
    seconds                 one run of `steps` steps, median of the repeats, in the slowest process
    generation              seconds of runs of 28 and 50 steps by these medians: 4 dense steps and two resets, others sparse
    sent_dense, sent_sparse bytes that one process sends in a step, guidance included, by the cost model
    peak_gb                 most memory allocated in one process, weights included, without buffers of NCCL
    same                    whether all processes hold the same latents at the end
    warnings, reason        what ras_compile warned of; why a way has no figures

With `--cancel K` it draws K pictures by RAS and stops some of them at steps that a common seed says: one process raises a flag,
all of them see it before the step and start anew. The figures then say how many were stopped, and whether the last picture is
the one that was drawn before the first stop.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from machine import describe
from measure import Marks, Memory
from run import Bench
from sizes import MODELS, SIZES, WARMUP
from torch import Tensor, nn
from ways import NotAvailable, Setup, Way, set_up

from ras_compile.capture.sharding import settle_sharding_hooks
from ras_compile.passes.analysis.cost import ACTIVE

__all__ = ["main"]

WHOLE_RUNS = (28, 50)  # steps of the generations that medians are put together to


class Cancelled(Exception):
    """A picture that is not wanted any more."""


def main(argv: list[str] | None = None) -> dict:
    """Measures in this process, together with the others; returns what process 0 writes."""
    args = arguments(argv)
    device = join(args)
    bench = Bench(args)
    shorten(bench.work.transformer, args.layers)
    share(bench.work.transformer, device)
    content = cancelled(bench, args) if args.cancel else measured(bench, args)
    given, ranks = sys.argv[1:] if argv is None else argv, dist.get_world_size()
    meta = describe(__file__, given, device, size=args.size, ranks=ranks, steps=bench.work.steps)
    content = {"meta": meta} | content
    if dist.get_rank() == 0:
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(content, indent=1) + "\n")
        print(json.dumps(content, indent=1), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return content


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--size", choices=SIZES, default="real")
    parser.add_argument("--layers", type=int, help="only so many of the model's blocks of each kind")
    parser.add_argument("--steps", type=int, default=12, help="steps of a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ratio", type=float, default=0.25, help="share of the tokens in a sparse step")
    parser.add_argument("--context", choices=["fresh", "frozen"], default="frozen")
    parser.add_argument("--options", type=json.loads, default={}, help="further options of RAS, as JSON")
    parser.add_argument("--caches", action="store_true", help="also cache-dit's cache, where it can be imported")
    parser.add_argument("--cancel", type=int, default=0, metavar="K", help="draw K pictures, and stop some of them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner-backend", default="inductor", help="eager: nothing is compiled, to try things out")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that processes wait for each other")
    parser.add_argument("--out", type=Path, help="the JSON")
    return parser.parse_args(argv)


def join(args: argparse.Namespace) -> torch.device:
    """Joins the processes that `torchrun` has started; returns this one's device."""
    cuda = args.device.startswith("cuda")
    if cuda:
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(args.device)
    else:  # diffusers looks for an accelerator
        torch.accelerator.device_count = lambda: 1
        torch._C._get_accelerator = lambda: torch.device("cpu")
    device = torch.device(args.device)
    dist.init_process_group(
        "nccl" if cuda else "gloo", timeout=timedelta(seconds=args.timeout), device_id=device if cuda else None
    )
    return device


def shorten(transformer: nn.Module, layers: int | None) -> None:
    """Leaves out all but the first blocks of each kind."""
    for name, blocks in list(transformer.named_children()):
        if layers is not None and isinstance(blocks, nn.ModuleList):
            setattr(transformer, name, blocks[:layers])


def share(transformer: Any, device: torch.device) -> None:
    """Each process gets its part of the tokens, by diffusers' own hooks; one process keeps all of them."""
    size = dist.get_world_size()
    if size > 1:
        transformer.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=size))
        settle_sharding_hooks(transformer)  # dense sampling too is to be one graph


def measured(bench: Bench, args: argparse.Namespace) -> dict:
    """Rows of dense sampling and of RAS, whose runs take turns; a cache changes the model, and comes last."""
    wanted = [Way("compile"), Way("ras", args.ratio, args.context)]
    rows, setups = [], []
    for way in wanted:
        setup, row = warmed(bench, args, way)
        rows.append(row)
        if setup is not None:
            setups.append((setup, row))
    turns(bench, args, setups)
    for setup, _ in setups:
        setup.close()
    if args.caches:
        setup, row = warmed(bench, args, Way("cache-dit"))
        rows.append(row)
        if setup is not None:
            turns(bench, args, [(setup, row)])
            setup.close()
    return {"rows": rows}


def warmed(bench: Bench, args: argparse.Namespace, way: Way) -> tuple[Setup | None, dict]:
    """A way that has run as often as it takes to have everything compiled and captured, and its row with the memory."""
    row: dict[str, Any] = dict(
        model=args.model,
        method=way.method,
        sample_ratio=way.sample_ratio,
        context=way.context,
        ranks=dist.get_world_size(),
    )
    memory = Memory(bench.device, bench.weights)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        reason = ""
        try:
            setup = set_up(bench.work, way, args.inner_backend, args.options)
            for _ in range(3):
                memory.settled()
                latents = bench.run(setup)
        except NotAvailable as error:
            reason = str(error)
        except Exception as error:  # the other ways can still be measured
            reason = f"{type(error).__name__}: {error}"
        if slowest(float(bool(reason))):
            return None, row | dict(reason=reason or "another process failed")
    told = sorted({str(one.message) for one in said if "ras_compile" in str(one.message)})
    row |= dict(peak_gb=slowest(memory.peak_gb() or 0.0), same=same(latents), finite=bool(latents.isfinite().all()))
    return setup, row | ({"warnings": told} if told else {}) | setup.note


def turns(bench: Bench, args: argparse.Namespace, setups: list[tuple[Setup, dict]]) -> None:
    """Times runs of all ways in turns, and writes the figures into their rows."""
    runs: dict[int, list[list[float]]] = {}
    for _ in range(args.repeats):
        for at, (setup, _) in enumerate(setups):
            dist.barrier()
            marks = Marks(bench.device)
            bench.run(setup, mark=marks)
            runs.setdefault(at, []).append(marks.milliseconds())
    for at, (setup, row) in enumerate(setups):
        kinds = setup.kinds()
        names = [kinds[step][0] if step in kinds else "dense" for step in range(bench.work.steps)]
        steps = [statistics.median(step) for step in zip(*runs[at], strict=True)]
        row |= dict(
            kinds="".join(name[0] for name in names), step_ms=[slowest(step) for step in steps],
            seconds=slowest(statistics.median(sum(run) for run in runs[at]) / 1e3),
        )  # fmt: skip
        for kind in ("dense", "sparse"):
            found = [ms for ms, name in zip(row["step_ms"], names, strict=True) if name == kind]
            row[f"{kind}_ms"] = statistics.median(found) if found else None
        row["generation"] = {
            count: whole_run(count, row["dense_ms"], row["sparse_ms"]) for count in WHOLE_RUNS if not setup.exclusive
        }
        if setup.cost is not None:
            cost, active = setup.cost(), max((active for _, active in kinds.values()), default=0)
            active = min((count for kind, count in kinds.values() if kind == "sparse"), default=active)
            calls = bench.work.branches
            row |= dict(
                sent_dense=calls * cost.dense_sent, sent_sparse=calls * float(cost.sparse_sent.subs(ACTIVE, active)),
                cache_gb=calls * cost.cache_bytes / 1e9, flop_ratio=cost.flop_ratio(active), tokens=cost.tokens, active=active,
            )  # fmt: skip


def whole_run(steps: int, dense: float | None, sparse: float | None) -> float | None:
    """Seconds of a generation, put together from the medians of its steps."""
    resets = len(range(12, steps, 8)[:2])
    if dense is None:
        return None
    few = steps if sparse is None else WARMUP + resets
    return (few * dense + (steps - few) * (sparse or 0.0)) / 1e3


def slowest(value: float) -> float:
    """The largest of what the processes found."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return max(found)


def same(latents: Tensor) -> bool:
    """Whether all processes hold the same latents."""
    first = latents.clone()
    dist.broadcast(first, 0)
    return slowest(float(not torch.equal(first, latents))) == 0.0


def cancelled(bench: Bench, args: argparse.Namespace) -> dict:
    """Draws `args.cancel` pictures, of which some are stopped; a process that hangs is ended by the time-out."""
    setup = set_up(bench.work, Way("ras", args.ratio, args.context), args.inner_backend, args.options)
    flags = dist.new_group(backend="gloo")
    draw, stopped = random.Random(0), 0
    for _ in range(2):
        wanted = bench.run(setup)
    for _ in range(args.cancel):
        step, by = draw.randrange(2 * bench.work.steps), draw.randrange(dist.get_world_size())
        try:
            bench.run(setup, mark=stop_at(step, by, flags))
        except Cancelled:
            stopped += 1
    last = bench.run(setup)
    setup.close()
    apart = slowest(float((last - wanted).abs().max()))
    return {"cancel": dict(pictures=args.cancel, stopped=stopped, apart=apart, same=same(last))}


def stop_at(step: int, by: int, flags: Any) -> Callable[[int], None]:
    """What a run calls before each step: it ends the run in all processes once one of them wants so."""

    def mark(index: int) -> None:
        flag = torch.tensor(int(index == step and dist.get_rank() == by))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=flags)
        if flag:
            raise Cancelled

    return mark


if __name__ == "__main__":
    main()
