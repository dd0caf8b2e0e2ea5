"""Region-adaptive sampling for Diffusion Transformers as a torch.compile backend (RAS, arXiv 2502.10389)."""

from ras_compile.attach import attach
from ras_compile.config import ConfigError, RASConfig
from ras_compile.explain import Explanation, explain
from ras_compile.generation import generation
from ras_compile.memory import release
from ras_compile.notices import RASWarning
from ras_compile.passes.errors import RASError, SpecViolation, UnsupportedGraph, UnusableInput
from ras_compile.trace import trace

__all__ = [
    "ConfigError",
    "Explanation",
    "RASConfig",
    "RASError",
    "RASWarning",
    "SpecViolation",
    "UnsupportedGraph",
    "UnusableInput",
    "attach",
    "explain",
    "generation",
    "release",
    "trace",
]
