"""`ras-compile doctor`: what is installed, what it can do here, and what to do about the rest."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import warnings
from dataclasses import dataclass

import torch

from ras_compile import canaries, versions
from ras_compile.errors import RASError


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    found: str  # what it is
    # "ok"; "slow" where something works, but not as fast as it might; "bad" where nothing can be compiled
    state: str = "ok"
    advice: str = ""  # what to do, where there is something to do


def examine() -> list[Finding]:
    """Looks at this machine and this environment; compiles nothing."""
    found = [
        Finding("python", platform.python_version()),
        Finding("ras_compile", _version("ras_compile") or "not installed"),
    ]
    found.append(_pytorch())
    for name, why in (
        ("diffusers", "attach needs it: pip install 'ras_compile[diffusers]'"),
        ("transformers", "the text encoders of pipelines need it: pip install 'ras_compile[diffusers]'"),
        ("pillow", "reports need it: pip install pillow"),
    ):
        version = _version(name)
        found.append(Finding(name, version) if version else Finding(name, "not installed", "slow", why))
    return [*found, *_device()]


def _pytorch() -> Finding:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            canaries.check()
    except RASError as error:
        return Finding("torch", torch.__version__, "bad", str(error))
    changed = canaries.changed()
    if changed:
        what = "; ".join(f"{name} {why}" for name, why in changed.items())
        return Finding("torch", torch.__version__, "bad", f"{what}: install PyTorch {versions.TESTED}")
    if not versions.is_tested():
        return Finding("torch", torch.__version__, "slow", f"it was not tested; PyTorch {versions.TESTED} were")
    return Finding("torch", torch.__version__)


def _device() -> list[Finding]:
    if torch.cuda.is_available():
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        device = Finding("device", f"{name}, {memory / 1e9:.0f} GB")
        triton = _version("triton")
        if triton:
            return [device, Finding("triton", triton)]
        return [device, Finding("triton", "not installed", "bad", "GPU programs need it: pip install triton")]
    device = Finding(
        "device",
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "slow",
        "no CUDA device is seen, so pictures take long; with one, install a PyTorch built for CUDA",
    )
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++", "cl"))), None)
    if compiler:
        return [device, Finding("C++ compiler", compiler)]
    return [
        device,
        Finding("C++ compiler", "none", "slow", "programs run uncompiled on a CPU without one: install g++"),
    ]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
