"""Capture: from the graph that Dynamo hands over to functional, pre-dispatch ATen with static shapes."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.traceback import preserve_node_meta
from torch.nn import functional as F

from ras_compile._torch import (
    FakeTensor,
    enter_autocast,
    enter_inference_mode,
    exit_inference_mode,
    set_grad_mode,
)
from ras_compile.capture.flex import is_transform, spell_flex_attention
from ras_compile.capture.functional import functional
from ras_compile.capture.inputs import describe_inputs
from ras_compile.capture.repeats import NotRepeated, forget, shortened, written_out
from ras_compile.capture.shards import of_parts
from ras_compile.errors import UnsupportedGraph, first_line
from ras_compile.notices import fell_back
from ras_compile.passes.analysis.normalize import normalize
from ras_compile.passes.analysis.roles import Role
from ras_compile.passes.rules.registry import source_line

log = logging.getLogger(__name__)

# Calls of a part of a Dynamo graph, with how many arguments of theirs stand before the part's own; inference has no use
# for what they say beside (that activations are not kept, that the part is compiled once).
_PARTS = {
    torch.ops.higher_order.tag_activation_checkpoint: 1,
    torch.ops.higher_order.invoke_subgraph: 2,
}


# They return their operand where they drop nothing.
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
# PyTorch's own: they must be given `train`, by its name or as the third argument.
_ATEN_DROPOUTS = {torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout}


def _drops(target: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    if target in _ATEN_DROPOUTS:
        return bool(kwargs["train"] if "train" in kwargs else args[2])
    given = inspect.signature(target).bind(*args, **kwargs)
    given.apply_defaults()
    return bool(given.arguments["training"])


_AT_LEAST = {torch.atleast_1d, torch.atleast_2d, torch.atleast_3d}


def _as_views(target: Any, args: tuple) -> Any:
    """What a function returns that only shows its operand here, by ops that say so; None for all other calls."""
    several = args[0] if len(args) == 1 and isinstance(args[0], (list, tuple)) else args
    if target in _AT_LEAST and several is not args:
        return tuple(target(tensor) for tensor in several)
    if target is torch.meshgrid and len(several) == 1:
        return (several[0].view(-1),)  # one without dimensions has one
    if target is torch.einsum and len(args) == 2:
        operand = args[1][0] if isinstance(args[1], (list, tuple)) and len(args[1]) == 1 else args[1]
        order = _permutation(args[0], operand.dim()) if isinstance(operand, Tensor) else None
        return None if order is None else operand.permute(order)
    return None


def _permutation(equation: str, dims: int) -> list[int] | None:
    """The order of dimensions that an einsum of one operand returns; None where it does more than that."""
    given, arrow, wanted = equation.replace(" ", "").replace("...", ".").partition("->")
    spelled = [*given.replace(".", "")]
    rest = [f".{index}" for index in range(dims - len(spelled))]
    names = [name for letter in given for name in (rest if letter == "." else [letter])]
    found = [name for letter in wanted for name in (rest if letter == "." else [letter])]
    if not arrow or len(set(names)) < len(names) or sorted(found) != sorted(names):
        return None
    return [names.index(name) for name in found]


# Methods that give a tensor another type.
_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double"}


def refuse_lost_cast(node: fx.Node, operand: fx.Node, before: Any, after: Any) -> None:
    """Refuses a cast that changes a type as Dynamo knows it, and none in the trace, which would leave it out.

    So it is behind `torch.autocast` inside of a model: the trace records its borders and does not enter it.
    """
    was, now = (each.meta.get("example_value") for each in (operand, node))
    if not isinstance(was, Tensor) or not isinstance(now, Tensor) or was.dtype not in (torch.bfloat16, torch.float16):
        return
    within = any(each.target is enter_autocast for each in node.graph.nodes)
    if within and before.dtype == after.dtype == now.dtype != was.dtype:
        raise UnsupportedGraph(
            f"torch.autocast inside of the model makes a value {was.dtype} that is cast to {now.dtype}, which cannot be followed; "
            "put autocast around the whole call",
            source=source_line(node),
        )


class _Interpreter(fx.Interpreter):
    """Runs a Dynamo graph as it can be traced.

    Parts are run in their places, inference mode (which the trace cannot be in, and which changes no value) is left out, what
    is filled with a number that is a tensor now is that tensor, repeated, and an op that cannot be functionalised on a view is
    spelled so that it can. Ops that may return their very operand, though their schema does not say so, are spelled by such
    whose schema does: tracing would take the two for different tensors, and a write into one would not be seen in the other.
    """

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op.startswith("call") and n.args and isinstance(n.args[0], fx.Node) and n.target in _CASTS:
            refuse_lost_cast(n, n.args[0], self.env.get(n.args[0]), result)
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in (enter_inference_mode, exit_inference_mode):
            return None
        if target in _PARTS:
            return _Interpreter(args[0]).run(*args[_PARTS[target] :])
        if target in _DROPOUTS | _ATEN_DROPOUTS and not _drops(target, args, kwargs):
            return args[0] if args else kwargs["input"]
        views = _as_views(target, args)
        if views is not None:
            return views
        # a subclass's plain tensor: no op says it
        if target is Tensor and len(args) == 1 and isinstance(args[0], Tensor):
            return args[0].detach()
        if target is torch.broadcast_tensors:
            tensors = args[0] if args and isinstance(args[0], (list, tuple)) else args
            shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
            return tuple(tensor.expand(shape) for tensor in tensors)
        made = filled(target, args, kwargs)
        return made if made is not None else super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        # `fill_diagonal_` is `as_strided` inside; perturbed attention calls it on a part of its mask
        if target == "fill_diagonal_" and args[0].dim() == 2 and not any([*args[2:], *kwargs.values()]):
            args[0].diagonal().fill_(args[1])
            return args[0]
        if target == "sum_to_size":
            size = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
            if args[0].shape == torch.Size(size):
                return args[0]
        if target == "type_as" and isinstance(args[0], Tensor) and not kwargs:
            return args[0].to(args[1].device, args[1].dtype)
        made = filled(getattr(Tensor, target, None), args, kwargs)
        return made if made is not None else super().call_method(target, args, kwargs)


def filled(target: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """What `torch.full` and its kind make of a number that is a 0-d tensor: itself, repeated. None for all other calls."""
    if (
        target not in (torch.full, torch.full_like, Tensor.new_full)
        or len(args) < 2
        or not isinstance(args[-1], Tensor)
    ):
        return None
    value, named = args[-1], {name: given for name, given in kwargs.items() if given is not None}
    like = args[0] if isinstance(args[0], Tensor) else None
    size = args[1] if len(args) == 3 else args[0] if like is None else like.shape
    dtype = torch.get_default_dtype() if value.is_floating_point() else value.dtype
    device, dtype = (None, dtype) if like is None else (like.device, like.dtype)
    return value.to(named.get("device", device), named.get("dtype", dtype)).expand(size).clone()


class _Bound(nn.Module):
    """The captured graph as a function of its tensors alone; numbers are baked in."""

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.graph_module = graph
        self.inputs = [None if isinstance(value, Tensor) else value for value in inputs]

    def forward(self, *tensors: Tensor) -> tuple:
        given = iter(tensors)
        # an interpreter hands on the nodes' stack traces: the user's source lines
        interpreter = _Interpreter(self.graph_module)
        result = interpreter.run(*[next(given) if value is None else value for value in self.inputs])
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def capture(
    graph: fx.GraphModule, inputs: Sequence[Any], *, symbolic: Callable[[Any], Any] | None = None
) -> fx.GraphModule:
    """Normalises a Dynamo graph for the concrete ``inputs``.

    Args:
        graph: the graph that Dynamo gives to a backend; sizes may be symbolic.
        inputs: concrete inputs, in order; those that are no tensors are specialised on.
        symbolic: given where the inputs are fake, with symbolic sizes: spelling things in one way is left for when they are
            static. Takes a fake tensor of Dynamo's and returns it with sizes in the symbols of the inputs.

    Returns:
        A graph whose placeholders are the tensor inputs in order (then constants of the graph, see
        ``meta["constants"]``), and whose ops are functional: in-place writes on fresh tensors are rewritten.

    Raises:
        UnsupportedGraph: the graph writes into its inputs, uses function transforms, or cannot be traced.
    """
    graph = spell_flex_attention(of_parts(graph), inputs)
    for part in graph.modules():
        if isinstance(part, fx.GraphModule):
            refuse_function_transforms(part.graph)
    given = [pair for pair in zip(describe_inputs(graph.graph), inputs, strict=True) if isinstance(pair[1], Tensor)]
    names, tensors = [described.path for described, _ in given], [value for _, value in given]
    try:
        return by_blocks(graph, inputs, tensors, symbolic)
    except NotRepeated as error:
        log.debug("the graph is captured whole: %s", error)
    except Exception as error:  # of whatever kind, the whole graph says it better
        fell_back("a graph captured whole and not by its blocks", error)
    return export(_Bound(graph, inputs), tensors, names, symbolic=symbolic is not None)


def by_blocks(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    tensors: Sequence[Tensor],
    symbolic: Callable[[Any], Any] | None = None,
) -> fx.GraphModule:
    """:func:`capture` of a graph with repeated blocks, each of which is traced once.

    Raises:
        NotRepeated: the graph has to be captured whole; so it has after any other error.
    """
    short, blocks = shortened(graph, symbolic)
    try:
        captured = traced(_Bound(short, inputs), tensors)
        written_out(captured, blocks, lambda block, operands: traced(_Bound(block, operands), operands))
    finally:
        forget(blocks)
    return captured if symbolic else normalized(captured)


def export(
    bound: nn.Module, tensors: Sequence[Tensor], names: Sequence[str] = (), *, symbolic: bool = False
) -> fx.GraphModule:
    """Captures ``bound(*tensors)``: see :func:`capture`.

    Args:
        names: what the user calls the tensors, where that is known.

    Raises:
        UnsupportedGraph: it writes into its inputs, or cannot be traced.
    """
    captured = traced(bound, tensors, names)
    return captured if symbolic else normalized(captured)


def normalized(captured: fx.GraphModule) -> fx.GraphModule:
    normalize(captured.graph)
    captured.recompile()
    return captured


def traced(bound: nn.Module, tensors: Sequence[Tensor], names: Sequence[str] = ()) -> fx.GraphModule:
    """:func:`export` without the spelling of things in one way."""
    # constants come last, so that inputs keep their places
    held: dict[str, Tensor] = dict(bound.named_parameters(remove_duplicate=False))
    held |= bound.named_buffers(remove_duplicate=False)
    try:
        with torch.no_grad(), same_autocast(), preserve_node_meta(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            captured, written = functional(bound, tensors, held)
    except UnsupportedGraph:
        raise
    except Exception as error:  # whatever PyTorch raises where it cannot trace an op
        raise UnsupportedGraph(f"the graph cannot be captured: {first_line(error)}") from error
    if written:
        called = [*(names or ["an argument"] * len(tensors)), *held]
        raise UnsupportedGraph(
            f"the model writes into its inputs or buffers ({', '.join(called[place] for place in written)})",
            source=next((line for node in written.values() if (line := source_line(node))), None),
        )
    refuse_lost_values(captured)
    refuse_effects(captured.graph)
    drop_grad_modes(captured.graph)
    for index, node in enumerate(captured.graph.find_nodes(op="placeholder")):
        node.meta["role"] = Role.INPUT if index < len(tensors) else Role.CONSTANT
    captured.graph.lint()
    captured.meta["constants"] = [*held.values()]
    return captured


def refuse_lost_values(captured: fx.GraphModule) -> None:
    """Refuses what a captured graph holds and cannot repeat.

    Constants that are fake are values that were made past the tracer, of which only the sizes are left: a compiled program that
    reads one ends the process. Any other object is the one of the trace: a `torch.Generator` that the model makes and seeds in
    each call would be made once, and go on from step to step.
    """
    for node in captured.graph.find_nodes(op="get_attr"):
        value = attrgetter(str(node.target))(captured)
        line = source_line(next(iter(node.users), node))
        if isinstance(value, FakeTensor):
            raise UnsupportedGraph(
                "a tensor is made in a way that cannot be followed (by a tensor subclass of the weights, say); plain tensors, "
                "and subclasses that are made of them as torchao's are, are supported",
                source=line,
            )
        if not isinstance(value, (Tensor, nn.Module)):
            raise UnsupportedGraph(
                f"an op uses a {type(value).__name__} that the model makes or holds; tensors and numbers are supported (draw "
                "random numbers beforehand, into a buffer)",
                source=line,
            )


def refuse_effects(graph: fx.Graph) -> None:
    """Refuses ops that have effects, which are ordered by tokens: a step that leaves rows out would have others."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.with_effects):
        raise UnsupportedGraph(f"the model calls an op that has effects ({node.args[1]})", source=source_line(node))


def drop_grad_modes(graph: fx.Graph) -> None:
    """Takes out the borders of `torch.no_grad()` and `torch.enable_grad()` inside of a model: nothing captured is recorded."""
    for node in graph.find_nodes(op="call_function", target=set_grad_mode):
        graph.erase_node(node)


@contextmanager
def same_autocast() -> Iterator[None]:
    """Closes an autocast region that a capture left open: in PyTorch 2.11 one that fails inside of a region does."""

    def state(kind: str) -> tuple[bool, torch.dtype]:
        return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    before = {kind: state(kind) for kind in ("cpu", "cuda")}
    try:
        yield
    finally:
        for kind, (enabled, dtype) in before.items():
            if state(kind) != (enabled, dtype):
                torch.set_autocast_enabled(kind, enabled)
                torch.set_autocast_dtype(kind, dtype)
                if torch.autocast_decrement_nesting() == 0:
                    torch.clear_autocast_cache()


def refuse_function_transforms(graph: fx.Graph) -> None:
    """Refuses `torch.func` transforms: tracing them a second time fails and leaves the thread's transform stack open."""
    for node in graph.nodes:
        if is_transform(node):
            raise UnsupportedGraph(
                "a graph that contains torch.vmap (flex_attention builds its block mask with it); a mask tensor is supported",
                op=str(getattr(node.target, "__name__", node.target)),
                source=source_line(node),
            )
