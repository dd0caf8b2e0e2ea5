"""The command `ras-compile`: pictures, reports and measurements of one's own pipelines, without a line of code."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line."""
    try:
        from ras_compile.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"ras-compile needs {error.name}: pip install 'ras_compile[cli]'")
    app()
