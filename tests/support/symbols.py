"""Graphs as Dynamo hands them over where some sizes are symbols."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn


def dynamic_graph(module: nn.Module, *given: Any, dims: dict[int, tuple[int, ...]]) -> tuple[fx.GraphModule, list]:
    """The graph of one call, and its inputs.

    Args:
        dims: by the argument's position, the dimensions whose sizes may change.
    """
    found: list[tuple[fx.GraphModule, list]] = []

    def backend(graph: fx.GraphModule, example_inputs: list) -> Any:
        def run(*values: Any) -> Any:
            found.append((graph, list(values)))
            return graph(*values)

        return run

    torch._dynamo.reset()
    given = tuple(
        value.clone() if isinstance(value, Tensor) else value for value in given
    )  # a mark stays with a tensor
    for place, marked in dims.items():
        assert isinstance(given[place], Tensor)
        for dim in marked:
            torch._dynamo.mark_dynamic(given[place], dim)
    with torch.no_grad():
        torch.compile(module, backend=backend)(*given)
    ((graph, values),) = found
    return graph, values
