"""RAS_DEBUG=folder: what every pass has changed can be read; a folder that cannot be written costs a warning alone."""

from __future__ import annotations

import os

import pytest
import torch
from joint import analysed, layers

from ras_compile import RASWarning, notices
from ras_compile.passes.debug import text
from ras_compile.passes.fusion.scatter import Fusion
from ras_compile.passes.pipeline import prepare
from ras_compile.passes.programs.program import dense_program, sparse_program


def built(folder, monkeypatch, active=3):
    monkeypatch.setenv("RAS_DEBUG", str(folder))
    analysis, splices = layers()
    program = sparse_program(analysis, active, splices)
    fusion = Fusion(analysis.frame.tokens, dtypes=(torch.float32,), grouped=lambda *given: True)
    return prepare(program, fusion=fusion, few_rows=None, outline_blocks=True)


def test_each_pass_is_written_down(tmp_path, monkeypatch):
    program = built(tmp_path / "deep" / "debug", monkeypatch)
    prepare(dense_program(*layers()), fusion=None, few_rows=None, outline_blocks=False)
    built(tmp_path / "deep" / "debug", monkeypatch, active=1)
    folders = sorted(found.name for found in (tmp_path / "deep" / "debug").iterdir())
    assert folders == ["0001-sparse-3", "0002-dense", "0003-sparse-1"]
    here = tmp_path / "deep" / "debug" / "0001-sparse-3"
    names = sorted(found.stem for found in here.glob("*.txt"))
    passes = ["built", "scatter", "gather", "attention", "in-place", "functional", "share", "outline"]
    assert names == [f"{number:02d}-{name}" for number, name in enumerate(passes)]
    assert [found.stem for found in sorted(here.glob("*.diff"))] == names[1:]
    assert (here / "07-outline.txt").read_text() == text(program)
    diff = (here / "01-scatter.diff").read_text().splitlines()
    assert any(line.startswith("-") and "aten.index_put_" in line for line in diff)
    assert any(line.startswith("+") and "ras_compile.scatter_linear" in line for line in diff)
    before = (here / "00-built.txt").read_text()
    assert "rows: i64[2, 3] (rows)" in before and "joint.py:" in before, "with the user's own lines"
    assert "repeated_block_0:" in text(program)


def test_nothing_is_written_without_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAS_DEBUG", raising=False)
    prepare(dense_program(*analysed()), fusion=None, few_rows=None, outline_blocks=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("when", ["from the beginning", "on the way"])
def test_a_folder_that_cannot_be_written_is_told_once(when, tmp_path, monkeypatch):
    notices.reset()
    folder = tmp_path / "file"
    if when == "from the beginning":
        folder.write_text("no folder")
    else:
        monkeypatch.setattr("pathlib.Path.write_text", refuse)
    with pytest.warns(RASWarning, match="RAS_DEBUG names a folder that cannot be written.* set RAS_DEBUG to") as told:
        for _ in range(2):
            program = built(folder, monkeypatch)
    assert len(told) == (1 if when == "from the beginning" else len(told))
    assert program.graph.find_nodes(op="output"), "the program is there all the same"


def refuse(*given, **named):
    raise OSError(28, os.strerror(28))


def test_stable_names_come_from_ops_and_roles():
    analysis, splices = analysed()
    program = sparse_program(analysis, 3, splices)
    wanted = text(program, stable=True)
    for index, node in enumerate(program.graph.nodes):
        node._rename(f"renamed_{index}")
    assert text(program, stable=True) == wanted != text(program)
    assert "rows_0: i64[2, 3] (rows)" in wanted and "joint.py" not in wanted
