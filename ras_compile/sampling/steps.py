"""One model call on a plan: asks the transformer's state what to run, runs it, and tells the state."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from ras_compile.config import RASConfig
from ras_compile.plans.plan import Plan
from ras_compile.sampling.registry import state_for
from ras_compile.sampling.state import CallInfo


def run_step(
    plan: Plan,
    given: Sequence[Any],
    *,
    graph: Hashable,
    latent: Tensor,
    context: tuple[Any, ...],
    timestep: Any,
    weights: Sequence[Tensor],
    config: RASConfig,
) -> list[Any]:
    """Runs the dense or the sparse program, as the step wants it; returns the graph's outputs.

    Args:
        plan: the plan.
        given: the inputs, as the plan's graph takes them.
        graph, latent, context, timestep: see :class:`CallInfo`; the user's own objects.
        weights: they say which transformer it is.
        config: the options.
    """
    state, call = state_for(weights, config), describe(plan, graph, latent, context, timestep, weights)
    decision = state.decide(call)
    try:
        if decision.rows is None:
            outputs = plan.dense(given, decision.slots, decision.spare)
        else:
            outputs = plan.run_sparse(given, decision.rows, decision.slots)
    except BaseException:
        state.fail(decision)
        raise
    state.record(call, decision, plan.cached_noise(decision.slots), outputs, plan.noise_view)
    state.extrapolate(decision, outputs[plan.noise], plan.noise_view)
    return outputs


def count_step(
    plan: Plan,
    *,
    graph: Hashable,
    latent: Tensor,
    context: tuple[Any, ...],
    timestep: Any,
    weights: Sequence[Tensor],
    config: RASConfig,
) -> None:
    """Counts a call that runs dense past the plan, and so keeps nothing. Arguments as of :func:`run_step`."""
    state, call = state_for(weights, config), describe(plan, graph, latent, context, timestep, weights)
    decision = state.decide(call)
    decision.kind, decision.rows, decision.active = "dense", None, call.tokens
    decision.reason = "the model was captured in this call"
    state.record(call, decision, None, None)


def describe(
    plan: Plan, graph: Hashable, latent: Tensor, context: tuple[Any, ...], timestep: Any, weights: Sequence[Tensor]
) -> CallInfo:
    """The call, as the state of its transformer sees it."""
    frame = plan.analysis.frame
    return CallInfo(
        graph,
        latent,
        context,
        timestep,
        frame.samples,
        frame.tokens,
        frame.grid,
        view=plan.latent_view,
        cost=lambda: plan.cost,
        weights=weights,
    )
