"""Schedulers that add noise: inactive tokens hold their clean sample there, whatever `noise_reuse` says.

A noise that is held stays in the picture as grain where each step adds fresh noise (ancestral and SDE samplers, LCM): the
sampler counts on the prediction to take out what it has added. So does a noise that is continued on a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ras_compile._torch import TorchDispatchMode
from ras_compile.errors import ConfigError
from ras_compile.notices import warn_once
from ras_compile.pipelines.sample import sample_map
from ras_compile.pipelines.samplers import check_clean, clean_coefficients
from ras_compile.sampling.locate import Evaluation
from ras_compile.sampling.reuse import CleanSample, active_tokens


class Draws(TorchDispatchMode):
    """Sees whether this thread draws random numbers while it is open, from whatever generator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        return func(*args, **(kwargs or {}))


class CleanHold:
    """What the scheduler is given in one generation in place of the model's prediction.

    With `noise_reuse="x0"` inactive tokens hold their clean sample from the start. Else from the first step on in which
    the scheduler is seen to draw random numbers; until then nothing was added, and what is held is right.

    Attributes:
        refusal: why the clean sample of a scheduler that adds noise cannot be told; sparse steps are no use then.
    """

    def __init__(self) -> None:
        self.refusal = ""
        self._sample = CleanSample()
        self._adds_noise = False
        self._before: tuple[Any, ...] | None = None

    def stepping(
        self,
        scheduler: Any,
        given: dict[str, Any],
        prediction: Tensor,
        sample: Tensor,
        evaluations: Sequence[Evaluation],
    ) -> Tensor:
        """The prediction that the scheduler is to step with.

        Raises:
            ConfigError: with `noise_reuse="x0"`, where the clean sample cannot be told.
        """
        self._before = None
        if not evaluations or self.refusal:
            return prediction
        chosen = any(evaluation.noise_reuse == "x0" for evaluation in evaluations)
        if chosen or self._adds_noise:
            if not chosen and any(evaluation.rows is not None for evaluation in evaluations):
                warn_once(
                    f"ras_compile: {type(scheduler).__name__} adds noise at each step, and a noise that is held would stay "
                    "in the picture as grain: inactive tokens hold their clean sample instead, as with noise_reuse='x0'."
                )
            return self._held(
                given, prediction, sample, evaluations, clean_coefficients(scheduler, given.get("timestep"))
            )
        self._before = given, prediction, sample, evaluations
        return prediction

    @property
    def asks(self) -> bool:
        """Whether it matters if the step that begins draws random numbers."""
        return self._before is not None

    def stepped(self, scheduler: Any, drawn: bool) -> None:
        """The scheduler has stepped, and has drawn random numbers or not."""
        before, self._before = self._before, None
        if before is None:
            return
        given, prediction, sample, evaluations = before
        # those of a Brownian tree are its own
        self._adds_noise = drawn or getattr(scheduler, "noise_sampler", None) is not None
        if not self._adds_noise:
            return
        try:
            check_clean(scheduler)
            index = scheduler.step_index - 1 if getattr(scheduler, "step_index", None) else None
            coefficients = clean_coefficients(scheduler, given.get("timestep"), index)
            self._held(given, prediction, sample, evaluations, coefficients)
        except ConfigError as error:
            self.refusal = (
                f"{type(scheduler).__name__} adds noise at each step, and a noise that is held would stay in the picture "
                f"as grain; {error}"
            )

    def _held(
        self,
        given: dict[str, Any],
        prediction: Tensor,
        sample: Tensor,
        evaluations: Sequence[Evaluation],
        coefficients: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The prediction in which inactive tokens hold their clean sample; the first of a generation is left as it is.

        Raises:
            ConfigError: the model's latent is not laid out as the scheduler's sample, or each token has a time of its own.
        """
        if given.get("per_token_timesteps") is not None:
            raise ConfigError(
                "option noise_reuse='x0' takes one timestep for all tokens; this pipeline has one for each."
            )
        active = None
        for evaluation in evaluations:
            mapped = sample_map(evaluation.view, evaluation.latent.shape, sample.shape)
            if mapped is None or prediction.shape != sample.shape:
                raise ConfigError(
                    f"option noise_reuse='x0' needs a sample and a prediction laid out as the model's latent "
                    f"{list(evaluation.latent.shape)}; the scheduler gets {list(sample.shape)} and "
                    f"{list(prediction.shape)}."
                )
            if evaluation.rows is not None:
                computed = mapped.to_sample(active_tokens(evaluation.rows, evaluation.view.shape[1]))
                active = computed if active is None else active | computed
        a, b = (coefficient.to(sample.device) for coefficient in coefficients)
        return self._sample(prediction, sample, active, a, b)
