"""Prompts over several processes: the very pictures of one, and a run that was interrupted goes on."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import EXAMPLES, load

BATCH, SERVE = load(["distributed"], ["batch", "serve"])
PROMPTS = ["a red apple", "", "a rocket"]
LESS = ["--side", "32", "--steps", "5", "--inner-backend", "eager"]


def given(folder: Path) -> list[str]:
    """The arguments of a run whose prompts and pictures stand in a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return [str(folder / "prompts.txt"), "--output", str(folder / "pictures"), *LESS]


def drawn(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "pictures").iterdir())}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, bytes]:
    """What one process draws; of its two pictures one is drawn again after an interruption."""
    folder = tmp_path_factory.mktemp("alone")
    BATCH.main(given(folder))
    first, second = sorted((folder / "pictures").iterdir())
    once, kept = drawn(folder), first.stat().st_mtime_ns
    second.unlink()
    BATCH.main(given(folder))
    assert drawn(folder) == once and first.stat().st_mtime_ns == kept
    return once


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr


SCRIPT = str(EXAMPLES / "distributed" / "batch.py")


@pytest.mark.pipelines
@pytest.mark.slow
def test_two_processes_draw_the_pictures_of_one(tmp_path, alone):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run([sys.executable, *launcher, SCRIPT, *given(tmp_path)])
    assert list(alone) == ["00000.png", "00002.png"]
    assert drawn(tmp_path) == alone


@pytest.mark.slow
def test_two_actors_of_ray_draw_the_pictures_of_one(tmp_path, alone):
    pytest.importorskip("ray")
    run([sys.executable, SCRIPT, *given(tmp_path), "--ray", "2"])
    assert drawn(tmp_path) == alone


@pytest.mark.pipelines
@pytest.mark.slow
def test_a_server_draws_the_pictures_of_a_batch(alone):
    painter = SERVE.Painter(SERVE.arguments(LESS))
    assert painter.picture(PROMPTS[0], seed=0) == alone["00000.png"]
    starlette = pytest.importorskip("starlette.requests")
    for query, status in ((b"prompt=a red apple&seed=0", 200), (b"seed=3", 400), (b"prompt=a&seed=x", 400)):
        answer = asyncio.run(painter(starlette.Request({"type": "http", "query_string": query})))
        assert answer.status_code == status


@pytest.mark.slow
def test_ray_serves_pictures(alone):
    serve = pytest.importorskip("ray.serve")
    handle = serve.run(serve.deployment(SERVE.Painter).bind(SERVE.arguments(LESS)))
    try:
        assert handle.picture.remote(PROMPTS[0], 0).result() == alone["00000.png"]
    finally:
        serve.shutdown()


@pytest.mark.pipelines
@pytest.mark.slow
def test_the_benchmark_of_two_processes(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(EXAMPLES / "benchmarks" / "across.py")
    less = ["--model", "wan-1.3b", "--size", "tiny", "--device", "cpu", "--inner-backend", "eager", "--layers", "1"]
    out = tmp_path / "across.json"
    run([sys.executable, *launcher, script, *less, "--steps", "6", "--repeats", "1", "--out", str(out)])
    dense, adaptive = json.loads(out.read_text())["rows"]
    assert dense["kinds"] == "dddddd" and adaptive["kinds"] == "ddddss"
    assert adaptive["same"] and dense["same"] and "warnings" not in adaptive
    assert 0 < adaptive["sent_sparse"] < adaptive["sent_dense"]
    run([sys.executable, *launcher, script, *less, "--steps", "6", "--cancel", "4", "--out", str(out)])
    found = json.loads(out.read_text())["cancel"]
    assert 0 < found["stopped"] < 4 and found["apart"] == 0 and found["same"]
