"""What is told of one model call, what it is answered, and the generation that it is part of."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ras_compile.config import RASConfig
from ras_compile.passes.algebra.layout import Group
from ras_compile.passes.algebra.tokens import TokenView
from ras_compile.passes.analysis.cost import Cost
from ras_compile.plans.spread import Spread
from ras_compile.sampling.branches import Branch, Branches, Contents
from ras_compile.sampling.inference import TimeLine
from ras_compile.sampling.locate import Place
from ras_compile.sampling.records import Record
from ras_compile.sampling.rows import RowChooser
from ras_compile.sampling.schedule import Kind, Schedule


@dataclass
class CallInfo:
    """One model call, as the backend sees it."""

    graph: Hashable  # identity of the compiled plan (graph and shapes)
    latent: Tensor  # the latent, the user's own object
    # the user's other inputs in a fixed order, as objects: tensors, and numbers that tell branches apart
    context: tuple[Any, ...]
    timestep: Any  # the timestep, tensor or number, or None
    batch: int  # B, samples of the call
    tokens: int  # N, region tokens per sample
    grid: tuple[int, ...] = ()  # the region's token grid; its product is N
    view: TokenView | None = None  # the latent's token view, where the backend has it
    cost: Callable[[], Cost] | None = None  # gives the FLOPs of the programs, where the backend has them
    weights: Sequence[Tensor] = ()  # those that the graph reads, always in the same order
    spread: Spread | None = None  # the tokens of all processes, where each of them has the whole latent
    group: Group | None = None  # the processes that share the model


@dataclass(eq=False)
class Decision:
    """What the backend must run."""

    kind: Kind
    step: int  # step of the generation, from 0
    branch: str  # label of the guidance branch
    active: int  # A, active rows per sample (N when dense)
    rows: Tensor | None  # int64 [B, A], ascending, or None when dense
    reason: str  # why the call is dense
    slots: dict  # the backend's caches of this branch and graph; empty at the branch's first call of a generation
    # slots of a finished generation with the same graph, made by the same thread, or None. Its tensors may be
    # taken over and overwritten, so that addresses stay.
    spare: dict | None
    run: Run = field(repr=False)
    of: Branch = field(repr=False)
    place: Place = field(repr=False)
    time: Any = None  # of this call, for lines through noises


@dataclass(eq=False)
class Run:
    """One generation of one transformer."""

    key: Hashable
    base: int
    num_steps: int | None
    count: int | None  # of steps from `base` on, where known
    config: RASConfig
    schedule: Schedule
    chooser: RowChooser
    branches: Branches
    line: TimeLine | None = None
    step: int = -1
    kind: Kind = "dense"
    used: list[Branch] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    graphs: dict[str, Hashable] = field(default_factory=dict)  # by the branches' labels
    pending: int | None = None  # the thread whose call is under way
    epoch: int = 0
    terms: Tensor | None = None  # [entries, 2]: what makes predictions velocities, see `velocity.py`; None: they are
    # by graph: what its weights are read by, of which step, and the mark
    contents: dict[Hashable, tuple[Contents, int, Any]] = field(default_factory=dict)
