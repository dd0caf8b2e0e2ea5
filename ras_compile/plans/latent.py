"""Which input of a model is the latent: each one that may be is tried, and the layouts that follow from it decide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ras_compile._torch import FakeTensor
from ras_compile.capture.inputs import GraphInput, latent_candidates
from ras_compile.config import RASConfig
from ras_compile.errors import ConfigError, UnsupportedGraph
from ras_compile.passes.algebra.layout import Frame
from ras_compile.passes.analysis.propagate import Analysis, propagate
from ras_compile.passes.rules.constants import FIXED
from ras_compile.passes.rules.ordering import KNOWN
from ras_compile.passes.rules.registry import nodes_in

LARGEST_FIXED = 2**20  # entries


def analyse(graph: fx.Graph, inputs: Sequence[GraphInput], values: Sequence[Any], config: RASConfig) -> Analysis:
    """Finds the latent among the inputs and propagates its layout.

    Args:
        graph: captured graph; its first placeholders are the tensor inputs in order.

    Raises:
        UnsupportedGraph: no input, or more than one, can be the latent, or an op is not supported.
        ConfigError: ``latent`` names no tensor argument.
    """
    try:
        candidates = latent_candidates(inputs, values, config.latent)
    except KeyError as error:
        raise ConfigError(
            f"option latent={config.latent!r} names no tensor argument; there are {error.args[0]}."
        ) from None
    placeholders = iter(graph.find_nodes(op="placeholder"))
    nodes = {index: next(placeholders) for index, value in enumerate(values) if isinstance(value, Tensor)}
    for node in graph.nodes:
        node.meta.pop(KNOWN, None)
    for index, node in nodes.items():
        node.meta["argument"] = inputs[index].path
        if is_fixed(inputs[index], values[index]):
            node.meta[FIXED] = values[index]
    outputs = [node.meta["val"] for node in _outputs(graph)]
    ranked = sorted(candidates, key=lambda index: likeness(values[index], outputs))
    found: list[tuple[int, int, Analysis]] = []
    reasons: list[UnsupportedGraph] = []
    for index in ranked:
        rank = likeness(values[index], outputs)
        if found and rank > found[0][0] and not unreached(outputs, [analysis for _, _, analysis in found]):
            break
        try:
            frame = frame_of(values[index], config)
            found.append((rank, index, propagate(graph, nodes[index], frame, kv_cache=config.kv_cache)))
        except UnsupportedGraph as error:
            reasons.append(error)
        except ConfigError:
            if not (found or reasons):  # else a likelier one was found, or has said what is wrong
                raise
    # as many pictures as outputs: the largest one is the region
    if of_their_own([analysis for _, _, analysis in found]):
        found = [max(found, key=lambda entry: entry[2].frame.tokens)]
    if len(found) > 1:
        arguments = [repr(inputs[index].argument) for _, index, _ in found]
        if len(set(arguments)) == 1:
            raise UnsupportedGraph(
                f"{arguments[0]} holds {len(found)} latents, each a picture of its own; one tensor of all samples is supported"
            )
        names = " and ".join(arguments)
        raise UnsupportedGraph(f"{names} could each be the latent; the option latent= names the one that is")
    if not found:
        raise reasons[0] if reasons else UnsupportedGraph("no token grid: the model has no floating-point tensor input")
    return found[0][2]


def is_fixed(given: GraphInput, value: Any) -> bool:
    """Whether a value is one of few whole numbers among the weights: an order of tokens, say, which a plan may rest on."""
    if not given.weight or not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return False
    return value.dtype in (torch.int64, torch.int32) and 1 < value.numel() <= LARGEST_FIXED and value.ndim > 0


def unreached(outputs: Sequence[Any], found: Sequence[Analysis]) -> bool:
    """Whether an output has no tokens of any latent found so far: there may be another one."""
    reached = {index for analysis in found for index in analysis.outputs}
    return any(isinstance(out, Tensor) and out.ndim > 1 and index not in reached for index, out in enumerate(outputs))


def of_their_own(found: Sequence[Analysis]) -> bool:
    """Whether each latent has outputs of its own, and one of them has more tokens than any other."""
    reached = [index for analysis in found for index in analysis.outputs]
    tokens = sorted(analysis.frame.tokens for analysis in found)
    return len(found) > 1 and len(reached) == len(set(reached)) and tokens[-1] > tokens[-2]


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    return nodes_in(graph.output_node().args)


def likeness(value: Tensor, outputs: Sequence[Any]) -> int:
    """How far an input is from looking like the noise: 0 for its very shape, 1 for all sizes but one, 2 otherwise."""
    best = 2
    for output in outputs:
        if isinstance(output, Tensor) and output.ndim == value.ndim:
            best = min(best, sum(a != b for a, b in zip(output.shape, value.shape, strict=True)))
    return best


def frame_of(latent: Tensor, config: RASConfig) -> Frame:
    if config.region is None:
        return Frame.of(latent.shape)
    if latent.ndim != 3:
        raise ConfigError(f"option region is for latents of packed tokens [B, N, C]; this one is {list(latent.shape)}.")
    tokens = int(latent.shape[1])
    if (config.region.stop or 0) > tokens:
        raise ConfigError(
            f"option region={config.region} ends behind the latent's {tokens} tokens; give those of the picture."
        )
    start, stop, _ = config.region.indices(tokens)
    if stop <= start:
        raise ConfigError(f"option region={config.region} holds none of the latent's {tokens} tokens.")
    return Frame.of(latent.shape, window=(start, stop))
