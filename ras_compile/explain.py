"""`explain`: what the compiler makes of a transformer, and why."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from .backend import graph_break


class _Recorded(Exception):
    """Leaves the model's forward once its graph has been seen."""


def record_call(transformer: nn.Module, inputs: dict[str, Any]) -> tuple[fx.GraphModule, list[Any]]:
    """The graph that Dynamo makes of ``transformer(**inputs)``, and the inputs that it is called with. Nothing is run.

    Raises:
        UnsupportedGraph: Dynamo breaks the graph.
    """
    graphs: list[fx.GraphModule] = []
    held: list[Any] = []

    def record(graph: fx.GraphModule, example_inputs: list[Any], **kwargs: Any) -> Any:
        graphs.append(graph)

        def leave(*values: Any) -> Any:
            held.extend(values)
            raise _Recorded

        return leave

    module = getattr(transformer, "_orig_mod", transformer)

    def call(**kwargs: Any) -> Any:
        return module(**kwargs)

    # Dynamo keeps what it compiled with the code object: one of our own leaves the module's alone, and never fills up
    fresh = FunctionType(call.__code__.replace(), globals(), closure=call.__closure__)
    try:
        with torch.no_grad():
            torch.compile(fresh, backend=record, dynamic=False)(**inputs)
    except _Recorded:
        pass
    broken = graph_break(graphs[0])
    if broken is not None:
        raise broken
    return graphs[0], held
