"""The one family of errors. Each is raised where the knowledge is and carries what a user needs to act on it."""

from __future__ import annotations


class RASError(RuntimeError):
    """Base of every error that ras_compile raises on purpose."""


class UnsupportedGraph(RASError):
    """A graph that cannot be proved right: names the op, the reason and the user's source line.

    Args:
        reason: one sentence that says what is not supported and what is.
        op: name of the operator, when one is to blame.
        source: the user's source line (from the node's ``stack_trace``), when known.
    """

    def __init__(self, reason: str, *, op: str | None = None, source: str | None = None) -> None:
        self.reason, self.op, self.source = reason, op, source
        parts = [reason]
        if op:
            parts.append(f"[op: {op}]")
        if source:
            parts.append(f"[at: {source}]")
        super().__init__(" ".join(parts))


class SpecViolation(RASError):
    """A graph that breaks the executable spec of its stage: a defect of the compiler, not of the user's model."""


class UnusableInput(RASError):
    """Inputs on which the model itself fails, compiled or not: a side that its patches do not divide, say."""


class ConfigError(RASError, ValueError):
    """An option that does not exist or a value that is not allowed; the text lists what is."""


class RASWarning(UserWarning):
    """Something runs dense, or costs more than it must; the picture is right all the same."""
