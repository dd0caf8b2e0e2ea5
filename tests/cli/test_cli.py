"""The command line, on the shipped model and without one."""

from __future__ import annotations

import json
import re
import sys
import types
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import picture, told
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

typer_testing = pytest.importorskip("typer.testing", reason="needs typer: pip install 'ras_compile[cli]'")

import ras_compile  # noqa: E402
from ras_compile.cli import main  # noqa: E402
from ras_compile.cli.app import DEMO, app  # noqa: E402
from ras_compile.cli.drawing import load, named, nearest  # noqa: E402
from ras_compile.cli.frontier import Frontier, Row, page, table  # noqa: E402
from ras_compile.cli.measures import image_reward, psnr, ssim  # noqa: E402
from ras_compile.errors import ConfigError  # noqa: E402
from ras_compile.report.pictures import save  # noqa: E402
from ras_compile.report.write import write  # noqa: E402

EMOJI = Path(__file__).resolve().parents[2] / "examples" / "emoji" / "pipeline"
SMALL = ["--height", "64", "--width", "64", "--set", "max_sequence_length=1", "--device", "cpu", "--backend", "eager"]


def call(*args, code: int = 0):
    """The result of a command, which ends with `code`."""
    found = typer_testing.CliRunner().invoke(app, [str(arg) for arg in args])
    assert found.exit_code == code, (found.exit_code, found.output, found.exception)
    return found


def data(*args, code: int = 0):
    return json.loads(call(*args, "--json", code=code).stdout)


def test_doctor_tells_versions_and_the_device():
    found = {finding["what"]: finding for finding in data("doctor")}
    assert found["torch"]["found"] == torch.__version__ and {"python", "diffusers", "device"} <= set(found)
    assert "torch" in call("doctor").stdout


def test_doctor_fails_where_nothing_can_be_compiled(monkeypatch):
    monkeypatch.setattr("ras_compile.canaries.changed", lambda: {"compile_fx": "is gone"})
    found = {finding["what"]: finding for finding in data("doctor", code=1)}
    assert found["torch"]["state"] == "bad" and "compile_fx is gone" in found["torch"]["advice"]


def test_a_command_that_is_not_there_is_told_with_the_nearest():
    assert re.search(r"did\s+you\s+mean\s+'generate'", call("genrate", code=2).output)
    assert "evaluate" in call("--help").output


def test_the_version_is_told():
    assert call("--version").stdout == f"ras-compile {ras_compile.__version__}\n"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["generate", "nowhere", "a cat"], "nowhere is no folder of a pipeline: it has no model_index.json"),
        (["generate", EMOJI, "a cat", "--preset", "balancd"], "no preset 'balancd'; did you mean 'balanced'?"),
        (["generate", EMOJI, "a cat", "--set", "hight=3", "--device", "cpu"], "takes no 'hight'; did you mean 'height'?"),
        (["generate", EMOJI, "a cat", "--set", "guidance_scale=abc", "--device", "cpu"], "give a value such as 7.0."),
        (["generate", EMOJI, "a cat", "--output", EMOJI / "NOTICE"], "can be made (File exists); give another --output."),
        (["evaluate", EMOJI, EMOJI / "NOTICE", "--output", EMOJI / "NOTICE"], "give another --output."),
        (["explain", "some/name"], "nothing is downloaded here, so get it first: hf download some/name"),
        (["generate", EMOJI, "a cat", "--set", "height", "--device", "cpu"], "--set takes name=value"),
        (["generate", EMOJI, "a cat", "--device", "gpu"], "take cuda or cpu." if torch.cuda.is_available() else "take cpu."),
        (["generate", EMOJI, "a cat", *SMALL, "--height", "63"], "divisible by 4"),  # the pipeline's own words
        (["generate", EMOJI / "transformer", "a cat"], f"give the folder of the whole pipeline, {EMOJI}"),
        (["generate", "some/name", "a cat"], "nothing is downloaded here, so get it first: hf download some/name"),
        (["evaluate", EMOJI, "nowhere.txt"], "nowhere.txt cannot be read; give a text file (UTF-8) with one prompt a line"),
        (["evaluate", EMOJI, EMOJI / "vae" / "diffusion_pytorch_model.safetensors"], "cannot be read; give a text file"),
        (["evaluate", EMOJI, EMOJI / "NOTICE", "--clip", EMOJI], "--clip takes a folder with a CLIP model"),
        (["evaluate", EMOJI, EMOJI / "NOTICE", "--image-reward", EMOJI], "lacks them"),
        (["report", "nowhere.json", "out.html"], "nowhere.json cannot be read: there is no such file"),
        (["report", "nowhere.json", "out.pdf"], "a report is a file that ends in"),
        (["explain", "FluxPipelin"], "is neither a folder nor a class of diffusers; did you mean 'FluxPipeline'?"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_a_sentence(args, sentence):
    found = call(*args, code=1)
    last = found.stderr.strip().splitlines()[-1]  # before it, diffusers' bars
    assert last.startswith("ras-compile: ") and sentence in last and "Traceback" not in found.output


def test_a_folder_that_diffusers_cannot_load_is_said(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoPipeline"}')
    with pytest.raises(ConfigError, match="diffusers cannot load"):
        load(tmp_path, "cpu")


def test_a_folder_without_weights_is_said(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text('{"_class_name": "X", "transformer": ["diffusers", "Y"]}')
    with pytest.raises(ConfigError, match="transformer holds no weights"):
        load(tmp_path)


@pytest.mark.parametrize(("name", "works"), [("FluxPipeline", True), ("StableDiffusionPipeline", False)])
def test_a_class_is_told_by_what_it_denoises_with(name, works):
    assert data("explain", name, code=int(not works))["works"] is works


def test_a_folder_is_explained():
    args = ["--height", "64", "--width", "64", "--device", "cpu", "--set", "max_sequence_length=1"]
    found = data("explain", EMOJI, "--steps", "12", *args)
    assert found["supported"] and found["tokens"] == 256 and found["flop_speedup"] > 1
    assert found["words"].startswith("In a run of 12 steps")


def test_a_video_is_written_as_an_animation(tmp_path):
    path = save([picture(), picture().transpose(Image.Transpose.ROTATE_90)], tmp_path / "dense")
    assert path.name == "dense.gif" and Image.open(path).n_frames == 2


def test_a_prompt_is_drawn_both_ways_and_presets_are_timed_and_measured(monkeypatch, tmp_path):
    """Four commands in one test: the pipeline, loaded once for all of them, is captured once."""
    monkeypatch.setattr("ras_compile.cli.app.load", cache(load))
    found = data("generate", EMOJI, "a <b>cat</b>", "--steps", "6", "--output", tmp_path / "new", *SMALL)
    assert found["steps"] == 6 and found["flop_speedup"] > 1 and 5 < found["psnr"] < 100
    html = Path(found["report"]).read_text()
    assert "data:image/png" in html and "<b>cat" not in html
    assert Image.open(found["focus"]).width > 1000
    assert Image.open(found["dense"]).size == Image.open(found["ras"]).size == (64, 64)
    last = call("generate", EMOJI, "a cat", "--steps", "5", "--output", tmp_path, *SMALL).stdout.splitlines()[-1]
    assert last == f"written to {tmp_path}: dense.png, ras.png, report.html, focus.png"
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"new", "dense.png", "focus.png", "ras.png", "report.html"}
    timed = data("bench", EMOJI, "--steps", "6", "--turns", "1", "--preset", "fast", *SMALL)
    assert [row["way"] for row in timed] == ["dense", "fast"] and timed[1]["flop_speedup"] > 1
    measured(tmp_path / "measured")


def measured(folder):
    """Presets measured on one's own weights."""
    folder.mkdir()
    (folder / "prompts.txt").write_text("a red apple\n\n")
    args = ["--steps", "6", "--exact-steps", "8", "--preset", "fast", "--output", folder, *SMALL]
    found = data("evaluate", EMOJI, folder / "prompts.txt", *args)
    names = [way["way"] for way in found["ways"]]
    assert names[:2] == ["dense", "fast"] and any("DPM-Solver++" in name for name in names), found
    assert all(way["seconds"] > 0 and way["psnr"] > 5 and 0 < way["ssim"] <= 1 for way in found["ways"])
    assert found == {**json.loads((folder / "evaluation.json").read_text()), "page": found["page"]}
    assert "a red apple" in Path(found["page"]).read_text()


def test_a_saved_run_becomes_a_page(tmp_path):
    write(told(), tmp_path / "run.json")
    for name in ("out.html", "focus.png", "steps.gif"):
        assert call("report", tmp_path / "run.json", tmp_path / name).stdout.split() == [str(tmp_path / name)]
        assert (tmp_path / name).stat().st_size > 1000


def test_the_demo_finds_the_shipped_model_and_needs_the_repository(monkeypatch, tmp_path):
    assert DEMO == EMOJI
    monkeypatch.setattr("ras_compile.cli.app.DEMO", tmp_path / "none")
    assert "clone it" in call("demo", code=1).stderr


def test_without_typer_the_command_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("ras_compile.cli.app")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"pip install 'ras_compile\[cli\]'"):
        main()


def test_measures_are_those_of_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(2, 3, 40, 56, generator=generator).double()
    two = (one + 0.1 * torch.randn(one.shape, generator=generator)).clamp(0, 1)
    assert psnr(one, two) == pytest.approx(float(peak_signal_noise_ratio(one, two, data_range=1.0)), abs=1e-4)
    wanted = float(structural_similarity_index_measure(one, two, data_range=1.0))
    assert ssim(one, two) == pytest.approx(wanted, abs=2e-3)  # it pads the picture, and then leaves the edge out
    assert psnr(one, one) == 100 and ssim(one, one) == pytest.approx(1)


def test_named_arguments_are_pythons_values_or_texts():
    assert named(["a=3", "b=[1, 2]", "c=a cat", "d=None"]) == {"a": 3, "b": [1, 2], "c": "a cat", "d": None}
    assert nearest("xyz", ["fast"]) == "." and nearest("fsat", ["fast"]) == "; did you mean 'fast'?"


def told_frontier() -> Frontier:
    def row(name, steps, seconds, near, preset=False):
        return Row(name, steps, preset, [seconds], [near], [0.9], {"clip": [31.0]}, [[picture()]], 1.0)

    rows = [row("dense", 6, 3.0, 30.0), row("fast", 6, 1.5, 28.0, True), row("3 plain steps", 3, 1.5, 25.0)]
    return Frontier(["<script>alert(1)</script>"], 8, rows, [[picture()]], {"fast": 3}, ["<i>"])


def test_the_frontiers_page_escapes_prompts():
    text = page(told_frontier())
    assert "<script" not in text and "<i>" not in text and "30.0 dB" in text and "exact: 8 dense steps" in text
    assert "fast: 28.0 dB; in the time of 3 dense steps, 3 plain steps: 25.0 dB" in text


def test_a_judge_has_a_column_where_there_is_one():
    found = told_frontier()
    assert table(found.rows)[0][-1] == "CLIPScore" and table(found.rows)[1][:3] == ["dense", "6", "3"]
    told = found.told()["ways"][0]
    assert told["clip"] == 31 and told["image_reward"] is None
    for row in found.rows:
        row.judged.clear()
    assert table(found.rows)[0][-1] == "SSIM"


def test_image_reward_is_read_by_its_package(monkeypatch, tmp_path, capsys):
    """A stand-in with the arguments of the package's version 1.5, which prints what it loads."""
    (tmp_path / "ImageReward.pt").touch(), (tmp_path / "med_config.json").touch()
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(ConfigError, match="pip install image-reward"):
        image_reward(tmp_path)

    class Model:
        def score(self, prompt, image):
            return len(prompt) + image.width

    def load(name, device, download_root=None, med_config=None):
        assert Path(name).is_file() and Path(med_config).is_file()
        print("load checkpoint")
        return Model()

    package = types.ModuleType("ImageReward")
    package.load = load
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    assert image_reward(tmp_path)(Image.new("RGB", (5, 5)), "four") == 9
    assert capsys.readouterr().out == ""
