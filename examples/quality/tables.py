"""The quality tables as a page: JSON in, `README.md` and plots out.

    python examples/quality/tables.py --results examples/quality/results

The words come from `report.md`, which people write; a line `{{table a}}`, `{{compared a}}`, `{{backgrounds a}}`, `{{pareto a}}`,
`{{ranking a}}` or `{{run a}}` there becomes the table or plot of that name, where `table_a.json` exists, and
`{{frontier emoji}}` becomes the table of `frontier_emoji.json`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
NOTHING = "–"
MARK = re.compile(r"^\{\{(\w+) (\w+)\}\}$", re.MULTILINE)

# heading -> (key, factor, digits after the point)
QUALITY = {
    "FID": ("fid", 1, 2),
    "sFID": ("sfid", 1, 2),
    "alignment": ("alignment", 1, 3),
    "5th pct.": ("alignment_5th", 1, 2),
    "all right %": ("accuracy", 100, 1),
    "one %": ("one", 100, 1),
    "position %": ("position", 100, 1),
    "count %": ("count", 100, 1),
    "colour %": ("colour", 100, 1),
    "number %": ("number", 100, 1),
    "PSNR dB": ("psnr", 1, 2),
    "5th pct. dB": ("psnr_5th", 1, 2),
    "SSIM": ("ssim", 1, 3),
    "PSNR to 200 steps": ("psnr_exact", 1, 2),
    "5th pct. to 200": ("psnr_exact_5th", 1, 2),
}
FRONTIER = {
    "right %": ("accuracy", 100, 1),
    "FID": ("fid", 1, 2),
    "sFID": ("sfid", 1, 2),
    "alignment": ("alignment", 1, 3),
    "PSNR dB": ("psnr", 1, 2),
    "5th pct. dB": ("psnr_5th", 1, 2),
    "SSIM": ("ssim", 1, 3),
    "5th pct.": ("ssim_5th", 1, 3),
}
DIFFERENCE = {
    "FID": ("fid", 1, 2),
    "sFID": ("sfid", 1, 2),
    "Δ alignment": ("alignment_minus_default", 1, 3),
    "Δ all right %": ("accuracy_minus_default", 100, 1),
    "Δ PSNR dB": ("psnr_minus_default", 1, 2),
    "Δ SSIM": ("ssim_minus_default", 1, 4),
    "Δ PSNR to 200 steps": ("psnr_exact_minus_default", 1, 2),
    "PSNR dB": ("psnr", 1, 2),
    "5th pct. dB": ("psnr_5th", 1, 2),
    "alignment": ("alignment", 1, 3),
}


def cell(row: Row, key: str, factor: float = 1, digits: int = 2) -> str:
    """A figure with half of its 95 % interval; a difference to the default in bold where the interval leaves out 0."""
    value, span = row.get(key), row.get(f"{key}_ci")
    if value is None:
        return NOTHING
    text = f"{factor * value:.{digits}f}"
    if key.endswith("_minus_default"):
        text = f"{factor * value:+.{digits}f}"
    if span and None not in span:
        text += f" ± {factor * (span[1] - span[0]) / 2:.{digits}f}"
        if key.endswith("_minus_default") and span[0] * span[1] > 0:
            text = f"**{text}**"
    return text


def method(row: Row) -> str:
    """What a row is, in words."""
    name = row["method"]
    if name == "RAS":
        name = f"RAS {row['sample_ratio']:.1%}"
    if row.get("sampler", "euler") != "euler":
        name += f", {row['sampler']}"
    return name if row.get("variant", "default") == "default" else f"{name}, {row['variant']}"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(content: Row, columns: dict[str, tuple[str, float, int]]) -> str:
    """All rows of a table: what it is, what it cost, and the columns that any row has."""
    used = {head: column for head, column in columns.items() if any(column[0] in row for row in content["rows"])}
    rows = []
    for row in _ordered(content["rows"]):
        cost = [f"{row['flops'] / 1e9:.0f}", f"{1e3 * row['seconds']:.2f}"] if row["flops"] else [NOTHING] * 2
        steps = str(row["steps"]) if row["steps"] else NOTHING
        rows.append([method(row), steps, *cost, *(cell(row, *column) for column in used.values())])
    return markdown(["method", "steps", "GFLOPs", "ms", *used], rows)


def by_background(content: Row) -> str:
    """Flat and textured scenes apart."""
    columns = {"FID": ("fid", 1, 2), "all right %": ("accuracy", 100, 1), "alignment": ("alignment", 1, 3)}
    columns |= {"PSNR dB": ("psnr", 1, 2), "5th pct. dB": ("psnr_5th", 1, 2), "SSIM": ("ssim", 1, 3)}
    rows = [
        [method(row), str(row["steps"]) if row["steps"] else NOTHING]
        + [cell(row.get(part, {}), *column) for column in columns.values() for part in ("flat", "textured")]
        for row in _ordered(content["rows"])
    ]
    heads = [f"{head}, {part}" for head in columns for part in ("flat", "textured")]
    return markdown(["method", "steps", *heads], rows)


def _ordered(rows: list[Row]) -> list[Row]:
    """By method, then by cost; what is real comes first."""
    groups = list(dict.fromkeys((bool(row["flops"]), row["method"] == "RAS", row.get("sampler", "")) for row in rows))
    return sorted(
        rows,
        key=lambda row: (
            groups.index((bool(row["flops"]), row["method"] == "RAS", row.get("sampler", ""))),
            -row["sample_ratio"],
            row["method"],
            -row["steps"],
        ),
    )


def compared(content: Row) -> str:
    """Rows that take one thing away or change it, each group under its default; others by seconds."""
    rows = content["rows"]
    parts = []
    for default in (row for row in rows if any(other.get("default") == row["key"] for other in rows)):
        group = [default] + [row for row in rows if row.get("default") == default["key"]]
        used = {head: column for head, column in DIFFERENCE.items() if any(column[0] in row for row in group)}
        lines = [
            [
                row["variant"] if row["method"] == "RAS" else method(row),
                f"{row['flops'] / 1e9:.0f}",
                f"{1e3 * row['seconds']:.2f}",
                *(cell(row, *column) for column in used.values()),
            ]
            for row in group
        ]
        parts.append(f"**{default['key']}**\n\n" + markdown(["variant", "GFLOPs", "ms", *used], lines))
    rest = [row for row in rows if not row.get("default") and row["method"] != "RAS"]
    return "\n\n".join([*parts, table({"rows": rest}, QUALITY)])


def frontier(content: Row) -> str:
    """All ways of sampling by their time, region-adaptive ones in bold; how it was run; what failed."""
    run, done = content["meta"], [row for row in content["rows"] if "failed" not in row]
    used = {head: column for head, column in FRONTIER.items() if any(column[0] in row for row in done)}
    lines = []
    for row in sorted(done, key=lambda row: row["ms"]):
        name = row["key"].replace(f", {row['steps']} steps", "")
        name = f"**{name}**" if row["method"] == "RAS" else name
        lines.append([name, str(row["steps"]), f"{row['ms']:.2f}", *(cell(row, *column) for column in used.values())])
    words = (
        f"{run['n']} pictures a row in batches of {run['batch']}, {run['device']}, torch {run['torch']}, diffusers "
        f"{run['diffusers']}; PSNR and SSIM to {run['exact_steps']} steps for the first {run['exact']} pictures."
    )
    words += f" Note: {run['note']}." if "note" in run else ""
    failed = [f"- {row['key']}: {row['failed']}" for row in content["rows"] if "failed" in row]
    if failed:
        words += "\n\nNot measured:\n\n" + "\n".join(failed)
    return markdown(["way", "steps", "ms", *used], lines) + "\n\n" + words


def front(points: Sequence[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """The points (cost, quality) that no cheaper point equals, by cost."""
    best, kept = float("-inf"), []
    for cost, quality in sorted(points, key=lambda point: (point[0], -point[1] if higher else point[1])):
        worth = quality if higher else -quality
        if worth > best:
            best = worth
            kept.append((cost, quality))
    return kept


def pareto(content: Row, file: Path) -> None:
    """Quality against cost for every way of sampling, with the Pareto front."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series: dict[str, list[Row]] = {}
    for row in content["rows"]:
        if row["flops"]:
            name = row["method"] if row["method"] != "RAS" else f"RAS {row['sample_ratio']:.1%}"
            series.setdefault(name + (f" {row['sampler']}" if row["sampler"] != "euler" else ""), []).append(row)
    costs = {"flops": ("GFLOPs per picture", 1e-9), "seconds": ("milliseconds per picture", 1e3)}
    measures = {"fid": ("FID (judge's features)", False), "alignment": ("alignment (nats)", True)}
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained")
    for line, (measure, (label, higher)) in zip(axes, measures.items(), strict=True):
        for axis, (cost, (unit, factor)) in zip(line, costs.items(), strict=True):
            points = []
            for name, rows in series.items():
                rows = sorted(rows, key=lambda row: row[cost])
                x, y = [row[cost] * factor for row in rows], [row[measure] for row in rows]
                points += list(zip(x, y, strict=True))
                spans = [row.get(f"{measure}_ci") or [None] for row in rows]
                error = [0 if None in span else (span[1] - span[0]) / 2 for span in spans]
                dashed = "-" if name.startswith("RAS") else "--"
                axis.errorbar(x, y, error, label=name, marker="o", markersize=4, linestyle=dashed, linewidth=1)
                for row, a, b in zip(rows, x, y, strict=True):
                    axis.annotate(str(row["steps"]), (a, b), fontsize=6, xytext=(3, 3), textcoords="offset points")
            best = front(points, higher)
            axis.step(
                *zip(*best, strict=True), where="post", color="black", linewidth=3, alpha=0.2, label="Pareto front"
            )
            axis.set(xlabel=unit, ylabel=label, xscale="log", yscale="linear" if higher else "log")
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def ranking(content: Row, file: Path) -> None:
    """NDCG of a step's ranking of the tokens for the next step's (paper, figure 3), beside that of random rankings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = content["meta"]["ndcg"]
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name in ("std", "l2norm", "std_guided"):
        (line,) = axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=name.replace("_", ", "))
        random = [row[f"{name}_random"] for row in rows]
        axis.plot([row["step"] for row in rows], random, color=line.get_color(), linestyle=":")
    axis.set(xlabel="step", ylabel="NDCG for the step after it (dotted: random)")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def run_of(content: Row) -> str:
    """How the figures were taken, and what they mean."""
    run = content["meta"]["run"]
    first = (
        f"{run['n']} pictures a setting in batches of {run['batch']}, {run['device']}, torch {run['torch']}, diffusers "
        f"{run['diffusers']}; {run['real']} real pictures; 200 steps for the first {run['exact']} pictures."
    )
    return "\n".join([first, "", *(f"- `{name}`: {text}." for name, text in content["meta"].get("about", {}).items())])


def page(template: str, results: Path) -> str:
    """The template with its marks replaced; a table that has not been run yet says so.

    Raises:
        ValueError: a mark names no part of a page.
    """
    tables: dict[str, Callable[[Row], str]] = {
        "table": lambda content: table(content, QUALITY),
        "compared": compared,
        "backgrounds": by_background,
        "frontier": frontier,
        "run": run_of,
    }
    plots: dict[str, Callable[[Row, Path], None]] = {"pareto": pareto, "ranking": ranking}

    def replaced(mark: re.Match[str]) -> str:
        part, name = mark.groups()
        if part not in tables and part not in plots:
            raise ValueError(f"{mark[0]} is no part of a page; there are {', '.join([*tables, *plots])}")
        kind = "frontier" if part == "frontier" else "table"
        file = results / f"{kind}_{name}.json"
        if not file.exists():
            return f"*({kind} {name} has not been run)*"
        content = json.loads(file.read_text())
        if part in tables:
            return tables[part](content)
        plots[part](content, results / f"{part}_{name}.png")
        return f"![{part}]({part}_{name}.png)"

    return MARK.sub(replaced, template)


def main(argv: list[str] | None = None) -> None:
    """Writes `README.md` and its plots."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=here / "results", help="folder of table_*.json and frontier_*.json"
    )
    parser.add_argument("--template", type=Path, default=here / "report.md")
    args = parser.parse_args(argv)
    text = page(args.template.read_text(), args.results)
    (args.results / "README.md").write_text(text)
    print(args.results / "README.md")


if __name__ == "__main__":
    main()
