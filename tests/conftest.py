"""Which process runs a test, and what tests marked `gpu` need: a CUDA device."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    for item in items:  # one process runs all tests of a file, or of a group that the test names
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
