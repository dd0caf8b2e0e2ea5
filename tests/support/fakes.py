"""A transformer without a network, driven by the runtime, that knows the truth about every call.

The loop that calls it says which generation, branch and step it is really in; the fake checks at each sparse call that
what its caches hold comes from the same branch of the same generation, one step before, and that the warm-up is over.
So every test that runs a loop through it also tests that no sparse step comes too early or from stale data.
"""

import threading
import zlib

import torch

from ras_compile import RASConfig
from ras_compile.passes.algebra.tokens import TokenView
from ras_compile.sampling.calls import CallInfo
from ras_compile.sampling.state import TransformerState

TOKENS, CHANNELS = 16, 4


class FakeTransformer:
    """Has a dense step every eight, unless told otherwise: what the short runs of tests count on is the warm-up alone."""

    def __init__(self, **options):
        self.config = RASConfig.from_options(
            options if "preset" in options else {"reset_interval": 8, "reset_from": "start", **options}
        )
        self.state = TransformerState(self.config)
        self.calls = []  # (generation, branch, step, kind, reason)
        self.kept = {}  # what each branch keeps
        self._lock = threading.Lock()

    def __call__(self, latent, timestep, *context, truth, graph="graph"):
        generation, branch, step = truth
        batch, tokens, _ = latent.shape
        view = TokenView((), frozenset({1}), tuple(latent.shape), (0, 1, 2), (batch, tokens, 1), None)
        call = CallInfo((graph, latent.shape), latent, context, timestep, batch, tokens, (4, tokens // 4), view=view)
        decision = self.state.decide(call)
        noise = torch.randn(
            latent.shape, generator=torch.Generator().manual_seed(zlib.crc32(repr((branch, step)).encode()))
        )
        if decision.kind == "sparse":
            assert step >= self.config.warmup_steps, f"sparse at step {step}"
            assert decision.slots["truth"] == (generation, branch, step - 1), (decision.slots, truth)
            assert decision.rows.shape == (batch, decision.active)
            assert not decision.reason
            noise = decision.slots["noise"].scatter(1, decision.rows[..., None].expand(-1, -1, noise.shape[-1]), noise)
        else:
            assert decision.rows is None and decision.active == tokens and decision.reason
        decision.slots.update(truth=truth, noise=noise)
        self.kept[branch] = decision.slots
        self.state.record(call, decision, noise, noise, view)
        with self._lock:
            self.calls.append((generation, branch, step, decision.kind, decision.reason))
        return noise.clone()

    def kinds(self, generation=None, branch=None):
        """One letter per call: d(ense) or s(parse); of the last generation unless told otherwise."""
        generation = self.calls[-1][0] if generation is None else generation
        return "".join(kind[0] for gen, name, _, kind, _ in self.calls if gen == generation and branch in (None, name))


def prompts(*names, batch=1, length=3):
    """Contexts for branches: a dict of name -> tuple of tensors; the second is one object shared by all branches."""
    shared = torch.arange(4.0)
    return {name: (torch.randn(batch, length, 8), shared) for name in names}


def denoise(
    model,
    times,
    contexts,
    *,
    each=None,
    only=None,
    latent=None,
    in_place=False,
    fresh_latent=False,
    stop=None,
    gen=None,
    context_of=lambda context, step: context,
):
    """A denoising loop as pipelines write it. Returns its identity and the final latent.

    Args:
        contexts: name -> context of the guidance branches, called in this order.
        each: called with the step before its model calls.
        only: (name, step) -> whether that branch is called.
        in_place: update the latent in place instead of making a new one.
        fresh_latent: pass a new latent object at each call.
        stop: leave after so many steps, as an aborted run does.
        gen: a `ras_compile.generation` to step.
        context_of: what the pipeline makes of a context at a step.
    """
    number = object()  # equal to no number that a test gives its own loops
    latent = torch.randn(1, TOKENS, CHANNELS) if latent is None else latent
    for step, time in enumerate(times):
        if step == stop:
            break
        if each:
            each(step)
        if gen:
            gen.step()
        noises = [
            model(
                latent.clone() if fresh_latent else latent,
                time,
                *context_of(context, step),
                truth=(number, name, step),
                graph=str([value.shape for value in context if isinstance(value, torch.Tensor)]),
            )
            for name, context in contexts.items()
            if only is None or only(name, step)
        ]
        noise = sum(noises) / max(1, len(noises))
        if in_place:
            latent.add_(noise, alpha=-0.1)
        else:
            latent = latent - 0.1 * noise
    return number, latent


def falling(steps, start=1000.0):
    return [torch.tensor([start * (1 - step / steps)]) for step in range(steps)]


def rising(steps):
    return [torch.tensor([step / steps]) for step in range(steps)]
