"""The benchmarks, at sizes that take seconds: their rows, their files, their tables. Nothing here looks at a time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from scripts import load

import ras_compile

ROOT = Path(__file__).parents[2]
names = (
    "caches", "host_profile", "kernel_sites", "measure", "quantise", "resolutions", "rows", "run", "sizes", "step_profile", "table",
    "ways",
)  # fmt: skip
caches, host_profile, kernel_sites, measure, quantise, resolutions, rows, run, sizes, step_profile, table, ways = load(
    ["benchmarks"], names
)


def bench(tmp_path, *more, model="sd3-medium"):
    """One benchmark on the CPU; every program runs as it is."""
    command = ["--model", model, "--size", "tiny", "--device", "cpu", "--inner-backend", "eager", "--repeats", "1"]
    return run.main([*command, "--out", str(tmp_path), *more])


@pytest.mark.parametrize("model", ["flux-dev", "flux-kontext", "lumina-next", "wan-1.3b"])
def test_every_model_is_sampled_adaptively(tmp_path, model):
    more = ["--methods", "ras", "--ratios", "0.5", "--contexts", "fresh", "--steps", "14"]
    (row,) = bench(tmp_path, *more, model=model)["rows"]
    assert row["kinds"] == "ddddssssssssds" and row["resets"] == [12]
    assert row["finite"] and "reason" not in row and "warnings" not in row
    assert 0 < row["flop_ratio"] < 1


def test_rows_of_one_run(tmp_path):
    content = bench(tmp_path, "--methods", "compile,ras,fewer-steps", "--ratios", "0.5", "0.25", "--steps", "14")
    by_key = {rows.key(row)[1:]: row for row in content["rows"]}
    assert by_key["compile", None, None]["kinds"] == "d" * 14
    for context in ("fresh", "frozen"):
        half, quarter = by_key["ras", 0.5, context], by_key["ras", 0.25, context]
        assert half["kinds"] == quarter["kinds"] == "ddddssssssssds"
        assert 0 < quarter["flop_ratio"] < half["flop_ratio"] < 1
        assert by_key["fewer-steps", 0.5, context]["steps"] <= 14
    assert by_key["ras", 0.5, "frozen"]["flop_ratio"] < by_key["ras", 0.5, "fresh"]["flop_ratio"]
    work = sizes.build("sd3-medium", "tiny", torch.device("cpu"), torch.float32)
    explained = ras_compile.explain(work.transformer, options={"reset_steps": (12,)}, **work.inputs)
    predicted = 1 / explained.speedup(0.5, 14)
    assert by_key["ras", 0.5, "fresh"]["flop_ratio"] == pytest.approx(predicted, rel=1e-4)


def test_quantised_rows_stand_beside_the_plain_ones(tmp_path, monkeypatch):
    """Both are compared with compiled dense sampling of the plain model, and a quantised one with its own, too."""

    def halved(work, kind):
        if kind == "float8-row":
            raise ways.NotAvailable("torchao: no such device")
        work.transformer.half().float()
        return dataclasses.replace(work, name=f"{work.name}, {kind}")

    monkeypatch.setattr(run, "quantised", halved)
    monkeypatch.setattr(run, "set_up", lambda work, *others: ways.Setup(work.scheduler()))
    more = ["--methods", "compile", "--steps", "4", "--repeats", "2", "--quantise", "int8-weight", "float8-row"]
    content = bench(tmp_path, *more)
    dense, quantised, missing = content["rows"]
    assert dense["error"] == 0 and "rounding" not in dense and quantised["model"] == "sd3-medium, int8-weight"
    assert 0 < quantised["error"] == quantised["rounding"] < 0.01
    assert quantised["x_quantised"] == 1 != quantised["x_compiled"]
    assert missing["model"] == "sd3-medium, float8-row" and missing["reason"] == "torchao: no such device"
    meta = dict.fromkeys(("driver", "triton", "diffusers", "dtype", "floor_tflops"))
    text = table.tables(content | {"meta": content["meta"] | meta})
    assert "**sd3-medium, int8-weight**" in text and "error / of rounding" in text


@pytest.mark.parametrize("kind", ["float8-weight", "int8"])
def test_torchao_quantises_what_it_takes(kind):
    pytest.importorskip("torchao")
    work = sizes.build("flux-dev", "tiny", torch.device("cpu"), torch.float32)
    before = measure.weight_bytes(work.transformer)
    work = quantise.quantised(work, kind)
    block = work.transformer.single_transformer_blocks[0]
    assert (
        type(block.proj_mlp.weight.data) is not torch.Tensor
        and type(work.transformer.x_embedder.weight.data) is torch.Tensor
    )
    assert work.name == f"flux-dev, {kind}" and measure.weight_bytes(work.transformer) < 0.5 * before


def test_a_kind_of_weights_that_is_not_to_be_had_is_a_reason():
    work = sizes.build("flux-dev", "tiny", torch.device("cpu"), torch.float32)
    with pytest.raises(ways.NotAvailable, match="torchao"):
        quantise.quantised(work, "float8-row")  # no GPU here, if there is torchao at all


def test_28_steps_have_6_dense_ones():
    work = sizes.build("sd3-medium", "tiny", torch.device("cpu"), torch.float32)
    assert work.steps == 28 and work.resets == (12, 20)


def test_no_weight_is_left_at_zero():
    """A head that starts at zero would make every token's noise equal, and RAS choose among ties."""
    for name in sizes.MODELS:
        work = sizes.build(name, "tiny", torch.device("cpu"), torch.float32)
        zero = [key for key, weight in work.transformer.named_parameters() if not weight.any()]
        assert not zero, f"{name}: {zero}"


def test_columns_and_file(tmp_path):
    bench(tmp_path, "--methods", "eager,first-block-cache")
    content = json.loads((tmp_path / "cpu.json").read_text())
    assert set(content) == {"meta", "rows"}
    eager, cached = content["rows"]
    assert set(rows.COLUMNS) <= set(eager) and len(eager["step_ms"]) == eager["steps"] == 28
    assert eager["peak_gb"] is None and eager["x_compiled"] is None and eager["x_eager"] == pytest.approx(1, rel=1e-3)
    assert cached["seconds"] is None and "SD3Transformer2DModel" in cached["reason"]
    command = content["meta"]["commands"][0]["command"]
    assert command.startswith("python examples/benchmarks/run.py --model") and str(tmp_path) not in command


def test_caches_of_diffusers_run_and_leave_nothing_behind(tmp_path):
    work = sizes.build("flux-dev", "tiny", torch.device("cpu"), torch.float32)
    before = sizes.sample(work, work.transformer, work.scheduler(), 6)
    for method in ways.CACHES:
        setup = ways.set_up(work, ways.Way(method), "eager", {})
        sizes.sample(work, work.transformer, setup.scheduler, 6)
        setup.close()
    assert torch.equal(sizes.sample(work, work.transformer, work.scheduler(), 6), before)


def test_a_row_that_cannot_be_run_says_why_and_spares_the_others(tmp_path):
    content = bench(tmp_path, "--methods", "ras,eager", "--ratios", "0.5", "--contexts", "fresh", "--options",
                    '{"metric": "entropy"}')  # fmt: skip
    eager, adaptive = content["rows"]
    assert eager["seconds"] is not None
    assert adaptive["seconds"] is None and "option metric='entropy' is not allowed" in adaptive["reason"]


def test_budget_stops_before_the_next_row(tmp_path, capsys):
    content = bench(tmp_path, "--methods", "eager", "--budget", "0")
    assert content["rows"] == [] and "budget is spent" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--methods", "magic"], ["--repeats", "0"], ["--steps", "1"], ["--model", "sd9"]])
def test_bad_arguments_are_refused(tmp_path, capsys, wrong):
    with pytest.raises(SystemExit):
        bench(tmp_path, *wrong)
    told = capsys.readouterr().err
    assert any(allowed in told for allowed in ("there are eager", "takes at least", "choose from"))


def content_of(*made, **meta):
    return {"meta": dict(gpu="G", torch="2", commands=[dict(command="c", date="d")]) | meta, "rows": list(made)}


def test_merge_replaces_rows_by_key_and_keeps_starts():
    old = content_of(
        rows.new_row("m", "eager", seconds=2.0),
        rows.new_row("m", "ras", 0.5, "fresh", seconds=1.0, cold_s=9.0, warm_s=3.0, reason="gone"),
    )
    new = content_of(
        rows.new_row("m", "ras", 0.5, "fresh", seconds=0.5), rows.new_row("m", "ras", 0.5, "frozen", seconds=0.25)
    )
    merged = rows.merge(old, new)
    assert [row["seconds"] for row in merged["rows"]] == [2.0, 0.5, 0.25]
    assert (merged["rows"][1]["cold_s"], merged["rows"][1]["warm_s"]) == (9.0, 3.0)
    assert "reason" not in merged["rows"][1]
    assert len(merged["meta"]["commands"]) == 2


def test_merged_rows_stand_with_those_of_their_model_and_method():
    old = content_of(
        rows.new_row("m", "eager"), rows.new_row("m", "ras", 0.25, "frozen"), rows.new_row("m", "cache-dit"),
        rows.new_row("n", "eager"),
    )  # fmt: skip
    new = content_of(rows.new_row("m", "ras", 0.5, "frozen"), rows.new_row("m", "ras", 0.25, "fresh"))
    assert [rows.key(row) for row in rows.merge(old, new)["rows"]] == [
        ("m", "eager", None, None),
        ("m", "ras", 0.25, "fresh"),
        ("m", "ras", 0.5, "frozen"),
        ("m", "ras", 0.25, "frozen"),
        ("m", "cache-dit", None, None),
        ("n", "eager", None, None),
    ]


def test_merge_of_starts_alone_keeps_the_speed():
    old = content_of(rows.new_row("m", "compile", seconds=2.0, warm_s=1.0))
    new = content_of(rows.new_row("m", "compile", cold_s=9.0, warm_s=3.0, starts_only=True))
    (row,) = rows.merge(old, new)["rows"]
    assert (row["seconds"], row["cold_s"], row["warm_s"]) == (2.0, 9.0, 3.0)


def test_merge_refuses_another_machine():
    old = content_of(rows.new_row("m", "eager"))
    with pytest.raises(ValueError, match="measured with gpu 'G', this run with 'H'"):
        rows.merge(old, content_of(gpu="H"))


def test_starts_are_taken_in_processes_of_their_own(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "start_process", lambda args, way, caches: asked.append((way, caches)) or len(asked))
    content = bench(tmp_path, "--measure", "starts", "--methods", "eager,compile,ras", "--ratios", "0.5",
                    "--contexts", "fresh")  # fmt: skip
    assert [(row["method"], row["cold_s"], row["warm_s"]) for row in content["rows"]] == [
        ("compile", 1, 2),
        ("ras", 3, 4),
    ]
    assert asked[0] == asked[1] != asked[2], "a way's two processes share their caches, two ways do not"


def test_waiting_calls_are_counted_in_the_steady_state_only(monkeypatch):
    work = sizes.build("sd3-medium", "tiny", torch.device("cpu"), torch.float32)
    monkeypatch.setattr(measure, "WAITS", ("aten::scaled_dot_product_attention",))

    def sample(mark):
        sizes.sample(work, work.transformer, work.scheduler(), 5, mark)

    assert measure.synchronising(sample, 3, 5) == {"aten::scaled_dot_product_attention": 2 * 2}


def test_what_is_looked_at_apart(tmp_path):
    """The runs that a device is needed for to make sense, without one."""
    args = [
        "--model",
        "wan-1.3b",
        "--size",
        "tiny",
        "--device",
        "cpu",
        "--inner-backend",
        "eager",
        "--out",
        str(tmp_path),
    ]
    made = run.Bench(run.arguments(args))
    setup = ways.set_up(made.work, ways.Way("compile"), "eager", {})
    assert made.null_ms > 0
    clock = made.host(setup)
    assert len(clock.milliseconds) == len(clock.launching) == 2 * made.work.steps == 40
    counted = made.counted_flops(setup, 4)
    assert counted == 2 * made.counted_flops(setup, 2) > 0 and setup.compiled is not None


def test_launches_of_graphs_are_told_apart(monkeypatch):
    launched = []
    monkeypatch.setattr(measure.Graph, "replay", lambda graph: launched.append(graph))
    mine = measure.Graph.replay

    def transformer(**inputs):
        measure.Graph.replay(None)
        return measure.Graph.replay(None)

    clock = measure.HostClock(transformer, torch.device("cpu"))
    clock()
    assert len(launched) == 2 and measure.Graph.replay is mine
    assert 0 < clock.launching[0] < clock.milliseconds[0]


def test_sections_are_timed_by_path_and_put_back():
    class Parts:
        def outer(self):
            return self.inner() + self.inner()

        def inner(self):
            return 1

        def failing(self):
            raise KeyError("as before")

    before = dict(vars(Parts))
    with measure.Sections({name: (Parts, name) for name in ("outer", "inner", "failing")}) as sections:
        assert Parts().outer() == 2 and Parts().inner() == 1
        with pytest.raises(KeyError, match="as before"):
            Parts().failing()
    taken = sections.milliseconds
    assert list(taken) == ["outer/inner", "outer", "inner", "failing"] and dict(vars(Parts)) == before
    assert taken["outer"] > taken["outer/inner"] > 0
    assert sections.of("inner") == taken["outer/inner"] + taken["inner"]


def test_host_profile_names_every_part(tmp_path):
    command = ["--model", "sd3-medium", "--size", "tiny", "--device", "cpu", "--inner-backend", "eager"]
    content = host_profile.main([*command, "--ratio", "0.5", "--out", str(tmp_path)])
    assert (
        json.loads((tmp_path / "host-sd3-medium-0.5-fresh-cpu.json").read_text())["weights"] == content["weights"] > 0
    )
    assert content["kinds"] == ["sparse"]
    for mode in ("waited", "ahead"):
        parts = content[mode]["parts_us"]
        within = {"backend/decide", "backend/decide/choose rows/selection", "backend/program", "backend/record"}
        assert within < set(parts)
        assert all(taken > 0 for taken in parts.values())
        assert {"dynamo_us", "ras", "reduce-overhead", "parts_us"} == set(content[mode])


def test_null_backend_computes_once():
    calls = []

    def graph(*values):
        calls.append(values)
        return (values[0] + 1,)

    call = measure.null_backend(graph, [])
    assert call(torch.ones(1)) is call(torch.zeros(1)) and len(calls) == 1


def test_tables_name_every_row(tmp_path):
    ras = rows.new_row(
        "m", "ras", 0.125, "frozen", steps=28, seconds=0.5, x_compiled=2.0, cold_s=9.0, warm_s=3.0, syncs={"c": 2}
    )
    out = rows.new_row("m", "ras", 0.25, "fresh", reason="no memory")
    text = table.tables(content_of(ras, out, driver=1, triton=3, diffusers=0, dtype="bf16", floor_tflops=780))
    assert "| **RAS 0.125**, frozen text | 28 | 0.500 | 2.00x |" in text and "| 9 / 3 |  | 2 |" in text
    assert "Not measured: **RAS 0.25** (no memory)." in text


def test_put_needs_its_markers():
    text = "a\n" + table.BEGIN + "old\n" + table.END + "b\n"
    assert table.put(text, "new\n") == text.replace("old", "new")
    with pytest.raises(ValueError, match="needs the lines"):
        table.put(text + table.END, "new\n")


@pytest.mark.skipif(not table.RESULTS.exists(), reason="nothing has been measured yet")
def test_the_page_shows_the_measured_figures():
    page = table.PAGE.read_text()
    text = table.tables(rows.load(table.RESULTS))
    assert table.put(page, text) == page, "run python examples/benchmarks/table.py"


TINY_SITES = (
    kernel_sites.Site("m", "key", 2, (4, 6), 32, 48, 16, context=5, norm="rms", rope="interleaved"),
    kernel_sites.Site("m", "value", 2, (4, 6), 32, 48, 16),
    kernel_sites.Site("m", "qkv", 2, (4, 6), 32, 48, 16, context=5),
    kernel_sites.Site("m", "qkv", 1, (4, 6), 32, 48, 16),
    kernel_sites.Site("m", "output", 2, (4, 6), 32, 12, patch=2),
    kernel_sites.Site("m", "output", 1, (4, 6), 32, 12),
    kernel_sites.Site("m", "mlp", 2, (4, 6), 32, 64),
    kernel_sites.Site("m", "embed", 2, (4, 6), 12, 32, patch=2, table=True),
    kernel_sites.Site("m", "embed", 1, (4, 6), 12, 32),
)


def test_every_kernel_site_is_checked_before_it_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_sites, "SITES", TINY_SITES)
    command = [
        "--device",
        "cpu",
        "--inner-backend",
        "eager",
        "--ratios",
        "0.5",
        "--out",
        str(tmp_path),
        "--models",
        "m",
    ]
    content = kernel_sites.main(command)
    assert len(content["rows"]) == len(TINY_SITES) and all(row["right"] for row in content["rows"])
    assert rows.load(tmp_path / "kernels-cpu.json")["rows"][0]["m"] == 2 * 12
    # a kernel that writes nothing
    monkeypatch.setattr(kernel_sites, "scatter_linear", lambda *args, **more: None)
    monkeypatch.setattr(kernel_sites.Attention, "fused", lambda given, cache: given.members(cache)[1])
    for site in (TINY_SITES[0], next(site for site in TINY_SITES if site.name == "qkv")):
        row = kernel_sites.measure(site, 0.5, torch.device("cpu"), "eager")
        assert not row["right"] and row["fused_us"] is None


def test_caches_kept_in_other_ways(capsys, monkeypatch):
    """A row for each way, of which the host's memory changes no picture, and rounding the bytes."""
    monkeypatch.setattr(caches, "OPTIONS", {name: caches.OPTIONS[name] for name in ("as they are", "host, float8")})
    command = ["--model", "sd3-medium", "--size", "tiny", "--device", "cpu", "--inner-backend", "eager", "--steps", "6"]
    dense, plain, other = caches.main([*command, "--repeats", "1"])
    assert dense["caches_gb"] == dense["error"] == plain["rounding"] == 0 < plain["error"]
    assert 0 < other["caches_gb"] < plain["caches_gb"] and 0 < other["rounding"] < 0.1
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize("kind, told", [("sparse", ["sparse"]), ("dense", ["dense"]), ("compile", [])])
def test_profile_of_a_step(tmp_path, kind, told):
    command = ["--model", "sd3-medium", "--size", "tiny", "--device", "cpu", "--inner-backend", "eager", "--kind", kind]
    content = step_profile.main([*command, "--out", str(tmp_path)])
    assert content["kinds"] == told
    linears = sum(kernel["count"] for kernel in content["kernels"] if kernel["name"] in ("aten::addmm", "aten::mm"))
    assert linears >= 20, "every linear of a step is seen"
    assert content["busy_ms"] == pytest.approx(sum(content["families"].values()))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".txt"]


def test_sizes_of_references_are_not_asked_for(capsys):
    with pytest.raises(SystemExit):
        resolutions.main(["--model", "flux-kontext", "--size", "tiny", "--device", "cpu"])
    assert "flux-kontext has reference tokens" in capsys.readouterr().err
