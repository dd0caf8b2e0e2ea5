"""Other training-free ways to save steps' work, on the same transformer: whole layers are reused in place of tokens.

`attention` returns the attention layers' last outputs whole in most steps and computes everything else (Pyramid Attention
Broadcast, arXiv 2408.12588, without its pyramid): the objection to refreshing some of the tokens. `TaylorSeer` (arXiv
2503.06923) and `FirstBlockCache` are diffusers' own.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_taylorseer_cache,
)
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["METHODS", "Other", "module_flops"]


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

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.runs[part] += 1
            found = run(*args, **kwargs)
            # SD3's last block has no text to return, and FirstBlockCache subtracts it all the same
            if isinstance(found, tuple) and found[0] is None:
                return (kwargs["encoder_hidden_states"], *found[1:])
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


def _blocks(transformer: nn.Module) -> list[str]:
    return [f"transformer_blocks.{index}" for index in range(len(transformer.transformer_blocks))]


def _attention(transformer: nn.Module, compiler: str, warmup: int, every: int) -> Other:
    def computed(step: int) -> bool:  # as warm-up and error resets of region-adaptive sampling
        return step < warmup or (step > warmup and (step - warmup) % every == 0)

    return AttentionReuse(transformer, compiler, computed)


def _first_block(transformer: nn.Module, compiler: str, threshold: float) -> Other:
    config = FirstBlockCacheConfig(threshold=threshold)
    return Cached(transformer, compiler, lambda model: apply_first_block_cache(model, config), _blocks(transformer))


def _taylor(transformer: nn.Module, compiler: str, interval: int, order: int) -> Other:
    config = TaylorSeerCacheConfig(
        cache_interval=interval, max_order=order, use_lite_mode=True, taylor_factors_dtype=torch.float32
    )
    parts = [*_blocks(transformer), "proj_out"]
    return Cached(transformer, compiler, lambda model: apply_taylorseer_cache(model, config), parts)


# name of a method -> (transformer, compiler, **options) -> the model
METHODS: dict[str, Callable[..., Other]] = {
    "attention reuse": _attention,
    "FirstBlockCache": _first_block,
    "TaylorSeer": _taylor,
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
