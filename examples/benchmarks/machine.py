"""The machine and the versions that figures belong to."""

from __future__ import annotations

import datetime
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe", "short_name"]


def describe(script: str, argv: Sequence[str], device: torch.device, **more: Any) -> dict:
    """Device, versions, and the command (without its output folder), for a result's meta.

    Args:
        script: the script's file.
        argv: its arguments.
        device: where it measures.
        **more: further entries.
    """
    shown = [part for at, part in enumerate(argv) if part != "--out" and (at == 0 or argv[at - 1] != "--out")]
    command = shlex.join(["python", f"examples/benchmarks/{Path(script).name}", *shown])
    cuda = device.type == "cuda"
    return dict(
        gpu=torch.cuda.get_device_name(device) if cuda else None,
        driver=_driver() if cuda else None,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        triton=_version("triton"),
        diffusers=_version("diffusers"),
        python=".".join(map(str, sys.version_info[:3])),
        dtype=str(dtype_of(device)).removeprefix("torch."),
        **more,
        commands=[dict(command=command, date=datetime.date.today().isoformat())],
    )


def dtype_of(device: torch.device) -> torch.dtype:
    """What is measured: bf16, and fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def short_name(device: torch.device) -> str:
    """The name of a device's results: `NVIDIA H200` -> `h200`."""
    if device.type != "cuda":
        return device.type
    return "-".join(word.lower() for word in torch.cuda.get_device_name(device).split() if word != "NVIDIA")


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
