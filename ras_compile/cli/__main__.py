"""`python -m ras_compile.cli` is the command `ras-compile`."""

from ras_compile.cli import main

main()
