"""Which process runs a test, and what tests need: a CUDA device (those marked `gpu`), Triton's interpreter."""

import gc
import importlib.util
import os
import random
import subprocess
import sys

import numpy
import pytest
import torch

from ras_compile import notices

pytest.register_assert_rewrite("properties")


def pytest_configure():
    # Graphs are full of cycles: to look for them at every 700th object took 8 % of the time.
    gc.set_threshold(100_000, 10, 10)


def pytest_collection_modifyitems(items):
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


@pytest.fixture
def run_interpreted(request):
    """Runs a file of tests in a process of its own, in which Triton's kernels run on the CPU (it looks at its import)."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this is that run")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")

    def run(file):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", file]
        found = subprocess.run(command, env=environment, cwd=request.config.rootpath, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]

    return run
