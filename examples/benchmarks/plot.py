"""Pictures of a benchmark: seconds of every way of sampling a model, and the time of each step.

python examples/benchmarks/plot.py examples/benchmarks/results/h200.json
"""

from __future__ import annotations

import argparse
from itertools import accumulate
from pathlib import Path

from rows import load

__all__ = ["draw"]

COLOURS = {"eager": "#9aa0a6", "compile": "#4c78a8", "ras": "#e4572e", "fewer-steps": "#b6c8dd"}
OTHER = "#72b7b2"


def _label(row: dict) -> str:
    if row["sample_ratio"] is None:
        return row["method"]
    return f"{row['method']} {row['sample_ratio']}" + (" frozen" if row["context"] == "frozen" else "")


def draw(rows: list[dict], title: str, path: Path) -> None:
    """Writes one picture of one model: bars of seconds on the left, a timeline of steps on the right.

    Args:
        rows: the model's rows; those without seconds are left out.
        title: the machine, in words.
        path: where the picture goes; the suffix chooses the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["seconds"] is not None][::-1]
    figure, (bars, line) = pyplot.subplots(1, 2, figsize=(13, 0.36 * len(rows) + 1.6), sharey=True, width_ratios=(1, 2))
    labels = [_label(row) for row in rows]
    bars.barh(labels, [row["seconds"] for row in rows], color=[COLOURS.get(row["method"], OTHER) for row in rows])
    for at, row in enumerate(rows):
        times = f" {row['x_compiled']:.2f}x" if row["x_compiled"] is not None else ""
        bars.text(row["seconds"], at, f" {row['seconds']:.3g} s{times}", va="center", fontsize=8)
    bars.set(xlabel="seconds of one run, and ratio to compiled dense sampling")
    bars.set_xlim(0, 1.35 * max(row["seconds"] for row in rows))
    for at, row in enumerate(rows):
        steps = row.get("step_ms")
        if not steps:
            continue
        kinds = row.get("kinds") or "?" * len(steps)
        colours = [{"d": COLOURS["compile"], "s": COLOURS["ras"]}.get(kind, OTHER) for kind in kinds]
        starts = [0.0, *accumulate(steps)][:-1]
        line.barh([at] * len(steps), steps, left=starts, color=colours, edgecolor="white", linewidth=0.6)
    line.set(xlabel="milliseconds; each box is a step: blue dense, red sparse")
    for axes in (bars, line):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{rows[0]['model']}: {title}" if rows else title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--format", default="png")
    args = parser.parse_args()
    content = load(args.results)
    meta = content["meta"]
    if not content["rows"]:
        raise SystemExit(f"{args.results} has no rows; examples/benchmarks/run.py writes them")
    for model in dict.fromkeys(row["model"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["model"] == model]
        if any(row["seconds"] is not None for row in rows):
            path = args.results.with_name(f"{args.results.stem}-{model}.{args.format}")
            draw(rows, f"{meta.get('gpu') or 'CPU'}, torch {meta.get('torch')}, {meta.get('dtype')}", path)
            print(path)


if __name__ == "__main__":
    main()
