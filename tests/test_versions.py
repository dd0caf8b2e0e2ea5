"""PyTorch versions that nobody has tested: said once, or refused in one sentence."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from ras_compile import _torch, canaries, notices
from ras_compile.backend import ras
from ras_compile.errors import RASError, RASWarning


@pytest.fixture
def pytorch(monkeypatch):
    """Says that PyTorch is another version."""

    def be(version):
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(canaries, "checked", False)
        notices.reset()

    return be


def said_by(call):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in said if issubclass(warning.category, RASWarning)]


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.14.1", "2.14.0a0+gitabc"])
def test_tested_versions_are_not_talked_about(pytorch, version):
    pytorch(version)
    assert said_by(canaries.check) == []


@pytest.mark.parametrize("version", ["2.99.0.dev20300101+cpu", "2.10.1", "3.0.0", "garbage"])
def test_other_versions_are_named_once(pytorch, version):
    pytorch(version)
    (said,) = said_by(lambda: (canaries.check(), canaries.check()))
    assert version in said and "2.11 to 2.14" in said


def compiled(module, x):
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(module, backend=ras, options={"unsupported": "dense", "inner_backend": "eager"})(x)


def test_the_first_compilation_says_it(pytorch):
    pytorch("2.99.0")
    module, x = nn.Linear(4, 4), torch.ones(1, 4)
    results = []
    said = said_by(lambda: results.append(compiled(module, x)))
    assert torch.equal(results[0], module(x)) and sum("2.99.0" in text for text in said) == 1


def test_what_is_slower_without_is_named_and_used_all_the_same(pytorch, monkeypatch):
    pytorch("2.99.0")
    monkeypatch.setattr(_torch, "MISSING", ["_foreach_copy_"])
    (said,) = said_by(canaries.check)
    assert "_foreach_copy_" in said


def without_pre_dispatch(*, export, _allow_token_discovery):
    raise AssertionError("is not called")


@pytest.mark.parametrize(
    ("name", "replacement", "told"),
    [
        ("FunctionalTensorMode", without_pre_dispatch, "FunctionalTensorMode takes no pre_dispatch"),
        ("pytree", object(), "pytree has no tree_map"),
        ("version_of", lambda tensor: tensor.no_such_attribute, "version_of"),
    ],
)
def test_what_is_needed_and_has_changed_is_one_error(pytorch, monkeypatch, name, replacement, told):
    pytorch("2.99.0")
    with monkeypatch.context() as patch:
        patch.setattr(_torch, name, replacement)
        with pytest.raises(RASError, match=r"cannot run on PyTorch 2\.99\.0.*install PyTorch 2\.11 to 2\.14") as error:
            compiled(nn.Linear(4, 4), torch.ones(1, 4))
    assert told in str(error.value)


@pytest.mark.slow
def test_a_name_that_is_gone_is_one_error():
    code = """
import torch, torch._functorch.predispatch as home
del home._vmap_decrement_nesting
try:
    torch.compile(torch.nn.Linear(4, 4), backend="ras")(torch.ones(1, 4))
except RuntimeError as error:
    print(type(error).__name__, error)
"""
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.startswith("RASError ras_compile cannot run on PyTorch") and "_vmap_decrement" in found, found


def test_the_front_door_needs_none_of_it():
    code = """
import sys, ras_compile
from ras_compile import RASConfig, RASError, ConfigError, generation
assert "ras_compile._torch" not in sys.modules and "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
