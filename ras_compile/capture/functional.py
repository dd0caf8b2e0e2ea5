"""From a function of tensors to functional ATen before dispatch: it runs once, on fake tensors, and each op becomes a node.

PyTorch's `aot_export_module` gives the same graph and runs the function twice: first for what it tells of gradients and aliases,
of which nothing is needed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from ras_compile._torch import (
    FakeTensor,
    FakeTensorMode,
    FunctionalTensor,
    FunctionalTensorMode,
    preserve_rng_state,
    python_dispatcher,
    use_lazy_graph_module,
)


def functional(
    module: nn.Module, tensors: Sequence[Tensor], held: Mapping[str, Tensor]
) -> tuple[fx.GraphModule, dict[int, fx.Node]]:
    """Captures ``module(*tensors)``.

    Args:
        tensors: real ones, or fake ones of one mode.
        held: the module's own tensors by their names; they become inputs, too.

    Returns:
        ``(graph, written)``: the graph of the tensors, then of what is held, in which no op writes; and by the place of each input
        that the module writes into the node of what stands there afterwards.
    """
    given = [*tensors, *held.values()]
    mode = next((tensor.fake_mode for tensor in given if isinstance(tensor, FakeTensor)), None) or FakeTensorMode()
    places: list[int] = []

    def run(*inputs: Tensor) -> list[Any]:
        wrapped: list[Any] = [FunctionalTensor.to_functional(value) for value in inputs]
        own = dict(zip(held, wrapped[len(tensors) :], strict=True))
        results = functional_call(module, own, tuple(wrapped[: len(tensors)]), tie_weights=False)
        after = [value.from_functional() for value in wrapped]
        places[:] = [place for place, value in enumerate(after) if value is not inputs[place]]
        return [*(after[place] for place in places), *map(_plain, results)]

    with torch.autograd.set_multithreading_enabled(False), preserve_rng_state(), mode, python_dispatcher():
        fakes = dict[int, Tensor]()
        for tensor in given:
            fake: Tensor = tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor, static_shapes=True)
            fake = fake.detach() if id(fake) in fakes else fake  # the tracer tells its inputs apart by the object
            fakes[id(fake)] = fake
        # discovery: ops that have effects are ordered by tokens, which the graph makes
        with (
            FunctionalTensorMode(pre_dispatch=True, export=True, _allow_token_discovery=True),
            use_lazy_graph_module(True),
        ):
            graph = make_fx(run, pre_dispatch=True, record_stack_traces=True)(*fakes.values())
    graph.graph.eliminate_dead_code()
    last = graph.graph.output_node()
    results: Any = last.args[0]
    last.args = (tuple(results[len(places) :]),)
    return graph, dict(zip(places, results, strict=False))


def _plain(value: Any) -> Any:
    return value.from_functional() if isinstance(value, FunctionalTensor) else value
