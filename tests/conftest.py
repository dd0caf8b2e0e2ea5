"""Which process runs a test, and what tests need: a CUDA device (those marked `gpu`), Triton's interpreter."""

import gc
import importlib.util
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

os.environ.setdefault("RAS_SPEC", "1")  # the spec holds after every pass of every program that a test builds

from ras_compile import notices
from ras_compile.passes.spec import legal

pytest.register_assert_rewrite("properties")

# What `make quick` leaves out, by files and folders; a test that runs Triton's interpreter is `compiles`, too.
LANES = {
    "capture/test_flex.py": "slow",
    "capture/test_repeats.py": "slow",
    "capture/test_subclasses.py": "compiles",
    "cli": "pipelines",
    "contract/test_across.py": "slow",
    "contract/test_contract.py": "zoo",
    "contract/test_handwritten.py": "zoo",
    "contract/test_inductor.py": "compiles",
    "contract/test_options.py": "pipelines",
    "contract/test_bad_input.py": "pipelines",
    "dispatch/test_agreement.py": "slow",
    "dispatch/test_sizes.py": "slow",
    "examples": "slow",
    "execute/test_memory.py": "slow",
    "fuzz": "slow",
    "integrations": "pipelines",
    "kernels": "slow",
    "passes/fusion/test_few_rows.py": "compiles",
    "passes/fusion/test_group.py": "compiles",
    "passes/lowering/test_functional.py": "compiles",
    "passes/lowering/test_narrow.py": "compiles",
    "passes/lowering/test_share.py": "compiles",
    "pipelines": "pipelines",
    "plans/test_equal.py": "slow",
    "plans/test_lengths.py": "compiles",
    "report/test_page.py": "slow",
    "sampling/test_changed_model.py": "slow",
    "sampling/test_threads.py": "slow",
    "sampling/test_unrelated.py": "slow",
    "test_faults.py": "slow",
    "test_imports.py": "slow",
}
QUICK = {"pipelines/test_follow.py", "kernels/test_tiles.py"}  # the quick ones among those


def pytest_configure():
    # Graphs are full of cycles: to look for them at every 700th object took 8 % of the time, and to look through all that
    # has lived for long, as often as Python does, took 10 %.
    gc.set_threshold(100_000, 20, 100)
    # After each graph Dynamo collects once more, and to time the graph's guards it empties the processor's caches.
    torch._dynamo.config.run_gc_after_compile = False
    torch._dynamo.guards.profile_guard_manager = lambda *given: 0.0
    # For words of its log that name a line's function it tokenises whole files, each anew in every process of a model.
    torch._dynamo.symbolic_convert.get_funcname = lambda *given: None


def pytest_collection_finish():
    # What was imported stays: to look through it again at each collection took 5 % of the time.
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    # pytest collects five times at the end, for errors of finalizers; what lives until then has none that matter.
    gc.freeze()


def lanes_of(path: Path) -> list[str]:
    """The lanes of a file of tests, or of a folder."""
    path = path.relative_to(Path(__file__).parent)
    return [] if path.as_posix() in QUICK else [lane for at, lane in LANES.items() if path.is_relative_to(at)]


def pytest_ignore_collect(collection_path, config):
    """With `-m "not (a or b)"` the files of the lanes a and b are not even imported, which takes seconds."""
    left_out = re.fullmatch(r"not \((\w+(?: or \w+)*)\)", config.option.markexpr)
    if left_out and collection_path.is_file() and {*left_out[1].split(" or ")}.intersection(lanes_of(collection_path)):
        return True
    return None


@pytest.hookimpl(tryfirst=True)  # before xdist's own hook, which reads the groups
def pytest_collection_modifyitems(items):
    for item in items:
        for lane in lanes_of(item.path) + ["compiles"] * ("run_interpreted" in item.fixturenames):
            item.add_marker(lane)
    for item in items:  # one process runs all tests of a file, or of a group that the test names
        if "run_interpreted" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("interpreted"))
            item.add_marker(pytest.mark.timeout(1800))  # the first of them waits for all
        elif not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """A test finds the same alone, in any order and in any process: random numbers, compiled code, what was said once."""
    torch._dynamo.reset()
    notices.reset()
    random.seed(0)
    numpy.random.seed(0)
    seed = (
        torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
    )  # in a tenth of the time
    seed(0)
    torch.set_grad_enabled(True)  # scripts of the examples, run in this process, may have turned it off


@pytest.fixture(autouse=True)
def no_violation_is_passed_over(request, monkeypatch):
    """A program that breaks the spec fails the test that builds it, even where the model then runs dense."""
    from ras_compile.errors import SpecViolation

    found, check = [], legal.check_program

    def watched(*given):
        try:
            check(*given)
        except SpecViolation as error:
            found.append(error)
            raise

    monkeypatch.setattr(legal, "check_program", watched)
    yield
    assert not found or request.node.get_closest_marker("violates"), found[0]


@pytest.fixture(scope="module")
def quick_collections():
    """For files whose tests collect often: what is here already need not be looked through each time."""
    gc.collect()
    gc.freeze()  # for good: to give it back would give back what was imported, too


@pytest.fixture(scope="session")
def interpreted(request) -> str:
    """What pytest says of the files that ask for `run_interpreted`, run in one process in which Triton's kernels run on the
    CPU: Triton looks for the interpreter at its import, and that takes longer than the tests of most of these files."""
    files = sorted({str(item.path) for item in request.session.items if "run_interpreted" in item.fixturenames})
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"}  # the package that is installed, not the folder
    command = [sys.executable, "-m", "pytest", "-v", "-m", "not gpu", "-p", "no:cacheprovider", *files]
    found = subprocess.run(command, env=environment, cwd=request.config.rootpath, capture_output=True, text=True)
    assert found.returncode in (0, 1), found.stdout[-8000:] + found.stderr[-2000:]  # 1: tests failed; each says so
    return found.stdout


@pytest.fixture
def run_interpreted(request):
    """Runs a file of tests in a process of its own, in which Triton's kernels run on the CPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this is that run")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")

    def run(file):
        said = request.getfixturevalue("interpreted")
        name = Path(file).relative_to(request.config.rootpath).as_posix() + "::"
        told = [line for line in said.splitlines() if name in line]
        assert any("PASSED" in line for line in told)
        assert not any("FAILED" in line or "ERROR" in line for line in told), said[-8000:]

    return run
