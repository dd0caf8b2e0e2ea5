"""Measured choices: timed once, kept on disk for other processes, never timed inside a capture."""

import contextlib
import importlib.util
import os
import stat
import subprocess
import sys
import threading

import pytest
import torch

from ras_compile.kernels import launch, tiles
from ras_compile.kernels.arguments import ScatterArguments
from ras_compile.kernels.launch import tiles_for

CPU = torch.device("cpu")
NAMES = ["large", "middle", "small"]


@pytest.fixture(autouse=True)
def empty(monkeypatch, tmp_path):
    monkeypatch.setenv("RAS_COMPILE_CACHE_DIR", str(tmp_path / "timings"))
    tiles.timings.cache_clear()
    yield tmp_path / "timings"
    tiles.timings.cache_clear()


@pytest.fixture
def timed(monkeypatch):
    """A clock for variants: the names that were timed, and their times."""
    ran, times = [], {"large": 3.0, "middle": 1.0, "small": 2.0}

    def milliseconds(run):
        run()
        return times[ran[-1]]

    monkeypatch.setattr(tiles, "milliseconds", milliseconds)
    return ran, times


def test_the_fastest_is_timed_once(timed):
    ran, times = timed
    assert tiles.fastest(CPU, "key", NAMES, ran.append) == "middle"
    times["large"] = 0.5
    assert tiles.fastest(CPU, "key", NAMES, ran.append) == "middle" and ran == NAMES
    assert tiles.fastest(CPU, "another", NAMES, ran.append) == "large" and len(ran) == 6


def test_another_process_times_nothing(timed, empty):
    ran, _ = timed
    tiles.fastest(CPU, "key", NAMES, ran.append)
    tiles.timings.cache_clear()  # as a new process
    assert tiles.fastest(CPU, "key", NAMES, ran.append) == "middle" and len(ran) == 3
    assert sorted(path.suffix for path in empty.iterdir()) == [".json", ".lock"]


def test_none_fits(timed):
    ran, times = timed
    times.update(dict.fromkeys(NAMES, float("inf")))
    assert tiles.fastest(CPU, "key", NAMES, ran.append) is None
    assert tiles.fastest(CPU, "key", NAMES, ran.append) is None and len(ran) == 3
    assert tiles.fastest(CPU, "none offered", [], ran.append) is None


def test_a_name_that_is_no_longer_offered_is_timed_anew(timed):
    ran, _ = timed
    tiles.fastest(CPU, "key", NAMES, ran.append)
    assert tiles.fastest(CPU, "key", ["large", "small"], ran.append) == "small"


DAMAGED = [
    "", "{", "[]", "[1, 2]", "\x00", "null", '"middle"', '{"key": {}}', '{"key": [[1.0]]}', '{"key": []}', '{"key": true}',
    '{"key": [true, false]}', '{"key": [-1.0, 2.0]}', '{"key": [NaN, 2.0]}', '{"key": "middle", "another": 3}',
    "[" * 100_000, '{"key": ' * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_file_that_is_not_as_it_was_written_is_ignored_and_replaced(timed, text, caplog):
    ran, _ = timed
    tiles.fastest(CPU, "key", NAMES, ran.append)
    tiles.timings(CPU).path.write_text(text)
    tiles.timings.cache_clear()
    with caplog.at_level("INFO", logger=tiles.__name__):
        assert tiles.fastest(CPU, "key", NAMES, ran.append) == "middle" and len(ran) == 6
    assert "ignored" in caplog.text and str(tiles.timings(CPU).path) in caplog.text
    caplog.clear()
    assert tiles.timings(CPU).read() == {"key": "middle"} and not caplog.text


def test_bytes_that_are_no_text_are_ignored(timed):
    tiles.timings(CPU).learn({"key": "middle"})
    tiles.timings(CPU).path.write_bytes(b"\xff\xfe")
    assert tiles.timings(CPU).read() == {}


@pytest.mark.parametrize("answer", [[1.0], "large", None, [1.0, 2.0, 3.0]], ids=str)
def test_an_answer_to_another_question_is_measured_anew(answer):
    """Two times are asked for: a file in which the key stands for something else must not be believed."""
    tiles.timings(CPU).learn({"key": answer})

    def fits(found):
        return isinstance(found, list) and len(found) == 2

    assert tiles.timings(CPU).recall("key", fits, lambda: [4.0, 5.0]) == [4.0, 5.0]
    assert tiles.Timings("cpu").known == {"key": [4.0, 5.0]}


WRITER = """
import sys
from ras_compile.kernels.tiles import Timings
mine, name = Timings("cpu"), sys.argv[1]
print("ready", flush=True)
sys.stdin.readline()
for index in range(60):
    mine.learn({f"{name} {index}": [float(index), None]})
"""


@pytest.mark.slow
def test_two_processes_that_write_lose_nothing(empty):
    start = [sys.executable, "-c", WRITER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": empty.parent}
    writers = [subprocess.Popen([*start, name], **pipes) for name in "ab"]
    for writer in writers:
        assert writer.stdout.readline() == b"ready\n"
    for writer in writers:
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert tiles.Timings("cpu").known == {f"{name} {index}": [index, None] for name in "ab" for index in range(60)}
    assert sorted(path.suffix for path in empty.iterdir()) == [".json", ".lock"]


def test_a_process_that_keeps_the_lock_stops_nobody(timed, empty, monkeypatch):
    ran, _ = timed
    monkeypatch.setattr(tiles, "LONGEST_WAIT", 0.05)
    empty.mkdir()
    with tiles.locked(tiles.timings(CPU).path.with_suffix(".lock")):
        assert tiles.fastest(CPU, "key", NAMES, ran.append) == "middle"
    assert tiles.timings(CPU).read() == {"key": "middle"}


def test_a_system_without_locks_keeps_its_timings(timed, monkeypatch):
    ran, _ = timed
    monkeypatch.setattr(tiles, "fcntl", None)
    assert tiles.fastest(CPU, "key", NAMES, ran.append) == "middle"
    assert tiles.timings(CPU).read() == {"key": "middle"}


def test_what_others_wrote_meanwhile_is_kept(timed):
    ran, _ = timed
    mine, other = tiles.Timings("cpu"), tiles.Timings("cpu")
    mine.learn({"a": "large"})
    other.learn({"b": [1.5, None]})
    assert tiles.Timings("cpu").known == {"a": "large", "b": [1.5, None]}


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_cannot_be_written(timed, empty):
    ran, _ = timed
    empty.mkdir()
    empty.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert tiles.fastest(CPU, "key", NAMES, ran.append) == "middle"


def test_a_folder_that_cannot_be_made(timed, empty):
    ran, _ = timed
    empty.write_text("a file in its place")
    assert tiles.fastest(CPU, "key", NAMES, ran.append) == "middle"
    assert tiles.fastest(CPU, "key", NAMES, ran.append) == "middle" and len(ran) == 3


def test_nothing_is_timed_inside_a_capture(timed, monkeypatch):
    ran, _ = timed
    capturing, device = True, torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    monkeypatch.setattr(tiles, "build", lambda *given: None)
    assert tiles.fastest(device, "key", NAMES, ran.append) is None and not ran
    capturing = False
    assert tiles.fastest(device, "key", NAMES, ran.append) == "middle"
    capturing = True
    assert tiles.fastest(device, "key", NAMES, ran.append) == "middle" and len(ran) == 3


def test_what_is_postponed_is_noted_and_not_timed(timed):
    ran, _ = timed
    tiles.fastest(CPU, "known", NAMES, ran.append)
    with tiles.postponed() as noted:
        assert tiles.fastest(CPU, "known", NAMES, ran.append) == "middle" and not noted
        for _ in range(2):
            with pytest.raises(tiles.Postponed):
                tiles.fastest(CPU, "key", NAMES, ran.append)
    assert len(ran) == 3
    (variants,) = noted.values()
    assert (variants.device, variants.names) == (CPU, NAMES)
    variants.launch("small")
    assert ran[3:] == ["small"]
    assert tiles.fastest(CPU, "key", NAMES, ran.append) == "middle", "and remembered nothing"


def test_a_time_that_is_postponed_is_told():
    with tiles.postponed() as noted, pytest.raises(tiles.Postponed):
        tiles.milliseconds(print)
    assert noted == {None: None}


def test_variants_are_built_side_by_side_where_they_will_run(monkeypatch):
    """Each one waits for another one to begin; that one fails, which is the timing's business."""
    here, met, done = threading.local(), threading.Barrier(2, timeout=60), []

    @contextlib.contextmanager
    def on(place):
        here.places = [*getattr(here, "places", ()), place]
        yield

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)

    def launch(name):
        met.wait()
        if name == "too large":
            raise RuntimeError(name)
        done.append(here.places)

    device = torch.device("cuda", 1)
    noted = [tiles.Variants(device, [name], launch) for name in ("small", "too large")]
    tiles.build({1: noted[0], 2: None, 3: noted[1]})
    assert done == [[device, "stream of cuda:1"]]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("text", ["cannot compile", "CUDA error: an illegal memory access"])
def test_a_variant_that_cannot_be_compiled_here_is_not_offered(monkeypatch, text):
    def broken(run):
        raise RuntimeError(text)

    monkeypatch.setattr(tiles, "replayed", broken)
    if "CUDA" in text:  # that the device is broken is never hidden
        with pytest.raises(RuntimeError, match=text):
            tiles.milliseconds(print)
    else:
        assert tiles.milliseconds(print) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded", [1, 64, 128, 256])
def test_every_tile_holds_whole_heads_and_is_not_far_too_large(dtype, padded):
    for M, N in [(4096, 1536), (16, 256), (512, 3072)]:
        offered = tiles_for(CPU, dtype, M, N, padded)
        assert offered
        for tile in offered:
            assert tile.BN % padded == 0 and max(2 * M, 64) >= tile.BM and max(2 * N, padded, 64) >= tile.BN


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_only_tiles_that_may_be_fastest_are_built(monkeypatch):
    """Those that keep half of the processors busy; persistent ones where they have several tiles to walk over."""
    monkeypatch.setattr(launch, "tiles_for", lambda *given, **options: launch.TILES_HOPPER)
    cache, x, weight = torch.empty(2, 1024, 512), torch.empty(2, 512, 64), torch.empty(512, 64)
    rows = torch.zeros(2, 512, dtype=torch.int64)
    kernel = launch.Launch(ScatterArguments(cache, x, weight, None, rows))
    plain = {tile.name for tile in launch.TILES_HOPPER if not tile.persistent}  # 128x256: 16 tiles, 64x64: 128

    def offered(processors: int) -> set[str]:
        monkeypatch.setattr(launch, "processors", lambda device: processors)
        return kernel.tiles().keys()

    large, middle = (f"{tile}-tma-persistent" for tile in ("128x256x64-w8-s3", "128x128x64-w8-s4"))
    assert offered(15) == plain | {large, middle}
    assert offered(31) == plain | {middle}
    assert offered(32) == plain
    assert offered(33) == {name for name in plain if "128x256" not in name}
    assert offered(250) == offered(1000) == {"64x64x64-w4-s4-tma"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_time_is_of_the_device_and_leaves_it_usable():
    a = torch.randn(2048, 2048, device="cuda")
    assert 0 < tiles.milliseconds(lambda: a @ a) < float("inf")
    assert torch.isfinite(a @ a).all()
