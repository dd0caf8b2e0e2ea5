"""The memory of what was measured on a device: the fastest way to cut a kernel into tiles, and whether a kernel pays at all.

Each question is timed once and its answer kept on disk. The file is JSON, one per device and version of everything that a
timing depends on. Processes may share it: each one adds its answers under a lock and puts a whole new file in place of the old
one. A file that holds anything else than answers is ignored and replaced; where none can be written, each process measures anew.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, Generic, TypeVar

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module, or nothing

try:
    import triton
except ImportError:  # nothing is ever timed
    triton = None

from ._torch import cache_folder
from .fallbacks import fell_back

log = logging.getLogger(__name__)


def folder() -> Path:
    """Where timings are kept: `RAS_COMPILE_CACHE_DIR`, else beside Inductor's cache."""
    named = os.environ.get("RAS_COMPILE_CACHE_DIR")
    if named:
        return Path(named)
    return cache_folder() / "ras_compile"


@cache
def sources() -> str:
    """Hash of this package's files: other kernels have other timings."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# The name of the fastest variant, or milliseconds; None where nothing runs.
Answer = str | list[float | None] | None


def is_answer(value: object) -> bool:
    """Whether a file may hold this for an answer."""
    times = value if isinstance(value, list) else []
    return value is None or isinstance(value, str) or (bool(times) and all(map(is_time, times)))


def is_time(value: object) -> bool:
    """Whether this may be a time: milliseconds, or None where nothing runs. A boolean counts as a number in Python."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0)


class Timings:
    """What was measured on one device: `{question: answer}` in memory, and in one file.

    A question is a kernel with the sizes that its time depends on.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.lock = threading.RLock()
        self.known: dict[str, Answer] = self.read()

    @property
    def path(self) -> Path:
        text = repr((self.device, torch.__version__, getattr(triton, "__version__", None), sources()))
        return folder() / f"timings-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def read(self) -> dict[str, Answer]:
        """What the file says; nothing where there is none, or where it is not as it was written."""
        try:
            found = json.loads(self.path.read_text())
            if isinstance(found, dict) and all(map(is_answer, found.values())):
                return found
            raise ValueError("it holds something else than timings")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            fell_back("timings of kernels taken anew", error)
        log.info("%s does not hold timings of kernels: it is ignored, and replaced at the next timing", self.path)
        return {}

    def learn(self, answers: Mapping[str, Answer]) -> None:
        """Remembers answers, here and on disk; what other processes have written meanwhile is kept."""
        with self.lock:
            self.known.update(answers)
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with locked(self.path.with_suffix(".lock")):
                    self.known = {**self.read(), **self.known}
                    put(self.path, json.dumps(self.known, indent=0, sort_keys=True).encode())
            except OSError as error:
                fell_back("timings of kernels kept by this process alone", error)

    def recall(self, question: str, fits: Callable[[Answer], bool], measure: Callable[[], Answer]) -> Answer:
        """The answer to a question, measured the first time. While a CUDA graph is captured nothing can be: None, then.

        Args:
            fits: whether a known answer can be one to this question; if not, it is measured anew.
        """
        with self.lock:
            if question in self.known and fits(self.known[question]):
                return self.known[question]
            if self.device != "cpu" and torch.cuda.is_current_stream_capturing():
                return None
            self.learn({question: (answer := measure())})
            return answer


def put(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Puts a whole file in the place of an old one, so that no process ever reads a part of one."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:  # a disk that is full, or Ctrl-C: no part of a file stays behind
        os.unlink(name)
        raise


# Seconds; writing takes milliseconds, and a process that stopped with the lock must not stop the others.
LONGEST_WAIT = 5.0


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock that all processes which write the timings share.

    It goes on without the lock where the system has none, or where another process keeps it too long: an answer may then
    be lost, and is timed again.
    """
    with open(path, "a") as file:
        held = acquired(file)
        try:
            yield
        finally:
            if held:  # closing is not enough, since a process that was forked meanwhile has the file open as well
                fcntl.flock(file, fcntl.LOCK_UN)


def acquired(file: IO[str]) -> bool:
    """Waits for the lock of a file, and says whether it is held."""
    end = time.monotonic() + LONGEST_WAIT
    while fcntl is not None and time.monotonic() < end:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.005)
        except OSError:  # a file system without locks
            break
        else:
            return True
    return False


@cache
def timings(device: torch.device) -> Timings:
    return Timings(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)


def fastest(device: torch.device, key: str, names: Sequence[str], launch: Callable[[str], object]) -> str | None:
    """The fastest of the named variants; None if none runs here, or if it is not known and may not be timed now.

    Timing is safe where every launch writes the same values. `triton.autotune` is not used because it also times inside
    the capture of a CUDA graph (where waiting for the device is an error), keeps the launch's arguments on itself
    (threads), and forgets at the end of the process.
    """

    def measure() -> str | None:
        variants = Variants(device, names, launch)
        postpone((device, key), variants)
        if len(names) > 1:
            build({key: variants})
        times = {name: milliseconds(partial(launch, name)) for name in names}
        log.debug("%s: %s", key, times)
        best = min(names, key=times.__getitem__, default=None)
        return None if best is None or math.isinf(times[best]) else best

    name = timings(device).recall(key, lambda found: found is None or found in names, measure)
    assert not isinstance(name, list)  # a list holds the times of `remembered`
    return name


Way = TypeVar("Way")


class Timed(Generic[Way]):
    """A kernel on given tensors, which can be cut into tiles in several ways: ``kernel(way)`` launches it."""

    x: torch.Tensor  # one of the tensors

    @property
    def key(self) -> str:
        """What a timing depends on."""
        raise NotImplementedError

    def tiles(self) -> dict[str, Way]:
        """The ways that may be fastest, by name."""
        raise NotImplementedError

    def __call__(self, way: Way, /) -> object:
        raise NotImplementedError

    def fastest(self) -> Way | None:
        """The way that was fastest on this device, timed the first time; None if none runs there."""
        ways = self.tiles()
        return ways.get(fastest(self.x.device, self.key, list(ways), lambda name: self(ways[name])) or "")


@dataclass(frozen=True)
class Variants:
    """Ways to run one op: ``launch(name)`` for each of the names."""

    device: torch.device
    names: Sequence[str]
    launch: Callable[[str], object]


class Postponed(Exception):
    """Nothing is timed now."""


Noted = dict[object, Variants | None]  # None: something else that was not timed


class _Thread(threading.local):
    noted: Noted | None = None


_thread = _Thread()


@contextlib.contextmanager
def postponed() -> Iterator[Noted]:
    """Times nothing inside, in this thread: a choice that is not known yet gets a made-up answer, and what it would have
    timed is noted, for `build`. With nothing noted, all answers were true ones.
    """
    before, _thread.noted = _thread.noted, {}
    try:
        yield _thread.noted
    finally:
        _thread.noted = before


def postpone(key: object, variants: Variants | None = None) -> None:
    """Called before something is timed: notes it and raises `Postponed` inside of `postponed`, does nothing elsewhere."""
    if _thread.noted is not None:
        _thread.noted.setdefault(key, variants)
        raise Postponed


def build(noted: Noted) -> None:
    """Launches every variant once, in threads: Triton compiles them side by side, outside of Python's lock."""
    jobs = [(variants, name) for variants in noted.values() if variants for name in variants.names]
    jobs = [job for job in jobs if job[0].device.type == "cuda"]
    if not jobs:
        return
    streams = {job[0].device: torch.cuda.current_stream(job[0].device) for job in jobs}

    def first(job: tuple[Variants, str]) -> None:
        variants, name = job
        # what does not compile or fit fails again when it is timed, and is left out there
        with (
            contextlib.suppress(Exception),
            torch.cuda.device(variants.device),
            torch.cuda.stream(streams[variants.device]),
            torch.no_grad(),
        ):
            variants.launch(name)

    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        list(pool.map(first, jobs))


REPEATS = 20  # launches in one timing: enough to hide that of the graph


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of a call on the device; infinite where it does not fit or cannot be compiled there."""
    postpone(None)
    try:
        return replayed(run)
    except (triton.OutOfResources, torch.OutOfMemoryError):  # a tile too large
        return math.inf
    except Exception as error:
        if "CUDA error" in str(error):  # nothing on this device can be trusted after that
            raise
        fell_back("a variant of a kernel left out", error)
        return math.inf


def replayed(run: Callable[[], object]) -> float:
    """Times a call inside a CUDA graph, as it will run: the host's part of a launch does not count."""
    stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        graph, times = torch.cuda.CUDAGraph(), []
        # Other threads go on allocating while this one captures.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(REPEATS):
                run()
        graph.replay()
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / REPEATS)
    before.wait_stream(stream)
    return sorted(times)[len(times) // 2]
