"""Which versions of PyTorch were tested."""

from __future__ import annotations

import re

import torch

from ras_compile.errors import RASError

FIRST, LAST = (2, 11), (2, 14)
TESTED = " to ".join(".".join(map(str, version)) for version in (FIRST, LAST))


def is_tested() -> bool:
    """Whether this PyTorch is among them; a nightly build counts as the version that it is to be, a name of no numbers as none."""
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    return found is not None and FIRST <= tuple(map(int, found.groups())) <= LAST


def cannot_run(reason: str) -> RASError:
    """The one error on a PyTorch that lacks what is needed, or has changed it."""
    return RASError(f"ras_compile cannot run on PyTorch {torch.__version__} ({reason}); install PyTorch {TESTED}.")
