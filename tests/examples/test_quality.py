"""The quality tables: statistics against references of their own, paired noise, resuming, other methods, pages."""

from __future__ import annotations

import itertools
import json
import math
import sys
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from scripts import EXAMPLES, load

import ras_compile
from ras_compile.config import fitting
from ras_compile.sampling.schedule import Schedule
from ras_compile.sampling.selection import SelectionInfo, expected

names = ("data", "measure", "models", "others", "rules", "run", "sampler", "settings", "tables", "objects", "frontier")
data, measure, models, others, rules, run, sampler, chosen, tables, objects, frontier = load(
    ["quality", "emoji"], names
)
Sampler, scheduler_of, OBJECTS = sampler.Sampler, models.scheduler_of, objects.OBJECTS


def test_distance_is_that_of_the_formula():
    real, fake = torch.rand(90, 6).double() * 3, torch.rand(70, 6).double() + torch.arange(6) / 9
    cov = [np.cov(x.numpy().T) for x in (real, fake)]
    gap = (real.mean(0) - fake.mean(0)).square().sum().item()
    want = gap + np.trace(cov[0] + cov[1] - 2 * scipy.linalg.sqrtm(cov[0] @ cov[1]).real)
    want *= 100 / np.trace(cov[0])
    distance = measure.Distance(real)
    assert distance(fake) == pytest.approx(want, rel=1e-6)
    assert distance.of(*measure.moments(fake * distance.scale)).item() == pytest.approx(want, rel=1e-6)
    low, high = distance.interval(fake, distance(fake))
    assert low < want < high


def test_jackknife_of_a_mean_is_its_standard_error():
    values = torch.randn(measure.GROUPS, 7)
    left = torch.stack([values[torch.arange(measure.GROUPS) != group].mean() for group in range(measure.GROUPS)])
    low, high = measure.jackknifed(left, values.mean().item())
    error = values.mean(1).std().item() / measure.GROUPS**0.5
    assert (high - low) / 2 == pytest.approx(measure.STUDENT * error, rel=1e-4)
    assert (high + low) / 2 == pytest.approx(values.mean().item(), abs=1e-6)


def test_bootstrap_of_a_mean_is_near_the_normal_interval():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 3 + 1
    row = measure.described(torch.cat((values, torch.tensor([math.nan]))), "x", fifth=True)
    low, high = row["x_ci"]
    assert low < row["x"] < high
    assert high - low == pytest.approx(2 * 1.96 * 3 / 2000**0.5, rel=0.2)
    assert row["x_5th"] == pytest.approx(1 - 1.645 * 3, abs=0.4)
    assert row["x_5th_ci"][0] <= row["x_5th"] <= row["x_5th_ci"][1]
    assert measure.described(torch.tensor([math.nan]), "x") == {}


def test_ndcg_is_that_of_the_definition():
    relevance, scores = torch.rand(2, 3, 20)
    for row, found in enumerate(measure.ndcg(scores, relevance).tolist()):
        order = scores[row].argsort(descending=True).tolist()
        best = relevance[row].sort(descending=True).values.tolist()
        gain = sum(relevance[row, index].item() / math.log2(place + 2) for place, index in enumerate(order))
        assert found == pytest.approx(gain / sum(x / math.log2(i + 2) for i, x in enumerate(best)), rel=1e-6)
    assert measure.ndcg(relevance, relevance).tolist() == pytest.approx([1.0] * 3)


def test_likeness_of_uint8_pictures():
    first = torch.full((3, 3, 16, 16), 100, dtype=torch.uint8)
    second = first.clone()
    second[1] += 10
    second[2] -= 100  # a difference of uint8 would wrap
    found = measure.likeness(first, second, batch=2)
    assert found["psnr"].tolist() == pytest.approx([99.0, 20 * math.log10(25.5), 20 * math.log10(2.55)], abs=1e-3)
    assert found["ssim"][0] == pytest.approx(1.0) and found["ssim"][2] < 0.1


def test_scores_say_which_task_failed():
    scenes = measure.scenes_of(60, 3)
    facts = measure.facts_of(scenes, "cpu")
    logits = {}
    for name, want in measure.targets(facts).items():
        classes = {"item": len(OBJECTS) + 1, "colour": 8, "background": 10, "fill": 10}.get(name, 11)
        logits[name] = 20.0 * torch.nn.functional.one_hot(want, classes).float()
    right = measure.scores(logits, facts)
    assert right["accuracy"].all() and right["alignment"].min() > -1e-4
    kinds = torch.stack([~right[name].isnan() for name in ("one", "position", "count")])
    assert kinds.sum(0).eq(1).all() and kinds.any(1).all()
    assert [bool(x) for x in ~right["number"].isnan()] == [scene.number is not None for scene in scenes]

    logits["ones"] = logits["ones"].roll(1, -1)
    wrong = measure.scores(logits, facts)
    numbered = facts["number"] >= 0
    assert torch.equal(wrong["number"][numbered], torch.zeros(int(numbered.sum())))
    assert torch.equal(wrong["one"].nan_to_num(2), right["one"].nan_to_num(2))
    assert (wrong["alignment"] < right["alignment"] - 1)[numbered].all()


def test_captions_do_not_depend_on_how_many_there_are():
    assert measure.scenes_of(130, 1)[:105] == measure.scenes_of(105, 1)
    assert measure.scenes_of(5, 1) != measure.scenes_of(5, 2)


@pytest.mark.parametrize("table", chosen.TABLES)
def test_settings_are_distinct_and_their_options_exist(table):
    rows = chosen.settings(table)
    keys = [row.key for row in rows]
    assert len(keys) == len(set(keys))
    for place, row in enumerate(rows):
        assert not row.default or row.default in keys[:place]
        if row.method == "RAS":
            ras_compile.RASConfig(**row.options)
        else:
            assert row.method == "dense" or row.method in others.METHODS
    with pytest.raises(ValueError, match="not one of a, b, c, options"):
        chosen.settings("d")


@cache
def drawer(batch: int = 2) -> Sampler:
    return Sampler(["a red apple", "a cat above a tree on a striped blue background", "two dogs"], batch, "cpu",
                   torch.float32, "eager")  # fmt: skip


def test_pictures_are_those_of_the_pipeline():
    drawn = drawer().dense(1, 2)
    pictures = drawer().pipe(
        "a red apple", num_inference_steps=2, guidance_scale=4.0, max_sequence_length=1, latents=drawer().noise[:1],
        output_type="pt",
    ).images  # fmt: skip
    assert (drawn.pictures - pictures * 255).abs().max() < 0.51
    assert drawn.pictures.dtype == torch.uint8 and drawn.pictures.float().std() > 20


@pytest.mark.parametrize("name", ["even", "unipc", "dpm++"])
def test_solvers_end_at_no_noise(name):
    scheduler = scheduler_of(name, 3.0)
    scheduler.set_timesteps(5)
    assert scheduler.sigmas[-1] == 0
    assert scheduler.sigmas[-2] > 0.4  # the pipeline's own: 0.009
    assert scheduler.sigmas[:-1].tolist() == pytest.approx([1, 0.923, 0.818, 0.667, 0.429], abs=1e-3)
    with pytest.raises(ValueError, match="not one of euler"):
        scheduler_of("heun", 3.0)


def small():
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2,
        attention_head_dim=16, caption_projection_dim=32, joint_attention_dim=24, pooled_projection_dim=12,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip
    for weight in model.parameters():  # heads that start at zero would hide everything
        torch.nn.init.normal_(weight, std=0.2)
    return model


def call(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, 24), "pooled_projections": (2, 12)}
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**given, "timestep": torch.tensor([500.0, 500.0]), "return_dict": False}


@torch.no_grad()
def test_attention_is_reused_whole():
    plain = small()
    model = others.METHODS["attention reuse"](plain, "eager", 4, warmup=1, every=2)
    with model.around():
        found = [model(**call(seed))[0] for seed in range(4)]
        runs = dict(model.runs)
    same = [torch.equal(noise, plain(**call(seed))[0]) for seed, noise in enumerate(found)]
    assert same == [True, False, False, True]
    assert list(runs) == [f"transformer_blocks.{index}.attn" for index in range(3)] and set(runs.values()) == {2}
    with model.around():  # nothing is left of the batch before
        assert torch.equal(model(**call(5))[0], plain(**call(5))[0])
    prices = others.module_flops(plain, call(0))
    assert prices[""] == ras_compile.explain(plain, **call(0)).cost.dense_flops
    attention = sum(prices[part] for part in model.parts)
    assert model.flops(1, prices) == prices[""] and 0 < attention < prices[""]


@pytest.mark.parametrize("name, options", [("FirstBlockCache", {"threshold": 1e9}),
                                           ("MagCache", {"threshold": 1e9, "ratios": [1.0] * 6}),
                                           ("Spectrum", {"warmup": 2, "window": 3.0}),
                                           ("TaylorSeer", {"interval": 3, "order": 1})])  # fmt: skip
@torch.no_grad()
def test_caches_skip_blocks_and_forget(name, options):
    plain = small()
    model = others.METHODS[name](plain, "eager", 6, **options)
    passes = []
    for _ in range(2):
        with model.around():
            found = [model(**call(seed))[0] for seed in range(6)]
        passes.append(torch.stack(found))
        assert torch.allclose(found[0], plain(**call(0))[0], atol=1e-5)
        assert not torch.allclose(found[5], plain(**call(5))[0], atol=1e-2)
        assert model.runs[model.parts[1]] < 6
    assert torch.equal(*passes)
    prices = others.module_flops(plain, call(0))
    assert 0 < model.flops(6, prices) < 6 * prices[""]


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    with pytest.raises(ModuleNotFoundError, match="pip install cache-dit"):
        others.METHODS["cache-dit"](small(), "eager", 28, mask="fast")


@torch.no_grad()
def test_ratios_are_those_of_the_blocks_changes():
    plain, changes = small(), []
    first, *_, last = plain.transformer_blocks
    given: list[torch.Tensor] = []
    first.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["hidden_states"]), with_kwargs=True
    )
    last.register_forward_hook(lambda module, args, out: changes.append((out[1] - given[-1]).norm(dim=-1)))
    for seed in range(3):
        plain(**call(seed))
    first._forward_pre_hooks.clear(), last._forward_hooks.clear()

    def draw(model):
        with model.around():
            for seed in range(3):
                model(**call(seed))

    want = [1.0, *((after / before).mean().item() for before, after in itertools.pairwise(changes))]
    assert others.calibrated(draw, plain, 3) == pytest.approx(want, rel=1e-4)


def test_spectrum_goes_on_as_a_polynomial_does():
    at, steps = [0, 1, 2, 3, 4, 6, 9], 20
    curve = lambda step: 3 - 0.5 * step + 0.2 * step**2  # noqa: E731  (a formula)
    fitted = others.spectrum_weights(at, 12, steps, degree=4, ridge=1e-10, blend=1.0)
    assert sum(w * curve(t) for w, t in zip(fitted, at, strict=True)) == pytest.approx(curve(12), rel=1e-4)
    line = others.spectrum_weights(at, 12, steps, degree=4, ridge=0.1, blend=0.0)
    assert line == pytest.approx([0, 0, 0, 0, 0, -1, 2])  # of steps 6 and 9
    both = others.spectrum_weights(at, 12, steps, degree=4, ridge=1e-10, blend=0.5)
    assert both == pytest.approx([(a + b) / 2 for a, b in zip(fitted, line, strict=True)])
    plan = others.spectrum_plan(12, window=2.0, growth=1.0, warmup=3)
    assert [step for step, computed in enumerate(plan) if computed] == [0, 1, 2, 4, 7, 11]


def test_tokens_take_their_turns_by_what_changed():
    rule = rules.Heterogeneous()
    info = [SelectionInfo(step=step) for step in range(4)]
    noise = torch.zeros(1, 8, 2)
    rule(noise, info[0])
    noise = noise + torch.stack((torch.arange(1, 9), torch.zeros(8)), -1)  # the last two change most
    assert rule(noise, info[1]).tolist() == [[0.25] * 4 + [0.5] * 2 + [1.0] * 2]
    assert rule(noise, info[2]).tolist() == [[0.5] * 4 + [1.0] * 2 + [2.0] * 2]  # none was computed
    noise[:, 0, 0] += 13
    assert rule(noise, info[3])[0, 0] == 0.5  # 6.5 in two steps: now the third
    assert rule(noise, info[0]).max() == 1  # another run


@torch.no_grad()
def test_a_remembering_metric_sees_what_drift_sees():
    class Drift(rules.Changes):
        def __call__(self, noise, info):
            return expected(*self.seen(noise, info))

    passes, given = [], call(0)
    for metric in ("drift", Drift(), rules.Unaged()):
        options = {
            **fitting("drift"),
            "metric": metric,
            "sample_ratio": 0.22,
            "reset_interval": 5,
            "starvation_scale": 0.0,
        }
        options["max_absence"] = 8  # else, with half of the tokens, drift has them take turns
        model = torch.compile(small(), backend="ras", options={**options, "inner_backend": "eager"})
        latent, found = given["hidden_states"], []
        with ras_compile.generation(num_steps=8) as run_of:
            for _ in range(8):
                now = torch.full((2,), 1000.0 - 1000 * run_of.step() / 8)
                found.append(model(**given | {"hidden_states": latent, "timestep": now})[0])
                latent = latent - 0.1 * found[-1]
        passes.append(torch.stack(found))
        assert [record.kind for record in ras_compile.trace(model)] == ["dense"] * 4 + ["sparse"] * 4
        torch._dynamo.reset()
    assert torch.equal(passes[0], passes[1]) and not torch.equal(passes[0], passes[2])


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Arguments of a run of two pictures, with artwork of coloured noise and the transformer's last block alone."""

    whole = models.Emoji.pipeline

    def load(self, dtype):
        pipe = whole(self, dtype)
        pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[-1:]
        return pipe

    monkeypatch.setattr(models.Emoji, "pipeline", load)
    rows = -(-(len(OBJECTS) + 10) // data.COLUMNS)
    noise = np.random.default_rng(0).integers(0, 256, (rows * data.TILE, data.COLUMNS * data.TILE, 4), np.uint8)
    Image.fromarray(noise).save(tmp_path / "atlas.png")
    (tmp_path / "atlas.json").write_text(json.dumps({"objects": OBJECTS}))
    default = chosen.ras(2, 0.25, warmup_steps=1)
    two = [default, chosen.ras(2, 0.25, "random tokens", default.key, warmup_steps=1, metric="random")]
    monkeypatch.setitem(chosen.TABLES, "a", lambda: [chosen.Setting("dense", 1, "unipc"), *two])
    monkeypatch.setattr(run, "REFERENCE_STEPS", 2)
    torch._dynamo.reset()
    return [
        "--table", "a", "--n", "2", "--batch", "1", "--real", "40", "--exact", "0", "--inner-backend", "eager",
        "--cache", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu",
    ]  # fmt: skip


def test_a_stopped_run_goes_on(tiny, monkeypatch, tmp_path, capsys):
    file = tmp_path / "out" / "table_a.json"
    run.main([*tiny, "--only", "unipc|RAS 25.0%, 2 steps$"])
    before = json.loads(file.read_text())["rows"]
    assert [row["key"] for row in before] == ["real", "real, autoencoded", "dense unipc, 1 steps", "RAS 25.0%, 2 steps"]
    dense, adaptive = before[2:]
    assert adaptive["dense_steps"] == 1 and dense["flops"] < adaptive["flops"] < 1.5 * dense["flops"]
    assert adaptive["psnr"] > 5 and adaptive["seconds"] > 0 and "ssim_5th_ci" in adaptive

    drawn = []
    draw = run.Bench.draw
    monkeypatch.setattr(run.Bench, "draw", lambda self, row, bar: drawn.append(row.key) or draw(self, row, bar))
    run.main(tiny)
    assert drawn == ["RAS 25.0%, 2 steps, random tokens"]
    after = json.loads(file.read_text())["rows"]
    assert after[:4] == before and after[4]["default"] == "RAS 25.0%, 2 steps"
    assert after[4]["psnr_minus_default"] == pytest.approx(after[4]["psnr"] - adaptive["psnr"], abs=2e-4)

    monkeypatch.setattr(run, "Bench", None)
    run.main(tiny)
    assert "has every setting" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"another run \(real=40\)"):
        run.main([*tiny, "--real", "41"])


def test_settings_of_the_frontier():
    rows = chosen.frontier("all")
    assert {row.key for row in chosen.frontier("points,caches")} < {row.key for row in rows}
    with pytest.raises(ValueError, match="'tables' is no group of rows: take points, "):
        chosen.frontier("points,tables")
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        if row.method == "RAS":
            config = ras_compile.RASConfig.from_options(row.options)
            if config.ratio_schedule == "ends" and "preset" not in row.options:
                schedule = Schedule(config)
                sparse = [step for step in range(row.steps) if schedule.kind(step, row.steps) == "sparse"]
                assert max(schedule.ratio(step, row.steps) for step in sparse) == pytest.approx(0.5)
        else:
            assert row.method in others.METHODS or (row.method == "dense" and not row.options)


def test_the_frontier_takes_turns(tiny, monkeypatch, tmp_path, capsys):
    def broken(noise, info):
        raise RuntimeError("no such thing\nat all")

    fast = dict(warmup_steps=1)
    rows = [
        chosen.Setting("dense", 2, "even"),
        chosen.ras(3, 0.25, "drift", metric="drift", **fast),
        chosen.Setting("RAS", 3, "dpm++", dict(preset="quality", **fast), "preset quality"),
        chosen.Setting("MagCache", 3, "even", dict(threshold=1e9)),
        chosen.ras(3, 0.25, "broken", metric=broken, **fast),
    ]
    monkeypatch.setattr(frontier, "frontier", lambda names: rows)
    order, one_batch = [], Sampler.one_batch
    monkeypatch.setattr(
        Sampler, "one_batch", lambda self, model, scheduler, at, *given, **more:
        order.append((at, type(scheduler).__name__)) or one_batch(self, model, scheduler, at, *given, **more),
    )  # fmt: skip
    given = ["--out", str(tmp_path / "out"), "--n", "2", "--batch", "1", "--turns", "2", "--exact-steps", "2"]
    frontier.main([*given, "--device", "cpu", "--inner-backend", "eager", "--cache", str(tmp_path)])
    turn = ["EvenEuler", "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "EvenEuler"]
    exact, *first = order[:7]
    assert exact[0] == 0 and [name for _, name in first] == [*turn[:3], *turn[-1:] * 2, turn[1]]  # one calibrates
    assert [at for at, _ in first] == [0] * 6 and [at for at, _ in order[7:]] == [1] * 4 + [0] * 4
    assert [name for _, name in order[7:]] == turn * 2
    found = json.loads((tmp_path / "out" / "frontier_emoji.json").read_text())["rows"]
    assert [row["key"] for row in found] == [row.key for row in rows]
    *found, failed = found
    assert failed["failed"] == "RuntimeError: no such thing" and failed["options"]["metric"] == "function"
    assert all(row["n"] == 2 and row["psnr"] > 5 and len(row["ms_turns"]) == 2 and row["took"] > 0 for row in found)
    assert all({"fid", "sfid", "alignment_5th", "accuracy_ci", "psnr_5th_ci", "ssim_5th"} <= set(row) for row in found)
    assert found[0]["work"] == 1 and 0.4 < found[1]["work"] < 0.6 and found[1]["active"] == [1024, 256, 256]
    assert found[3]["work"] < 1
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if " ms  work " in line]) == 4
    assert "broken failed: RuntimeError: no such thing" in out
    frontier.main([*given, "--only", "quality", "--list"])
    assert capsys.readouterr().out == rows[2].key + "\n"


def test_without_artwork_the_command_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="python examples/emoji/data.py --cache"):
        run.main(["--table", "a", "--cache", str(tmp_path / "none"), "--out", str(tmp_path), "--device", "cpu"])


def fake(method: str, steps: int, fid: float, **more) -> dict:
    row = {"key": f"{method}, {steps} steps", "method": method, "steps": steps, "sampler": "euler", "sample_ratio": 1.0}
    row |= {"variant": "default", "default": "", "flops": steps * 1e9, "seconds": steps / 1e3, "fid": fid}
    return row | {"fid_ci": [fid - 0.5, fid + 0.5], "alignment": -fid, "alignment_ci": [-fid - 1, -fid + 1]} | more


def test_pages(tmp_path):
    pytest.importorskip("matplotlib")
    run_of = {"n": 2, "batch": 1, "device": "CPU", "torch": "2", "diffusers": "0", "real": 3, "exact": 0}
    rows = [fake("dense", 28, 1.0), fake("dense", 7, 3.0)]
    rows.append(
        fake("RAS", 28, 1.5, key="r", variant="random", default="dense, 28 steps", sample_ratio=0.25,
             psnr_minus_default=-2.0, psnr_minus_default_ci=[-3.0, -1.0], ssim_minus_default=0.0,
             ssim_minus_default_ci=[-0.1, 0.1])
    )  # fmt: skip
    ndcg = [{"step": 0, **{name: 0.9 for kind in ("std", "l2norm", "std_guided") for name in (kind, f"{kind}_random")}}]
    content = {"meta": {"run": run_of, "ndcg": ndcg, "about": {"fid": "a distance"}}, "rows": rows}
    (tmp_path / "table_a.json").write_text(json.dumps(content))
    template = tmp_path / "report.md"
    template.write_text(
        "Words.\n\n{{table a}}\n\n{{pareto a}}\n\n{{ranking a}}\n\n{{compared a}}\n\n{{table b}}\n\n{{run a}}\n"
    )
    tables.main(["--results", str(tmp_path), "--template", str(template)])
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("Words.\n\n| method | steps | GFLOPs | ms | FID |")
    assert "| dense | 28 | 28 | 28.00 | 1.00 ± 0.50 |" in page
    assert "**-2.00 ± 1.00**" in page and "| +0.0000 ± 0.1000 |" in page
    assert "(table b has not been run)" in page and "- `fid`: a distance." in page
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("pareto_a.png", "ranking_a.png"))
    with pytest.raises(ValueError, match="no part of a page"):
        tables.page("{{figure a}}", tmp_path)


def test_front_keeps_what_nothing_cheaper_equals():
    points = [(1, 5), (2, 4), (3, 4), (2, 6), (4, 1)]
    assert tables.front(points, higher=False) == [(1, 5), (2, 4), (4, 1)]
    assert tables.front(points, higher=True) == [(1, 5), (2, 6)]


def test_the_shipped_report_has_marks_for_every_table(tmp_path):
    text = (EXAMPLES / "quality" / "report.md").read_text()
    assert {name.partition("_")[0] for _, name in tables.MARK.findall(text)} == {*chosen.TABLES, *models.MODELS}
    assert "{{" not in tables.page(text, tmp_path)


def test_what_is_computed_inside_of_an_edit_and_how_near_it_is():
    (edits,) = load(["quality"], ["edits"])
    inside = torch.zeros(1, 2, 4, dtype=torch.bool)
    inside[:, :, :2] = True  # tokens 0, 1, 4 and 5 of eight
    dense, sparse = (SimpleNamespace(rows=rows) for rows in (None, torch.tensor([[0, 1, 6]]).repeat(2, 1)))
    assert edits.shares([dense, sparse], inside) == (0.75, 0.625)
    exact = torch.zeros(1, 3, 4, 8)  # two pixels for each of the latent's
    found = exact + 0.1 * inside.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert edits.psnr(found, exact, inside) == pytest.approx(20.0)
    assert edits.psnr(found, exact, ~inside) == pytest.approx(100.0)
