"""Mutants that change nothing that a picture depends on, each with the reason: by file, function and change."""

from __future__ import annotations

EQUIVALENT: dict[str, str] = {}
