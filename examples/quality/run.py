"""Proof of quality: draw n pictures for each setting of a table, and measure them.

    python examples/emoji/data.py --cache .cache/emoji           # once: the artwork that real pictures are made of
    python examples/quality/run.py --table a --n 5000 --out examples/quality/results

Settings that the JSON has already are not drawn again: a run that was stopped goes on where it was. Noise and captions
of picture i depend on i alone, so all settings are paired; figures come out again within their intervals.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import measure
import torch
from measure import EMOJI, Distances, Facts, Looks, likeness, look, ndcg, summary
from others import METHODS, module_flops
from sampler import Drawn, Sampler
from settings import EXACT_STEPS, GUIDANCE, REFERENCE_STEPS, TABLES, Setting, settings
from torch import Tensor
from tqdm import tqdm

import ras_compile
from ras_compile.config import RUNTIME_OPTIONS
from ras_compile.errors import RASError
from ras_compile.passes.analysis.cost import ACTIVE, Cost

COMPARED = ("alignment", "accuracy", "psnr", "ssim", "psnr_exact")  # picture by picture, with the default's
PROMPT_SEED, REAL_SEED, FLOOR_SEED = 2024, 1, 2


class Results:
    """A table's JSON, and the per-picture scores beside it.

    Args:
        folder: where they are.
        table: a name in `settings.TABLES`.
        run: what makes rows comparable; another run's file is refused.

    Raises:
        ValueError: the file is of another run.
    """

    def __init__(self, folder: Path, table: str, run: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.scores_file = folder / f"table_{table}.json", folder / f"table_{table}_scores.pt"
        self.content: dict[str, Any] = {"meta": {"run": run}, "rows": []}
        self.scores: dict[str, dict[str, Tensor]] = {}
        if self.file.exists():
            self.content = json.loads(self.file.read_text())
            before = self.content["meta"]["run"]
            if before != run:
                changed = [name for name in run if before.get(name) != run[name]]
                raise ValueError(
                    f"{self.file} is of another run ({', '.join(f'{n}={before.get(n)!r}' for n in changed)}); "
                    "take those arguments or another --out"
                )
        if self.scores_file.exists():
            self.scores = torch.load(self.scores_file, weights_only=True)

    @property
    def keys(self) -> set[str]:
        """Rows that are done."""
        return {row["key"] for row in self.content["rows"]}

    def add(self, row: dict[str, Any], scores: dict[str, Tensor]) -> None:
        """One more row, and its scores per picture; both are on the disk when this returns."""
        self.content["rows"].append(row)
        self.scores[row["key"]] = {name: scores[name].float().cpu() for name in COMPARED if name in scores}
        self.save()

    def save(self) -> None:
        """Write both files; a reader never finds half of one."""
        partial = self.scores_file.with_suffix(".tmp")
        torch.save(self.scores, partial)
        partial.replace(self.scores_file)
        partial = self.file.with_suffix(".tmp")
        partial.write_text(json.dumps(rounded(self.content), indent=1) + "\n")
        partial.replace(self.file)


def rounded(value: Any) -> Any:
    """Numbers to six digits; what is no number (an interval of one picture) becomes null."""
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value


class Prices:
    """FLOPs of one picture, from the compiler's own cost model."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._costs: dict[str, Cost] = {}

    def __call__(self, steps: int, options: dict[str, Any], kinds: list[tuple[str, int]]) -> float:
        """FLOPs of `steps` guided steps of the transformer for one picture; `kinds` says (kind, active tokens) of each."""
        fixed = {name: value for name, value in options.items() if name not in RUNTIME_OPTIONS}
        cost = self._cost(fixed)
        if not kinds:
            return float(steps * cost.dense_flops)
        sparse = {active: float(cost.sparse_flops.subs(ACTIVE, active)) for _, active in kinds}
        return sum(sparse[active] if kind == "sparse" else cost.dense_flops for kind, active in kinds)

    def _cost(self, fixed: dict[str, Any]) -> Cost:
        key = repr(sorted(fixed.items()))
        if key not in self._costs:
            model = self._sampler.plain
            found = ras_compile.explain(model, options=fixed, **self._sampler.one_call())
            if found.cost is None:
                raise RuntimeError(f"the model is not supported: {found.reason}")
            self._costs[key] = found.cost
        return self._costs[key]


class Bench:
    """Everything that the settings of a table share: captions, real pictures, the judge, dense and exact pictures."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, device = args, args.device
        if not (args.cache / "atlas.json").exists():
            raise FileNotFoundError(
                f"{args.cache} has no artwork for real pictures: python examples/emoji/data.py --cache {args.cache}"
            )

        scenes = measure.scenes_of(args.n, PROMPT_SEED)
        self.facts = measure.facts_of(scenes, device)
        self.judge = measure.load(EMOJI / "judge.safetensors", device)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.sampler = Sampler([s.caption for s in scenes], args.batch, device, dtype, args.inner_backend, GUIDANCE)
        real = partial(self.sampler.kind.real, args.cache, device=device, batch=args.batch)
        pictures, facts = real(args.real, REAL_SEED)
        self.distances = Distances.to(self.look(pictures, facts), facts)
        self.floor = real(args.n, FLOOR_SEED)
        self.prices = Prices(self.sampler)
        self.prices(1, {}, [])
        self.dense: Drawn | None = None
        self.exact: Tensor | None = None
        self.ranks: list[dict[str, Any]] = []
        self.layers: dict[str, int] = {}

    def look(self, pictures: Tensor, facts: Facts) -> Looks:
        """What the judge sees."""
        return look(self.judge, pictures, facts, self.args.batch)

    def references(self, bar: tqdm) -> None:
        """Draw the dense pictures that all others are compared with, and the first of them in 200 steps."""
        noises: list[Tensor] = []

        def keep(step: int, noise: Tensor) -> None:
            if step < len(noises):  # the first batch may run twice
                return
            noises.append(noise.float())

        bar.set_description(f"dense, {REFERENCE_STEPS} steps (reference)")
        self.dense = self.sampler.dense(self.args.n, REFERENCE_STEPS, on_step=keep)
        self.ranks = rankings(torch.stack(noises), GUIDANCE)
        bar.set_description(f"dense, {EXACT_STEPS} steps (reference)")
        euler = self.sampler.scheduler("euler")
        parts = [
            self.sampler.one_batch(self.sampler.plain, euler, at, EXACT_STEPS)[0]
            for at in range(0, self.args.exact, self.args.batch)
        ]
        self.exact = torch.cat(parts)[: self.args.exact] if parts else None

    def draw(self, setting: Setting, bar: tqdm) -> Drawn:
        """The pictures of one setting."""
        count = self.args.n
        if setting.method == "RAS":
            return self.sampler.adaptive(count, setting.steps, ras_options(setting), setting.sampler, bar.update)
        if setting.method in METHODS:
            return self.other(setting, bar)
        if (setting.steps, setting.sampler) == (REFERENCE_STEPS, "euler"):
            assert self.dense is not None
            bar.update(count)
            return self.dense
        return self.sampler.dense(count, setting.steps, setting.sampler, bar=bar.update)

    def other(self, setting: Setting, bar: tqdm) -> Drawn:
        """The pictures of a method that skips layers."""
        plain = self.sampler.plain
        self.layers = self.layers or module_flops(plain, self.sampler.one_call())
        model = METHODS[setting.method](plain, self.args.inner_backend, setting.steps, **setting.options)
        scheduler = self.sampler.scheduler(setting.sampler)
        drawn = self.sampler.draw(model, scheduler, self.args.n, setting.steps, bar=bar.update, around=model.around)
        drawn.flops = model.flops(setting.steps, self.layers)
        return drawn

    def row(self, setting: Setting, drawn: Drawn) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The row of a setting, and its scores per picture."""
        looks = self.look(drawn.pictures, self.facts)
        scored = dict(looks.scores)
        assert self.dense is not None
        if drawn is not self.dense:
            scored |= likeness(drawn.pictures, self.dense.pictures, self.args.batch)
        if self.exact is not None:
            exact = likeness(drawn.pictures[: len(self.exact)], self.exact, self.args.batch)
            scored |= {f"{name}_exact": values for name, values in exact.items()}
        options = {name: value for name, value in setting.options.items() if name != "sample_ratio"}
        return {
            "key": setting.key, "method": setting.method, "sampler": setting.sampler, "steps": setting.steps,
            "sample_ratio": setting.ratio, "variant": setting.variant, "default": setting.default,
            "options": {name: value if _json(value) else getattr(value, "__name__", type(value).__name__)
                        for name, value in options.items()},
            "dense_steps": sum(kind == "dense" for kind, _ in drawn.kinds) if drawn.kinds else setting.steps,
            "flops": drawn.flops or self.prices(setting.steps, ras_options(setting), drawn.kinds),
            "seconds": drawn.seconds, "decode_seconds": drawn.decode_seconds, "first_batch_seconds": drawn.first,
            "n": len(drawn.pictures), **summary(looks, scored, self.facts, self.distances),
        }, scored  # fmt: skip

    def real_rows(self) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
        """Floors: real held-out pictures other than the reference's, and the same through the autoencoder."""
        pictures, facts = self.floor
        rows = []
        for method, shown in (("real", pictures), ("real, autoencoded", self.sampler.reconstructed(pictures))):
            looks = self.look(shown, facts)
            head = {"key": method, "method": method, "steps": 0, "sample_ratio": 1.0, "flops": 0, "seconds": 0.0}
            rows.append((head | {"n": len(shown)} | summary(looks, looks.scores, facts, self.distances), looks.scores))
        return rows


def ras_options(setting: Setting) -> dict[str, Any]:
    """Options of region-adaptive sampling; none for other methods."""
    return dict(setting.options) if setting.method == "RAS" else {}


def _json(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, tuple))


def rankings(noises: Tensor, guidance: float) -> list[dict[str, Any]]:
    """How well a step's ranking of the tokens predicts the next one's (paper, figure 3): NDCG of adjacent steps.

    Args:
        noises: [steps, 2 b, c, h, w], uncond and cond.
        guidance: of the guided noise.

    Returns:
        Per pair of steps: mean over pictures and interval for the standard deviation and the norm over channels, of the
        mean of both branches' metrics ("std", "l2norm") and of the guided noise ("std_guided").
    """
    uncond, cond = noises.flatten(3).chunk(2, dim=1)  # [steps, b, c, n]
    guided = uncond + guidance * (cond - uncond)
    metrics = {
        "std": (uncond.std(2, correction=0) + cond.std(2, correction=0)) / 2,
        "l2norm": (uncond.norm(dim=2) + cond.norm(dim=2)) / 2,
        "std_guided": guided.std(2, correction=0),
    }
    rows = []
    for step in range(len(noises) - 1):
        row: dict[str, Any] = {"step": step}
        for name, metric in metrics.items():
            row |= measure.described(ndcg(metric[step], metric[step + 1]), name)
            chance = metric[step].new_empty(metric[step].shape).uniform_(generator=_generator(metric.device, step))
            row |= measure.described(ndcg(chance, metric[step + 1]), f"{name}_random")
        rows.append(row)
    return rows


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def compared(scores: dict[str, Tensor], default: dict[str, Tensor]) -> dict[str, Any]:
    """Mean differences to the default's pictures of the same noise, with intervals."""
    row: dict[str, Any] = {}
    for name in COMPARED:
        if name in scores and name in default:
            row |= measure.described(scores[name].float().cpu() - default[name], f"{name}_minus_default")
    return row


def machine(device: str) -> dict[str, Any]:
    """Where this runs."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    return {"device": name, "torch": torch.__version__, "diffusers": diffusers.__version__}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, choices=tuple(TABLES))
    parser.add_argument("--n", type=int, default=5000, help="pictures per setting")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--batch", type=int, default=500, help="pictures at once; guidance doubles them")
    parser.add_argument("--exact", type=int, help="pictures of the 200-step solution (default: one batch; 0: none)")
    parser.add_argument("--real", type=int, default=10000, help="real pictures in the reference")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no setting begins")
    parser.add_argument("--only", default="", help="regular expression: settings whose key has it")
    parser.add_argument("--list", action="store_true", help="name the settings and stop")
    parser.add_argument("--cache", type=Path, default=Path(".cache/emoji"), help="folder of examples/emoji/data.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner-backend", default="inductor")
    args = parser.parse_args(argv)
    args.batch = min(args.batch, args.n)
    args.exact = min(args.n, args.batch if args.exact is None else args.exact)
    return args


def main(argv: list[str] | None = None) -> None:
    """Draws and measures what is missing of a table."""
    begin = time.monotonic()
    args = arguments(argv)
    chosen = [setting for setting in settings(args.table) if re.search(args.only, setting.key)]
    if args.list:
        print("\n".join(setting.key for setting in chosen))
        return
    run = {"n": args.n, "batch": args.batch, "exact": args.exact, "real": args.real, "guidance": GUIDANCE}
    run |= machine(args.device) | {"inner_backend": args.inner_backend}
    results = Results(args.out, args.table, run)
    todo = [setting for setting in chosen if setting.key not in results.keys]
    if not todo:
        print(f"{results.file} has every setting")
        return
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # past it, models would run uncompiled without a word
    bench = Bench(args)
    with tqdm(total=len(todo) * args.n, unit="picture", smoothing=0) as bar:
        bench.references(bar)
        results.content["meta"]["ndcg"] = bench.ranks
        results.content["meta"]["about"] = ABOUT
        for row, scores in bench.real_rows() if "real" not in results.keys else []:
            results.add(row, scores)
        slowest = 0.0  # seconds per picture and step
        for setting in todo:
            if time.monotonic() - begin + slowest * setting.steps * args.n > args.budget:
                bar.write(f"left for another run, the budget is used up: {setting.key}")
                continue
            bar.set_description(setting.key)
            started = time.monotonic()
            try:
                drawn = bench.draw(setting, bar)
            except Exception as error:
                # an option that this version does not have, or another library's method that fails on this model
                if setting.method not in METHODS and not isinstance(error, RASError):
                    raise
                bar.write(f"left out, {setting.key}: {error}")
                bench.sampler.detach()
                continue
            row, scores = bench.row(setting, drawn)
            if setting.default in results.scores:
                row |= compared(scores, results.scores[setting.default])
            row["took"] = time.monotonic() - started
            slowest = max(slowest, drawn.seconds / setting.steps)
            results.add(row, scores)
            bar.write(f"{setting.key}: " + ", ".join(f"{name} {row[name]:.4g}" for name in SHOWN if name in row))
    bench.sampler.detach()


SHOWN = ("fid", "sfid", "alignment", "accuracy", "psnr", "ssim", "psnr_exact", "seconds", "took")
ABOUT = {
    "fid, sfid": "Frechet distances to real held-out pictures in the feature space of the repository's judge network (256 "
    "features; 7 x 8 x 8 of its trunk), not Inception's, in per cent of the real features' variance",
    "alignment": "mean log-probability (nats) that the judge gives to the caption's facts",
    "psnr, ssim": "against the dense picture of 28 Euler steps from the same noise; *_exact against 200 Euler steps",
    "*_5th": "5th percentile over pictures",
    "*_ci": "95 % interval over seeds: bootstrap for means and percentiles, delete-a-group jackknife for distances",
    "seconds": "transformer and scheduler, per picture, median batch after the first one",
    "flops": "transformer, per picture with guidance, two per multiply-add",
}

if __name__ == "__main__":
    main()
