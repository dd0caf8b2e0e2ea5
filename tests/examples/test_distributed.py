"""Prompts over several processes: the very pictures of one, and a run that was interrupted goes on."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from across import free_port, launched, on_ranks
from diffusers import SD3Transformer2DModel
from scripts import EXAMPLES, load

BATCH, SERVE = load(["distributed"], ["batch", "serve"])
(ACROSS,) = load(["benchmarks"], ["across"])
PROMPTS = ["a red apple", "", "a rocket"]
LESS = ["--side", "32", "--steps", "5", "--inner-backend", "eager"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The shipped pipeline with a transformer of fewer layers, which is captured sooner."""
    folder = tmp_path_factory.mktemp("pipeline")
    for part in BATCH.SHIPPED.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "transformer").unlink()
    torch.manual_seed(0)
    config = {**SD3Transformer2DModel.load_config(BATCH.SHIPPED / "transformer"), "num_layers": 2}
    SD3Transformer2DModel.from_config(config).save_pretrained(folder / "transformer")
    return str(folder)


def given(folder: Path, model: str) -> list[str]:
    """The arguments of a run whose prompts and pictures stand in a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return [str(folder / "prompts.txt"), "--output", str(folder / "pictures"), "--model", model, *LESS]


def drawn(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "pictures").iterdir())}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, model) -> dict[str, bytes]:
    """What one process draws; of its two pictures one is drawn again after an interruption."""
    folder = tmp_path_factory.mktemp("alone")
    BATCH.main(given(folder, model))
    first, second = sorted((folder / "pictures").iterdir())
    once, kept = drawn(folder), first.stat().st_mtime_ns
    second.unlink()
    BATCH.main(given(folder, model))
    assert drawn(folder) == once and first.stat().st_mtime_ns == kept
    return once


@pytest.mark.pipelines
@pytest.mark.slow
def test_two_processes_draw_the_pictures_of_one(tmp_path, model, alone):
    arguments, port = given(tmp_path, model), free_port()

    def work(rank: int) -> None:
        launched(rank, 2, port)
        PartialState._reset_state()
        BATCH.main(arguments)

    assert on_ranks(2, work) == [None, None]
    assert list(alone) == ["00000.png", "00002.png"]
    assert drawn(tmp_path) == alone


@pytest.mark.slow
def test_two_actors_of_ray_draw_the_pictures_of_one(tmp_path, model, alone):
    pytest.importorskip("ray")
    command = [sys.executable, str(EXAMPLES / "distributed" / "batch.py"), *given(tmp_path, model), "--ray", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert drawn(tmp_path) == alone


@pytest.mark.pipelines
@pytest.mark.slow
def test_a_server_draws_the_pictures_of_a_batch(model, alone, monkeypatch):
    """Also where a client goes in the middle of its picture, which is given up: the next one is not drawn beside it."""
    answered = SimpleNamespace(Response=lambda content, status_code=200, media_type=None: (status_code, content))
    monkeypatch.setitem(sys.modules, "starlette.responses", answered)
    painter = SERVE.Painter(SERVE.arguments(["--model", model, *LESS]))
    step, gone, steps, tasks = painter.pipe.scheduler.step, threading.Event(), [], []

    def counted(*args: Any, **given: Any) -> Any:
        steps.append(args)
        if len(steps) == 2:  # of the first picture
            tasks[0].get_loop().call_soon_threadsafe(tasks[0].cancel)
            assert gone.wait(60)
        return step(*args, **given)

    def asked(**given: str) -> Any:
        return painter(SimpleNamespace(query_params=given))

    async def requests() -> list[Any]:
        tasks.append(asyncio.create_task(asked(prompt=PROMPTS[2], seed="2")))
        tasks[0].add_done_callback(lambda task: gone.set())
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        others = [{"prompt": PROMPTS[0], "seed": "0"}, {"seed": "3"}, {"prompt": "a", "seed": "x"}]
        return [await asked(**given) for given in others]

    monkeypatch.setattr(painter.pipe.scheduler, "step", counted)
    (status, picture), *refused = asyncio.run(requests())
    assert (status, picture) == (200, alone["00000.png"])
    assert [status for status, _ in refused] == [400, 400]
    assert len(steps) == 2 + 5


@pytest.mark.slow
def test_ray_serves_pictures(tmp_path, model, alone, monkeypatch):
    serve = pytest.importorskip("ray.serve")
    monkeypatch.chdir(tmp_path)  # replicas look for modules where they start: in the repository they would find sources
    handle = serve.run(serve.deployment(SERVE.Painter).bind(SERVE.arguments(["--model", model, *LESS])))
    try:
        assert handle.picture.remote(PROMPTS[0], 0).result() == alone["00000.png"]
    finally:
        serve.shutdown()


@pytest.mark.pipelines
@pytest.mark.slow
def test_the_benchmark_of_two_processes():
    less = ["--model", "wan-1.3b", "--size", "tiny", "--device", "cpu", "--inner-backend", "eager", "--layers", "1"]
    less += ["--steps", "6", "--repeats", "1"]
    ports = free_port(), free_port()

    def work(rank: int) -> Any:
        launched(rank, 2, ports[0])
        rows = ACROSS.main(less)["rows"]
        os.environ["MASTER_PORT"] = str(ports[1])
        return rows, ACROSS.main([*less, "--cancel", "4"])["cancel"]

    for (dense, adaptive), cancelled in on_ranks(2, work):
        assert dense["kinds"] == "dddddd" and adaptive["kinds"] == "ddddss"
        assert adaptive["same"] and dense["same"] and "warnings" not in adaptive
        assert 0 < adaptive["sent_sparse"] < adaptive["sent_dense"]
        assert 0 < cancelled["stopped"] < 4 and cancelled["apart"] == 0 and cancelled["same"]
