"""Other training-free ways to save steps' work, on the same transformer: whole layers are reused in place of tokens.

`attention` returns the attention layers' last outputs whole in most steps and computes everything else (Pyramid Attention
Broadcast, arXiv 2408.12588, without its pyramid): the objection to refreshing some of the tokens. `TaylorSeer` (arXiv
2503.06923), `FirstBlockCache` and `MagCache` (arXiv 2506.09045) are diffusers' own, `cache-dit` is the package of that
name, `Spectrum` (arXiv 2603.01623) is written here from its equations.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
    apply_taylorseer_cache,
)
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["METHODS", "Other", "calibrated", "module_flops"]


class Other:
    """A transformer that skips layers. Call it as the transformer, each batch of pictures inside `around()`.

    Args:
        transformer: left as it is; this is a copy.
        compiler: backend of `torch.compile`, "eager" for none.
        parts: names of the modules that may be skipped.
    """

    def __init__(self, transformer: nn.Module, compiler: str, parts: list[str]) -> None:
        self.model = copy.deepcopy(transformer)
        self.compiler, self.parts = compiler, parts
        self.runs: Counter[str] = Counter()

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    @contextmanager
    def around(self) -> Iterator[None]:
        """One batch of pictures, from its first step to its last; counts which modules run."""
        self.runs.clear()
        yield

    def flops(self, steps: int, prices: dict[str, int]) -> float:
        """FLOPs of the last batch's `steps`, per picture; `prices` are those of `module_flops`."""
        always = prices[""] - sum(prices[part] for part in self.parts)
        return float(steps * always + sum(self.runs[part] * prices[part] for part in self.parts))

    def _compiled(self, function: Callable) -> Callable:
        return function if self.compiler == "eager" else torch.compile(function, backend=self.compiler, dynamic=False)

    def _count(self, part: str) -> None:
        """Replaces a module's forward by one that is compiled and counted."""
        module = self.model.get_submodule(part)
        run = self._compiled(module.forward)

        @functools.wraps(module.forward)  # cache-dit looks at its parameters
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.runs[part] += 1
            found = run(*args, **kwargs)
            # SD3's last block has no text to return, and FirstBlockCache subtracts it all the same
            if isinstance(found, tuple) and found[0] is None:
                return (kwargs["encoder_hidden_states"] if len(args) < 2 else args[1], *found[1:])
            return found

        module.forward = forward


class Held(nn.Module):
    """A layer that runs, or returns again what it returned last."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.reuse = False
        self.kept: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.reuse:
            return self.kept
        self.kept = self.layer(*args, **kwargs)
        return self.kept


class AttentionReuse(Other):
    """Attention outputs are computed in the steps of `computed` alone, and reused whole in all others.

    Args:
        computed: says of a step, from 0, whether it computes them.
    """

    def __init__(self, transformer: nn.Module, compiler: str, computed: Callable[[int], bool]) -> None:
        parts = [name for name, _ in transformer.named_modules() if name.endswith(".attn")]
        super().__init__(transformer, compiler, parts)
        for part in parts:
            self.model.set_submodule(part, Held(self.model.get_submodule(part)))
        self.held = [module for module in self.model.modules() if isinstance(module, Held)]
        self.computed, self.step = computed, 0
        if compiler != "eager":
            self.model.compile(backend=compiler, dynamic=False)

    def __call__(self, **inputs: Any) -> Any:
        reuse = not self.computed(self.step)
        for module in self.held:
            module.reuse = reuse
        self.runs.update(() if reuse else self.parts)
        self.step += 1
        return super().__call__(**inputs)

    @contextmanager
    def around(self) -> Iterator[None]:
        self.step = 0
        with super().around():
            yield
        for module in self.held:
            module.kept = None


class Cached(Other):
    """One of diffusers' caches over compiled blocks; what a cache decides between them stays uncompiled.

    Args:
        apply: puts the cache's hooks on a model.
        parts: names of the modules that the cache may skip.
    """

    def __init__(
        self, transformer: nn.Module, compiler: str, apply: Callable[[nn.Module], None], parts: list[str]
    ) -> None:
        super().__init__(transformer, compiler, parts)
        for part in parts:
            self._count(part)
        apply(self.model)

    @contextmanager
    def around(self) -> Iterator[None]:
        # SD3's class lacks the mixin, its blocks know the hooks
        with super().around(), CacheMixin.cache_context(self.model, "guided"):
            yield
        CacheMixin._reset_stateful_cache(self.model)


class CacheDit(Other):
    """The package cache-dit: its first block decides nothing here, a preset's mask says which steps are computed.

    Args:
        steps: of a run.
        mask: "slow", "medium", "fast" or "ultra".

    Raises:
        ModuleNotFoundError: the package is not installed.
    """

    def __init__(self, transformer: nn.Module, compiler: str, steps: int, mask: str) -> None:
        try:
            package = importlib.import_module("cache_dit")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("cache-dit is not installed: pip install cache-dit") from error
        super().__init__(transformer, compiler, _blocks(transformer))
        for part in self.parts:
            self._count(part)
        config = package.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, num_inference_steps=steps,
            enable_separate_cfg=False, steps_computation_policy="static",
            steps_computation_mask=package.steps_mask(total_steps=steps, mask_policy=mask),
        )  # fmt: skip
        model: Any = self.model
        if not package.BlockAdapterRegister.is_supported(model):  # it knows SD3's class by its pipeline alone
            model = package.BlockAdapter(
                transformer=model, blocks=model.transformer_blocks, forward_pattern=package.ForwardPattern.Pattern_1
            )
        package.enable_cache(model, cache_config=config)


class Spectrum(Other):
    """Forecasts the last block's features by a polynomial fitted to all that were computed (arXiv 2603.01623).

    With the steps mapped to x in [-1, 1], T_m the Chebyshev polynomials and Phi[k, m] = T_m(x_k) of the K computed
    steps, whose features are the rows of H, a step at x has the features phi(x) (Phi' Phi + ridge I)^-1 Phi' H (their
    equations 12 to 14), blended with the line through the last two. All are sums of the rows of H, whose weights no
    feature changes. After `warmup` steps one step in `window` is computed, and `window` grows by `growth` each time.

    Args:
        steps: of a run.
    """

    def __init__(
        self, transformer: nn.Module, compiler: str, steps: int, window: float = 2.0, growth: float = 0.75,
        warmup: int = 5, degree: int = 4, ridge: float = 0.1, blend: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(transformer, compiler, _blocks(transformer))
        self.steps, self.degree, self.ridge, self.blend = steps, degree, ridge, blend
        self.plan = spectrum_plan(steps, window, growth, warmup)
        self.step, self.kept = 0, None
        self.at: list[int] = []
        self.features: list[Tensor] = []
        for part in self.parts:
            self._count(part)
            self._gate(part, last=part == self.parts[-1])

    def _gate(self, part: str, last: bool) -> None:
        """A block computes, or returns what was computed last: what leaves the last one is then a forecast."""
        module = self.model.get_submodule(part)
        run = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.plan[self.step]:
                return self._forecast() if last else self.kept
            found = run(*args, **kwargs)
            if last:
                self.kept = found
                self.at.append(self.step)
                # blocks of joint attention return the text's tokens, then the picture's
                self.features.append(found[-1] if isinstance(found, tuple) else found)
            return found

        module.forward = forward

    def _forecast(self) -> Any:
        weights = spectrum_weights(self.at, self.step, self.steps, self.degree, self.ridge, self.blend)
        total = torch.zeros_like(self.features[0], dtype=torch.float32)
        for weight, features in zip(weights, self.features, strict=True):
            total.add_(features, alpha=weight)
        hidden = total.to(self.features[0].dtype)
        return (*self.kept[:-1], hidden) if isinstance(self.kept, tuple) else hidden

    def __call__(self, **inputs: Any) -> Any:
        found = super().__call__(**inputs)
        self.step += 1
        return found

    @contextmanager
    def around(self) -> Iterator[None]:
        self.step, self.kept = 0, None
        self.at, self.features = [], []
        with super().around():
            yield
        self.kept, self.features = None, []


def spectrum_plan(steps: int, window: float, growth: float, warmup: int) -> list[bool]:
    """Which steps Spectrum computes."""
    plan, skipped = [], 0
    for step in range(steps):
        computed = step < warmup or skipped + 1 >= int(window)
        if computed and step >= warmup:
            window += growth
        skipped = 0 if computed else skipped + 1
        plan.append(computed)
    return plan


def spectrum_weights(at: Sequence[int], step: int, steps: int, degree: int, ridge: float, blend: float) -> list[float]:
    """What each of the computed steps `at` weighs in Spectrum's forecast for `step`."""

    def basis(where: Sequence[int]) -> Tensor:
        x = 2 * torch.tensor(where, dtype=torch.float64) / max(steps - 1, 1) - 1
        return torch.cos(torch.arange(degree + 1) * torch.acos(x.clamp(-1, 1))[:, None])  # T_m(cos a) = cos(m a)

    phi = basis(at)
    fitted = basis([step]) @ torch.linalg.solve(phi.T @ phi + ridge * torch.eye(degree + 1, dtype=phi.dtype), phi.T)
    line = torch.zeros(len(at), dtype=phi.dtype)
    line[-1] = 1
    if len(at) > 1:
        ahead = (step - at[-1]) / (at[-1] - at[-2])
        line[-1], line[-2] = 1 + ahead, -ahead
    return (blend * fitted[0] + (1 - blend) * line).tolist()


def _blocks(transformer: nn.Module) -> list[str]:
    """Names of the blocks, by whichever of two names the class has them."""
    (name,) = (name for name in ("transformer_blocks", "blocks") if hasattr(transformer, name))
    return [f"{name}.{index}" for index in range(len(getattr(transformer, name)))]


def calibrated(draw: Callable[[Other], Any], transformer: nn.Module, steps: int) -> list[float]:
    """The ratios that MagCache asks for, one a step, by the calibration of diffusers.

    Args:
        draw: draws some pictures in `steps` steps with the model that it is given.
        transformer: left as it is.
        steps: of a run.
    """
    # one step more, or the last one would forget the ratios
    config = MagCacheConfig(num_inference_steps=steps + 1, calibrate=True)
    parts = _blocks(transformer)
    found: list[float] = []

    def apply(model: nn.Module) -> None:
        apply_mag_cache(model, config)
        model.get_submodule(parts[-1]).register_forward_hook(lambda *_: found.__setitem__(slice(None), ratios(model)))

    def ratios(model: nn.Module) -> list[float]:
        hook = model.get_submodule(parts[0])._diffusers_hook.get_hook("mag_cache_leader_block_hook")
        return hook.state_manager.get_state().calibration_ratios

    draw(Cached(transformer, "eager", apply, parts))
    return found


def _mag(
    transformer: nn.Module, compiler: str, steps: int, threshold: float, ratios: Sequence[float], skips: int = 3
) -> Other:
    config = MagCacheConfig(
        threshold=threshold, max_skip_steps=skips, num_inference_steps=steps, mag_ratios=list(ratios)
    )
    return Cached(transformer, compiler, lambda model: apply_mag_cache(model, config), _blocks(transformer))


def _attention(transformer: nn.Module, compiler: str, steps: int, warmup: int, every: int) -> Other:
    def computed(step: int) -> bool:  # as warm-up and error resets of region-adaptive sampling
        return step < warmup or (step > warmup and (step - warmup) % every == 0)

    return AttentionReuse(transformer, compiler, computed)


def _first_block(transformer: nn.Module, compiler: str, steps: int, threshold: float) -> Other:
    config = FirstBlockCacheConfig(threshold=threshold)
    return Cached(transformer, compiler, lambda model: apply_first_block_cache(model, config), _blocks(transformer))


def _taylor(transformer: nn.Module, compiler: str, steps: int, interval: int, order: int) -> Other:
    config = TaylorSeerCacheConfig(
        cache_interval=interval, max_order=order, use_lite_mode=True, taylor_factors_dtype=torch.float32
    )
    parts = [*_blocks(transformer), "proj_out"]
    return Cached(transformer, compiler, lambda model: apply_taylorseer_cache(model, config), parts)


# name of a method -> (transformer, compiler, steps, **options) -> the model
METHODS: dict[str, Callable[..., Other]] = {
    "attention reuse": _attention,
    "FirstBlockCache": _first_block,
    "MagCache": _mag,
    "Spectrum": Spectrum,
    "TaylorSeer": _taylor,
    "cache-dit": CacheDit,
}


@torch.no_grad()
def module_flops(transformer: nn.Module, inputs: dict[str, Tensor]) -> dict[str, int]:
    """FLOPs of one call by module name; "" is the whole. Attention counts, whatever kernel the device has for it."""
    # only the kernel that is made of matrix products shows itself to the counter on every device
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        copy.deepcopy(transformer)(**inputs)
    root = type(transformer).__name__
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    found = {name.removeprefix(f"{root}."): count for name, count in counts.items() if name.startswith(f"{root}.")}
    return {"": counts["Global"]} | {name: found.get(name, 0) for name, _ in transformer.named_modules() if name}
