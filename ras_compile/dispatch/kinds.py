"""What a call of a compiled graph may be, what runs then, and what is said: decided here alone, from one table.

Dynamo hands a backend graphs, and not all of them are a transformer: a model that breaks Dynamo's graph arrives in parts,
block-wise compilation hands over one block at a time, a hook has a graph of its own. Only the whole model may run sparse.
The rows of :data:`KINDS` are tried in their order; the first four look at the call, the others at the graph, once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ras_compile._torch import RESUME_PREFIX, pytree, why_graph_ends
from ras_compile.capture.inputs import GraphInput, describe_arguments, find_timestep
from ras_compile.config import RASConfig
from ras_compile.dispatch.callers import caller_is_known, holder, is_call, receiver
from ras_compile.errors import UnsupportedGraph
from ras_compile.notices import LIBRARIES
from ras_compile.sampling.blocks import is_features, why_block
from ras_compile.versions import TESTED


@dataclass(frozen=True)
class Kind:
    """What a call may be."""

    name: str
    recognised: str  # what gives it away
    runs: str  # what runs
    said: str  # what the user is told


RECORDING = Kind(
    "a call that records gradients",
    "gradients are enabled, and an input or a weight wants one",
    "the graph as it is, without an inner compiler",
    "once, to sample under torch.no_grad()",
)
REFUSED = Kind(
    "a part of a model that was refused",
    "its model is called by `TracedModel.fall_back`, further up in this thread",
    "the graph, compiled as it is",
    "nothing: the model's refusal was told",
)
CAPTURED = Kind(
    "a part of a model that is traced in this very call",
    "the call that captured the model has not returned",
    "the graph as it is, without an inner compiler: no later call comes here",
    "nothing",
)
PART = Kind(
    "a part of a model, before or behind a graph break",
    "Dynamo gives a reason for where the graph ends or begins; or the graph is that of a module inside of what was compiled, "
    "and holds less than a quarter of the weights or takes no timestep. It is no part if it runs to the model's end and gets "
    "the call's own tensors, or copies: a hook that only moves weights breaks the graph before anything is computed",
    "the model is traced instead; while that is impossible, the graph, compiled as it is",
    "nothing, or once why the model cannot be traced",
)
HOOK = Kind(
    "the graph of a hook",
    "it holds no weights, so nothing would know it again at the next step",
    "the graph, compiled as it is",
    "nothing",
)
UNKNOWN = Kind(
    "a graph of which nobody can say who calls it",
    "Dynamo calls it, and the stack shows none of the frames by which Dynamo calls what was compiled",
    "the graph, compiled as it is",
    "once, that this version of PyTorch is not known",
)
BLOCK = Kind(
    "one block of a transformer",
    "a module's code calls the compiled one and holds more weights, and no argument is a timestep: see `sampling/blocks.py`",
    "the graph, compiled as it is",
    "once, to compile the whole transformer instead",
)
WHOLE = Kind(
    "the whole model",
    "it is none of the others",
    "the dense or the sparse program of its plan, as the step wants it; without a plan, the graph compiled as it is",
    "nothing, or once why it has no plan",
)
KINDS = (RECORDING, REFUSED, CAPTURED, PART, HOOK, UNKNOWN, BLOCK, WHOLE)


class GraphBreak(UnsupportedGraph):
    """A graph that is a part of a model.

    Attributes:
        where: file and line of the break, the same for both sides of it.
        to_the_end: nothing of the function that was broken comes behind the graph.
    """

    def __init__(self, reason: str, source: str, where: tuple[str, int | None], *, to_the_end: bool = False) -> None:
        super().__init__(reason, source=source)
        self.where, self.to_the_end = where, to_the_end

    def again(self) -> GraphBreak:
        """The same error without the traceback of where it was raised before."""
        assert self.source is not None
        return GraphBreak(self.reason, self.source, self.where, to_the_end=self.to_the_end)


def gradients_recorded() -> UnsupportedGraph:
    """The error of a call that records gradients."""
    return UnsupportedGraph("gradients are being recorded; sample under torch.no_grad() or inference_mode()")


def records_gradients(values: Iterable[Any]) -> bool:
    """Whether autograd would record a call with these inputs and weights."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


def kind_of_graph(
    broken: GraphBreak | None, inputs: Sequence[GraphInput], values: Sequence[Any], config: RASConfig
) -> tuple[Kind, UnsupportedGraph | None]:
    """What a graph is by itself, at its first call that is nothing special; and the error that says so, if it is refused.

    Args:
        broken: what :func:`graph_break` or :func:`part_of` have found when Dynamo handed the graph over; None where
            :func:`arguments_of` have shown that the graph is whole all the same.
    """
    if broken is not None:
        return PART, broken
    if not any(given.weight for given in inputs):
        return HOOK, None
    if not caller_is_known():
        return UNKNOWN, UnsupportedGraph(
            "PyTorch does not show who calls the compiled graph, so that one block of a transformer could not be told from the "
            f"whole; this version of PyTorch ({torch.__version__}) is not known; PyTorch {TESTED} is supported"
        )
    time = find_timestep(inputs, values, config.timestep)
    why = why_block(holder, None if time is None else values[time])
    return (BLOCK, UnsupportedGraph(why)) if why else (WHOLE, None)


def arguments_of(
    broken: GraphBreak,
    inputs: Sequence[GraphInput],
    values: Sequence[Any],
    forward: Callable[..., Any],
    args: tuple,
    kwargs: dict,
) -> list[GraphInput] | None:
    """The inputs of a graph behind a break that is the whole model all the same, by the names of the model's arguments.

    Nothing comes behind it, and nothing was computed before it: each tensor that it is given is a weight, or an argument of the
    model's call, or a copy of one (a hook may move arguments to a device). None for any other graph.
    """
    if not broken.to_the_end:
        return None
    own = list(zip(describe_arguments(forward, args, kwargs), pytree.tree_leaves((args, kwargs)), strict=True))
    own = [(given, leaf) for given, leaf in own if isinstance(leaf, Tensor)]
    found = []
    for given, value in zip(inputs, values, strict=True):
        if given.weight or not isinstance(value, Tensor):
            found.append(given)
            continue
        named = sorted(own, key=lambda pair: (pair[1] is not value, f"[{pair[0].argument!r}]" not in given.path))
        argument = next((argument for argument, leaf in named if leaf is value or _copied(leaf, value)), None)
        if argument is None:
            return None
        found.append(argument)
    return found


def _copied(tensor: Tensor, copy: Tensor) -> bool:
    alike = tensor.shape == copy.shape and tensor.dtype == copy.dtype
    return alike and torch.equal(tensor, copy.to(tensor.device))


def graph_break(graph: fx.GraphModule) -> GraphBreak | None:
    """The error of a graph that is only a part of the model's forward, because Dynamo broke it; None for a whole one."""
    reason = why_graph_ends(graph)
    frames = list(reason.user_stack) if reason is not None else []
    if reason is None or not frames:
        return None
    where = frames[-1].filename, frames[-1].lineno
    source = f"{where[0]}:{where[1]} in {frames[-1].name}"
    if reason.graph_break:
        text = str(reason.reason).strip().splitlines()[0]
        return GraphBreak(f"Dynamo broke the model's graph ({text}); a model must be one graph", source, where)
    resumed = next((f for f in frames if f.name.startswith(RESUME_PREFIX)), None)
    if resumed is not None:
        line = int(resumed.name.rpartition("_")[2])
        text = f"the graph is the rest of a model behind a graph break in line {line}; a model must be one graph"
        return GraphBreak(text, source, (resumed.filename, line), to_the_end=True)
    return None


def part_of(inputs: Sequence[GraphInput], values: Sequence[Any], config: RASConfig) -> GraphBreak | None:
    """The error of a graph that Dynamo made of a module or a function inside of the model; None for the model itself.

    Where Dynamo gives a frame up (a break inside of a loop, say) it compiles the functions that the frame calls. While it does
    so, the frame stands on the stack, between here and the call of what the user compiled.
    """
    root, inner, caller = None, None, None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_call(frame.f_code):
        module = receiver(frame)
        if isinstance(module, nn.Module) and not isinstance(module, fx.GraphModule):
            root, inner = module, module if inner is None else inner
        if caller is None and not frame.f_code.co_filename.startswith(LIBRARIES):
            caller = frame
        frame = frame.f_back
    if frame is None or caller is None or root is None:
        return None
    weights, held = sum(given.weight for given in inputs), sum(1 for _ in root.parameters())
    if 4 * weights >= held:
        time = find_timestep(inputs, values, config.timestep)
        if inner is root or (time is not None and not is_features(values[time])):
            return None
    where = caller.f_code.co_filename, caller.f_lineno
    text = (
        f"Dynamo broke the model's graph: what it compiles holds {weights} of {held} weights; a model must be one graph"
    )
    return GraphBreak(text, f"{where[0]}:{where[1]} in {caller.f_code.co_name}", where)
