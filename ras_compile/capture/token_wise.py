"""While a model is traced, its parts that treat each token alone are called as one op: see `passes/rules/token_wise.py`.

That they do is the word of who wrote them, `part.token_wise = True`, and of who has read their code, for those that are
listed here. It is tried once, on half of the tokens of the call that is traced, which stand at other places and in other samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ras_compile._torch import no_torch_function
from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.rules.token_wise import here, number_of, token_wise, weights_of

# Classes whose code is known, by module and name: each expert is given the tokens that chose it, however many they are.
KNOWN = {
    ("diffusers.models.transformers.transformer_hidream_image", "MOEFeedForwardSwiGLU"),
}
# Of the largest entry, by bytes of an entry: other sizes of the same products differ by far less.
CLOSE = {2: 0.02, 4: 0.002}


def is_token_wise(part: nn.Module) -> bool:
    """Whether a part says, or is known, to treat each token alone; what it says itself counts more."""
    kind = type(part)
    return getattr(part, "token_wise", (kind.__module__, kind.__qualname__) in KNOWN) is True


class Opaque:
    """The parts of a model that treat each token alone.

    Attributes:
        parts: their names.
        widths: of each, how many entries a token has behind it; known once it was called.
    """

    def __init__(self, root: nn.Module) -> None:
        self.parts = {part: name for name, part in root.named_modules() if name and is_token_wise(part)}
        self.widths: dict[nn.Module, int] = {}

    @contextmanager
    def calls(self) -> Iterator[None]:
        """While it is open, each part is called as one op. The first time, half of its tokens have to give the same.

        Raises:
            UnsupportedGraph: they give something else, or a part is called with more than its tokens.
        """
        known = {part: vars(part).get("forward") for part in self.parts}
        try:
            for part in self.parts:
                part.forward = self._op(part, part.forward)
            yield
        finally:
            for part, forward in known.items():
                del part.forward
                if forward is not None:
                    part.forward = forward

    def _op(self, part: nn.Module, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if here.running:
                return own(*args, **kwargs)
            if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or args[0].ndim < 2:
                raise self._refused(part, "is called with something else than one tensor [..., tokens, channels]")
            weights, number = list(weights_of(part).values()), number_of(part)
            if part not in self.widths:
                with no_torch_function():  # what is tried is no reading of the model's
                    self.widths[part] = self._tried(part, args[0], weights)
            return token_wise(args[0], weights, number, self.widths[part])

        return forward

    def _tried(self, part: nn.Module, x: Tensor, weights: list[Tensor]) -> int:
        given = x.clone(memory_format=torch.contiguous_format)
        try:
            every = token_wise(given, weights, number_of(part), 0)
        except TypeError as error:  # it returns no tensor
            raise self._refused(part, str(error)) from error
        if not torch.equal(given, x):
            raise self._refused(part, "writes into its tokens")
        if every.shape[:-1] != x.shape[:-1] or every.dtype != x.dtype:
            raise self._refused(part, f"makes {list(every.shape)} {every.dtype} of tokens {list(x.shape)} {x.dtype}")
        half = token_wise(_mixed(x), weights, number_of(part), 0)
        gap, scale = (_mixed(every) - half).abs().max(), every.abs().max()
        if not bool(gap <= CLOSE[min(4, x.element_size())] * scale):
            raise self._refused(part, "answers something else where it is given half of the tokens, in another order")
        return every.shape[-1]

    def _refused(self, part: nn.Module, what: str) -> UnsupportedGraph:
        return UnsupportedGraph(
            f"a part is said to treat each token alone (`token_wise`), and does not: {self.parts[part]!r} {what}"
        )


def _mixed(x: Tensor) -> Tensor:
    """Half of the tokens of `[..., tokens, channels]`, from the last one to the first: each in another place and sample."""
    backwards = x.flatten(0, -2).flip(0)
    half = x.shape[-2] - x.shape[-2] // 2
    return backwards[: backwards.shape[0] // x.shape[-2] * half].reshape(*x.shape[:-2], half, x.shape[-1])
