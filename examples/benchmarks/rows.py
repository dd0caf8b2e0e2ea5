"""Rows of a benchmark and the file that holds them: `{"meta": {...}, "rows": [{...}, ...]}`.

A row is one way of sampling one model. Its key is (model, method, sample_ratio, context); the ratio may be a preset's name.

    model                   of `sizes.py`; with a kind of `quantise.py` behind it where its linear layers are quantised
    seconds                 one run of the sampling loop, median of the repeats
    x_compiled, x_eager     how many times faster than compiled dense and eager sampling of the same number of steps
    flop_ratio              FLOPs of the run over those of a run with dense steps alone
    dense_ms, sparse_ms     median step of each kind, scheduler and guidance included
    peak_gb                 most memory allocated on the device during a run, weights included
    cold_s, warm_s          seconds of the first run that are compilation, with empty and with filled compiler caches

Further keys:

    error                   distance of the latents at the end from those of compiled dense sampling, over the size of these
    rounding                of a quantised model: likewise, from those of the same way of sampling the plain model
    x_quantised             how many times faster than compiled dense sampling of the quantised model; x_compiled and error
                            are to the plain one
    floor_share             seconds that the run's FLOPs take at FLOOR_TFLOPS, over its seconds
    extra_gb, cache_gb      peak over that of the compiled dense run; caches of the splices
    reserved_gb             peak of the memory taken from the device, pools of CUDA graphs included
    host_ms, null_ms        host time of a (sparse) call over that of a compiled function that returns at once; the latter;
                            both after a wait of 10 ms for the device, medians of a run
    launch_ms               the part of host_ms that CUDA takes to launch the graphs of a call
    syncs                   calls that wait for the device in the last three of eight steps, by name
    step_ms, kinds          median milliseconds of every step, and its kind: d(ense) or s(parse)
    runs, first_s           seconds of every repeat; of the first eight steps, whatever was compiled for them
    dense_tflop             FLOPs of a dense step / 1e12, all guidance branches
    finite                  whether the latents at the end are
    compiled                False: torch.compile failed on the way (`not_compiled` says how), it ran eagerly
    warnings, reason        warnings of ras_compile; why a row has no figures
    date                    of the measurement, starts apart
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["COLUMNS", "FLOOR_TFLOPS", "key", "load", "merge", "new_row", "save"]

# What a large bf16 product reached on one H200: the arithmetic floor of a run is its FLOPs at this rate.
FLOOR_TFLOPS = 780
KEY = ("model", "method", "sample_ratio", "context")
COLUMNS = (
    *KEY, "steps", "seconds", "x_compiled", "x_eager", "flop_ratio", "dense_ms", "sparse_ms", "peak_gb", "cold_s",
    "warm_s",
)  # fmt: skip
# Taken in processes of their own: a later measurement of speed alone must not lose them.
STARTS = ("cold_s", "warm_s")
# A file has figures of one device and one set of versions.
SAME = ("gpu", "torch", "cuda", "triton", "diffusers", "size", "dtype")


def new_row(
    model: str, method: str, sample_ratio: float | str | None = None, context: str | None = None, **more: Any
) -> dict:
    """A row with every column, None where nothing is known yet."""
    row = dict.fromkeys(COLUMNS) | dict(model=model, method=method, sample_ratio=sample_ratio, context=context)
    return row | more


def key(row: dict) -> tuple:
    return tuple(row.get(name) for name in KEY)


def load(path: Path) -> dict:
    """The file's content; an empty one where there is no file."""
    return json.loads(path.read_text()) if path.exists() else {"meta": {}, "rows": []}


def save(path: Path, content: dict) -> None:
    """Writes the file in one go, one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join("  " + json.dumps(_rounded(row)) for row in content["rows"])
    meta = json.dumps(content["meta"], indent=1).replace("\n", "\n ")
    fresh = path.with_suffix(".part")
    fresh.write_text(f'{{\n "meta": {meta},\n "rows": [\n{rows}\n ]\n}}\n')
    fresh.replace(path)


def _rounded(value: Any) -> Any:
    """Floats at five digits: no measurement here is better than that."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return {name: _rounded(part) for name, part in value.items()} if isinstance(value, dict) else value


def merge(old: dict, new: dict) -> dict:
    """`new` put over `old`, row by row; rows of one model and method stand together, and what `new` did not measure of
    `STARTS` stays.

    Raises:
        ValueError: the two come from different devices or versions.
    """
    for name in SAME:
        before, now = old["meta"].get(name), new["meta"].get(name)
        if old["rows"] and before != now:
            raise ValueError(
                f"the file to merge into was measured with {name} {before!r}, this run with {now!r}; "
                "write to another folder, or without --merge"
            )
    rows = {key(row): row for row in old["rows"]}
    for row in new["rows"]:
        before = rows.get(key(row), {})
        kept = {name: before.get(name) for name in STARTS if row.get(name) is None}
        starts_only = row.get("starts_only")
        rows[key(row)] = before | {name: row[name] for name in STARTS} if starts_only and before else row | kept
    commands = [*old["meta"].get("commands", []), *new["meta"].get("commands", [])]
    return {"meta": {**old["meta"], **new["meta"], "commands": commands}, "rows": _in_order(list(rows.values()))}


def _in_order(rows: list[dict]) -> list[dict]:
    """By model and method, in the order in which these first appear, then by context, the largest ratio first, then presets."""
    models, methods = (list(dict.fromkeys(row[name] for row in rows)) for name in ("model", "method"))
    return sorted(
        rows,
        key=lambda row: (
            models.index(row["model"]),
            methods.index(row["method"]),
            row["context"] or "",
            (1.0, row["sample_ratio"]) if isinstance(row["sample_ratio"], str) else (-(row["sample_ratio"] or 0), ""),
        ),
    )
