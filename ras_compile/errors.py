"""Every error and warning of ras_compile, and what to do about each. Raised where the knowledge is; imports nothing of ours."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its type, where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class RASError(RuntimeError):
    """Base of every error that ras_compile raises on purpose; catch it to catch them all.

    What to do: each subclass says so.
    """


class ConfigError(RASError, ValueError):
    """An option that does not exist, a value that is not allowed, or options that contradict each other in this run.

    What to do: the text lists what is allowed; change the option that it names.
    """


class UnsupportedGraph(RASError):
    """A model whose sparse step cannot be proved right. Raised with ``unsupported="error"``; by default it runs dense instead.

    What to do: look at the source line that the text names, and run :func:`ras_compile.explain` on one call of the model. An
    operation without a rule can be given one (docs/adding.md); a model that is right as it is can run dense.

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
    """A program that breaks the executable spec of its stage: a defect of the compiler, not of the model.

    What to do: report it with the text and, if you can, the folder that ``RAS_DEBUG=folder`` writes. The model runs dense.
    """


class UnusableInput(RASError):
    """Inputs on which the model itself fails, compiled or not, such as a latent whose sides its patches do not divide.

    What to do: change the input that the text names; the model's own error is the cause of this one.
    """


class RASWarning(UserWarning):
    """Something runs dense, or costs more than it must; the picture is right all the same.

    What to do: the text names the cause and what changes it. Each text is shown once a process.
    """
