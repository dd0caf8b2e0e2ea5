"""Classes of the library that the contract is not run on, each with the reason."""

from __future__ import annotations

NOT_RUN: dict[str, str] = {
}
