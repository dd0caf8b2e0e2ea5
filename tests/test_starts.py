"""What `save` leaves and `load` takes: PyTorch's artefacts, checked against what they are for before anything is read."""

import json
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from tiny import TinyDiT

import ras_compile
from ras_compile import notices, starts
from ras_compile.kernels import tiles


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    """Folders of this test alone for Inductor and for timings, and messages that are said anew."""
    notices.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("RAS_COMPILE_CACHE_DIR", str(tmp_path / "timings"))
    tiles.timings.cache_clear()
    yield
    tiles.timings.cache_clear()


@pytest.fixture
def artefacts(monkeypatch):
    """PyTorch's two functions, replaced: what one saves and what the other was given."""
    given = []

    def load(content):
        given.append(content)
        return object() if content == b"programs" else None

    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"programs", None))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", load)
    return given


def refused(model, folder, words):
    notices.reset()
    with pytest.warns(ras_compile.RASWarning, match=words) as said:
        assert not ras_compile.load(model, folder)
    assert len(said) == 1 and "the first picture compiles" in str(said[0].message)


def test_what_is_saved_is_loaded(artefacts, tmp_path):
    place = ras_compile.save(TinyDiT(), tmp_path / "a" / "start")
    assert ras_compile.load(TinyDiT().eval(), place) and artefacts == [b"programs"]
    assert sorted(path.suffix for path in place.iterdir()) == [".json", ".zip"]


def test_a_compiled_model_is_the_model(artefacts, tmp_path):
    place = ras_compile.save(torch.compile(TinyDiT(), backend="ras"), tmp_path)
    assert ras_compile.load(TinyDiT(), place)


@pytest.mark.parametrize("part", ["torch", "triton", "ras_compile", "python", "device", "code"])
def test_another_version_or_device(artefacts, tmp_path, part):
    place = ras_compile.save(TinyDiT(), tmp_path)
    told = json.loads((place / starts.MANIFEST).read_text())
    (place / starts.MANIFEST).write_text(json.dumps({**told, part: "another"}))
    refused(TinyDiT(), place, f"it is for {part} another, and this is ")
    assert not artefacts


def test_another_model(artefacts, tmp_path):
    place = ras_compile.save(TinyDiT(), tmp_path)
    refused(TinyDiT(layers=3), place, "it is for other weights .* than this TinyDiT")
    refused(TinyDiT().bfloat16(), place, "it is for other weights .* than this TinyDiT")
    refused(torch.nn.Linear(2, 2), place, "it is for another model than this Linear")
    assert not artefacts


@pytest.mark.parametrize(
    "words",
    ["", "[]", "{}", '{"format": 1}', '{"format": 1, "timings": {"a": [true]}}', pytest.param("[" * 99999, id="deep")],
)
def test_a_manifest_that_is_none(artefacts, tmp_path, words):
    (tmp_path / starts.MANIFEST).write_text(words)
    refused(TinyDiT(), tmp_path, "it cannot be read")
    assert not artefacts


def test_no_folder(artefacts, tmp_path):
    refused(TinyDiT(), tmp_path / "none", "it cannot be read .FileNotFoundError")


@pytest.mark.parametrize("content", [b"", b"other"])
def test_programs_that_are_damaged(artefacts, tmp_path, content):
    place = ras_compile.save(TinyDiT(), tmp_path)
    next(place.glob("programs-*")).write_bytes(content)
    refused(TinyDiT(), place, "is not what was saved")
    assert not artefacts


def test_a_manifest_names_no_file_elsewhere(artefacts, tmp_path):
    place = ras_compile.save(TinyDiT(), tmp_path / "start")
    told = json.loads((place / starts.MANIFEST).read_text())
    told["programs"]["file"] = "../start/" + told["programs"]["file"]
    (place / starts.MANIFEST).write_text(json.dumps(told))
    refused(TinyDiT(), place, "names no file of programs")


def test_programs_in_a_zip_of_another_kind(artefacts, monkeypatch, tmp_path):
    def locked(*given):
        raise RuntimeError("File is encrypted")

    place = ras_compile.save(TinyDiT(), tmp_path)
    monkeypatch.setattr(zipfile.ZipFile, "read", locked)
    refused(TinyDiT(), place, "it cannot be read .ValueError: File is encrypted")


def test_programs_that_pytorch_cannot_read(artefacts, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"other", None))
    refused(TinyDiT(), ras_compile.save(TinyDiT(), tmp_path), "PyTorch cannot read the programs")


def test_a_second_save_replaces_the_first(artefacts, monkeypatch, tmp_path):
    first = {path.name for path in ras_compile.save(TinyDiT(), tmp_path / "start").iterdir()}
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"more programs", None))
    second = {path.name for path in ras_compile.save(TinyDiT(), tmp_path / "start").iterdir()}
    assert len(second) == 2 and first & second == {starts.MANIFEST}


def test_nothing_was_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    with pytest.raises(ras_compile.ConfigError, match="draw a picture first"):
        ras_compile.save(TinyDiT(), tmp_path)


def test_timings_travel(artefacts, tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    tiles.timings(cpu).learn({"a kernel": [1.0, None]})
    place = ras_compile.save(TinyDiT(), tmp_path / "start")
    monkeypatch.setenv("RAS_COMPILE_CACHE_DIR", str(tmp_path / "another machine"))
    tiles.timings.cache_clear()
    assert not tiles.timings(cpu).known
    assert ras_compile.load(TinyDiT(), place)
    tiles.timings.cache_clear()  # they are on disk, too
    assert tiles.timings(cpu).known == {"a kernel": [1.0, None]}


def test_kernels_travel(artefacts, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    folder, library = "A" * 52, "B" * 52
    held = {f"triton/{folder}/k.json": b"{}", f"triton/{folder}/k.cubin": b"code", f"triton/{library}/l.so": b"so"}
    monkeypatch.setattr(starts, "kernels", lambda: held)
    place = ras_compile.save(TinyDiT(), tmp_path / "start")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    assert ras_compile.load(TinyDiT(), place)
    assert all((tmp_path / name).read_bytes() == content for name, content in held.items())
    assert [path.name for path in (tmp_path / "triton").glob("*/__grp__*")] == ["__grp__k.json"]


def test_there_are_no_kernels_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert starts.kernels() == {}


@pytest.mark.parametrize("name", ["../evil.so", "triton/../evil.so", f"triton/{'A' * 52}/../evil.so"])
def test_libraries_go_nowhere_but_to_inductor(artefacts, monkeypatch, tmp_path, name):
    monkeypatch.setattr(starts, "libraries", lambda: {name: b""})
    place = ras_compile.save(TinyDiT(), tmp_path / "start")
    refused(TinyDiT(), place, "is neither a library of Inductor")
    assert not list(tmp_path.glob("**/evil.so"))


PROCESS = """
import logging, sys, torch
from torch._dynamo.utils import counters
from tiny import LATENT, TEXT, TinyDiT, run
import ras_compile
logging.basicConfig()
logging.getLogger("ras_compile").setLevel(logging.INFO)
torch.manual_seed(0)
compiled = torch.compile(TinyDiT().eval(), backend="ras", options={"warmup_steps": 2, "reset_interval": None})
latent, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 6)
if sys.argv[1] == "load":
    assert ras_compile.load(compiled, sys.argv[2])
picture = run(compiled, latent, text, steps=4)
if sys.argv[1] == "save":
    ras_compile.save(compiled, sys.argv[2])
missed = counters["inductor"]["fxgraph_cache_miss"] + counters["aot_autograd"]["autograd_cache_miss"]
print(picture.sum().item(), missed, counters["stats"]["unique_graphs"])
"""


@pytest.mark.slow
def test_another_process_captures_and_compiles_nothing(tmp_path, monkeypatch):
    told = []
    for what in ("save", "load"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / what))
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "support"), prepend=":")
        command = [sys.executable, "-c", PROCESS, what, str(tmp_path / "start")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert not done.returncode, done.stderr
        told.append(done.stdout.split())
        assert ("compiled it in" in done.stderr) == (what == "save")
        assert ("found it in PyTorch's cache" in done.stderr) == (what == "load")
    (picture, missed, captured), (again, missed_again, captured_again) = told
    assert picture == again and int(missed) > 0 and int(missed_again) == 0
    assert int(captured) > 0 and int(captured_again) == 0
    libraries = [{path.name for path in (tmp_path / what).glob("??/*.so")} for what in ("save", "load")]
    assert libraries[0] == libraries[1]


def test_loading_says_nothing_where_all_fits(artefacts, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ras_compile.load(TinyDiT(), ras_compile.save(TinyDiT(), tmp_path))
