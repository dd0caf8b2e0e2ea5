"""How the spec speaks: a violation names the node, the reason and the user's source line."""

from __future__ import annotations

from torch import fx

from ras_compile._torch import enter_autocast, exit_autocast
from ras_compile.errors import SpecViolation
from ras_compile.passes.rules.registry import source_line

AMBIENT = (enter_autocast, exit_autocast)  # regions, not values


def demand(holds: bool, node: fx.Node, reason: str) -> None:
    """Raises :class:`SpecViolation` for ``node`` unless ``holds``."""
    if not holds:
        source = source_line(node)
        where = f" [at: {source}]" if source else ""
        raise SpecViolation(f"{node.name}: {reason} [node: {node.format_node() or node.name}]{where}")
