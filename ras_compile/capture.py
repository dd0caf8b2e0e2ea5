"""Capture: from the graph that Dynamo hands over to functional, pre-dispatch ATen with static shapes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_export_module
from torch.fx.traceback import preserve_node_meta

from .flex import is_transform, spell_flex_attention
from .passes.errors import UnsupportedGraph
from .passes.normalize import normalize
from .passes.registry import source_line


class _Interpreter(fx.Interpreter):
    """Runs a Dynamo graph, and spells an op that cannot be functionalised on a view so that it can."""

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        # `fill_diagonal_` is `as_strided` inside; perturbed attention calls it on a part of its mask
        if target == "fill_diagonal_" and args[0].dim() == 2 and not any([*args[2:], *kwargs.values()]):
            args[0].diagonal().fill_(args[1])
            return args[0]
        return super().call_method(target, args, kwargs)


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


def capture(graph: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Normalises a Dynamo graph for the concrete ``inputs``.

    Args:
        graph: the graph that Dynamo gives to a backend; sizes may be symbolic.
        inputs: concrete inputs, in order; those that are no tensors are specialised on.

    Returns:
        A graph whose placeholders are the tensor inputs in order (then constants of the graph, see
        ``meta["constants"]``), and whose ops are functional: in-place writes on fresh tensors are rewritten.

    Raises:
        UnsupportedGraph: the graph writes into its inputs, uses function transforms, or cannot be traced.
    """
    graph = spell_flex_attention(graph, inputs)
    refuse_function_transforms(graph.graph)
    return export(_Bound(graph, inputs), [value for value in inputs if isinstance(value, Tensor)])


def export(bound: nn.Module, tensors: Sequence[Tensor]) -> fx.GraphModule:
    """Captures ``bound(*tensors)``: see :func:`capture`.

    Raises:
        UnsupportedGraph: it writes into its inputs, or cannot be traced.
    """
    try:
        with torch.no_grad(), preserve_node_meta(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            captured, signature = aot_export_module(bound, list(tensors), trace_joint=False, pre_dispatch=True)
    except UnsupportedGraph:
        raise
    except RuntimeError as error:
        raise UnsupportedGraph(f"the graph cannot be captured: {str(error).splitlines()[0]}") from error
    assert isinstance(captured, fx.GraphModule)
    if signature.user_inputs_to_mutate or signature.buffers_to_mutate:
        written = [*signature.user_inputs_to_mutate.values(), *signature.buffers_to_mutate.values()]
        raise UnsupportedGraph(f"the model writes into its inputs or buffers ({', '.join(map(str, written))})")
    lifted = [*signature.parameters, *signature.buffers]
    placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
    constants = [bound.get_parameter(n) if n in signature.parameters else bound.get_buffer(n) for n in lifted]
    for node in placeholders[: len(lifted)][::-1]:  # constants come last, so that inputs keep their places
        placeholders[-1].append(node) if node is not placeholders[-1] else None
    captured.graph.lint()
    captured.meta["constants"] = constants
    normalize(captured.graph)
    captured.recompile()
    return captured


def refuse_function_transforms(graph: fx.Graph) -> None:
    """Refuses `torch.func` transforms: tracing them a second time fails and leaves the thread's transform stack open."""
    for node in graph.nodes:
        if is_transform(node):
            raise UnsupportedGraph(
                "a graph that contains torch.vmap (flex_attention builds its block mask with it); a mask tensor is supported",
                op=str(getattr(node.target, "__name__", node.target)),
                source=source_line(node),
            )
