"""The benchmark tables of docs/benchmarks.md, generated from the JSON between two markers.

python examples/benchmarks/table.py            # rewrites the page
python examples/benchmarks/table.py --print    # only shows the tables
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rows import load

__all__ = ["BEGIN", "END", "PAGE", "RESULTS", "put", "tables"]

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
RESULTS = Path(__file__).parent / "results" / "h200.json"
BEGIN, END = "<!-- benchmark -->\n", "<!-- /benchmark -->\n"
NAMES = {
    "eager": "eager",
    "compile": "`torch.compile`",
    "reduce-overhead": "`torch.compile`, reduce-overhead",
    "max-autotune": "`torch.compile`, max-autotune",
    "first-block-cache": "FirstBlockCache (diffusers)",
    "taylorseer": "TaylorSeer (diffusers)",
    "magcache": "MagCache (diffusers)",
    "cache-dit": "cache-dit",
}
THRESHOLDS = ("first-block-cache", "cache-dit")
HEADER = (
    "sampling", "steps", "seconds", "vs compiled", "vs eager", "FLOPs", "dense ms", "sparse ms", "of the floor", "GB",
    "extra / caches GB", "reserved GB", "cold / warm start s", "host ms", "waits",
)  # fmt: skip
# What stands there in the tables of quantised models.
QUANTISED = {"vs compiled": "vs bf16 compiled", "vs eager": "vs compiled", "of the floor": "error / of rounding"}


def tables(content: dict) -> str:
    """One table for each model, and a sentence about the machine and the commands."""
    meta, parts = content["meta"], []
    latest = max((row.get("date") or "" for row in content["rows"]), default="")
    for model in dict.fromkeys(row["model"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["model"] == model]
        measured = [row for row in rows if row["seconds"] is not None]
        quantised = any(row.get("x_quantised") is not None for row in measured)
        header = [QUANTISED.get(name, name) if quantised else name for name in HEADER]
        lines = [f"**{model}**", "", _line(header), _line(["---"] * len(header))]
        lines += [_line(_cells(row, latest, quantised)) for row in measured]
        left_out = [f"{_name(row)} ({row['reason']})" for row in rows if row["seconds"] is None and row.get("reason")]
        if left_out:
            lines += ["", f"Not measured: {'; '.join(left_out)}."]
        parts.append("\n".join(lines))
    commands = "\n".join(dict.fromkeys(command["command"] for command in meta["commands"]))
    where = (
        f"{meta['gpu'] or 'CPU'}, driver {meta['driver']}, torch {meta['torch']}, Triton {meta['triton']}, diffusers "
        f"{meta['diffusers']}, {meta['dtype']}, random weights, {latest or meta['commands'][-1]['date']}. *of the floor*: the time "
        f"that the run's FLOPs take at {meta['floor_tflops']} TFLOP/s over its seconds. *extra*: the peak over that of "
        "compiled dense sampling; *reserved*: with the pools of CUDA graphs. *host ms*: host time that a "
        "call adds to Dynamo's own, CUDA's launch of its graphs included. *waits*: calls in three steps that wait for the device."
    )
    if any(row.get("x_quantised") is not None for row in content["rows"]):
        where += (
            " In the tables of quantised models, *vs bf16 compiled* is to compiled dense sampling of the plain model and "
            "*vs compiled* to that of the quantised one; *error* is the distance of the latents at the end from those of "
            "the former, and *of rounding* from those of the same sampling of the plain model, both over their size."
        )
    if any(row["method"] in THRESHOLDS and row["seconds"] is not None for row in content["rows"]):
        where += (
            " FirstBlockCache and cache-dit skip by a threshold on values, which random weights meet in their own way."
        )
    return "\n\n".join([where, *parts, f"```sh\n{commands}\n```"]) + "\n"


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _name(row: dict) -> str:
    if row["method"] == "ras":
        frozen = ", frozen text" if row["context"] == "frozen" else ""
        return f"**RAS {row['sample_ratio']}**{frozen}"
    if row["method"] == "fewer-steps":
        frozen = ", frozen text" if row["context"] == "frozen" else ""
        return f"fewer steps, the time of RAS {row['sample_ratio']}{frozen}"
    name = NAMES.get(row["method"], row["method"])
    return f"{name}, not compiled" if row.get("compiled") is False else name


def _cells(row: dict, latest: str, quantised: bool) -> list[str]:
    """The cells of a row; one that is older than the latest says so beside its name."""

    def figure(name: str, form: str) -> str:
        return "" if row.get(name) is None else form.format(row[name])

    older = f" ({row['date']})" if row.get("date") and row["date"] != latest else ""
    starts = "" if row["cold_s"] is None else f"{row['cold_s']:.0f} / {row['warm_s']:.0f}"
    floor = figure("floor_share", "{:.0%}")
    if quantised:
        floor = " / ".join([figure("error", "{:.3f}"), figure("rounding", "{:.3f}")])
    extra = "" if row.get("extra_gb") is None else f"{row['extra_gb']:.2f} / {row['cache_gb']:.2f}"
    return [
        _name(row) + older, str(row["steps"]), figure("seconds", "{:.3f}"), figure("x_compiled", "{:.2f}x"),
        figure("x_quantised" if quantised else "x_eager", "{:.2f}x"), figure("flop_ratio", "{:.3f}"), figure("dense_ms", "{:.1f}"),
        figure("sparse_ms", "{:.1f}"), floor, figure("peak_gb", "{:.1f}"), extra,
        figure("reserved_gb", "{:.1f}"), starts,
        figure("host_ms", "{:.2f}"), "" if row.get("syncs") is None else str(sum(row["syncs"].values())),
    ]  # fmt: skip


def put(page: str, text: str) -> str:
    """The page with `text` between the markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page needs the lines {BEGIN.strip()} and {END.strip()}, once each and in this order")
    before, rest = page.split(BEGIN)
    return before + BEGIN + text + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--print", action="store_true", dest="shown", help="show the tables, write nothing")
    args = parser.parse_args()
    if not args.results.exists():
        raise SystemExit(f"there is no {args.results}; examples/benchmarks/run.py writes it")
    text = tables(load(args.results))
    if args.shown:
        print(text)
    else:
        PAGE.write_text(put(PAGE.read_text(), text))


if __name__ == "__main__":
    main()
