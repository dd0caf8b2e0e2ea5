"""Which process runs a test, and what tests need: a CUDA device (those marked `gpu`), Triton's interpreter."""

import gc
import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

os.environ.setdefault("RAS_SPEC", "1")  # the spec holds after every pass of every program that a test builds

from ras_compile import notices

pytest.register_assert_rewrite("properties")

# What `make quick` leaves out, by files and folders; a test that runs Triton's interpreter is `compiles`, too.
LANES = {
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
    "test_faults.py": "slow",
}
QUICK = {"pipelines/test_follow.py", "kernels/test_tiles.py"}  # the quick ones among those


def pytest_configure():
    # Graphs are full of cycles: to look for them at every 700th object took 8 % of the time.
    gc.set_threshold(100_000, 10, 10)


def pytest_collection_modifyitems(items):
    root = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(root)
        if path.as_posix() not in QUICK:
            lanes = [lane for place, lane in LANES.items() if path.is_relative_to(place)]
            lanes += ["compiles"] if "run_interpreted" in item.fixturenames else []
            for lane in lanes:
                item.add_marker(lane)
    for item in items:  # one process runs all tests of a file, or of a group that the test names
        if not item.get_closest_marker("xdist_group"):
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
    torch.manual_seed(0)
    torch.set_grad_enabled(True)  # scripts of the examples, run in this process, may have turned it off


@pytest.fixture(autouse=True)
def no_violation_is_passed_over(request, monkeypatch):
    """A program that breaks the spec fails the test that builds it, even where the model then runs dense."""
    from ras_compile.errors import SpecViolation
    from ras_compile.passes.spec import legal

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


@pytest.fixture
def run_interpreted(request):
    """Runs a file of tests in a process of its own, in which Triton's kernels run on the CPU (it looks at its import)."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this is that run")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")

    def run(file):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        environment |= {"TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"}  # the package that is installed, not the folder
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", file]
        found = subprocess.run(command, env=environment, cwd=request.config.rootpath, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]

    return run
