"""Models that were once wrong, refused without need or crashed, as small as they go; a failure that is found joins them."""

from __future__ import annotations

from random_models import CHOICES, Recipe


def plain(name: str, *numbers: int, frame: tuple[int, ...] = ()) -> Recipe:
    """One block in the plainest frame; numbers that are not given are zero."""
    return Recipe(padded(frame, 2 * CHOICES), ((name, padded(numbers, CHOICES)),))


def padded(numbers: tuple[int, ...], length: int) -> tuple[int, ...]:
    return numbers + (0,) * (length - len(numbers))


CORPUS = {
    "queries `(2 n)`, keys `(n 2)`, grouped": plain("in_batch", 0, 0, 47),
    "queries `(2 n)`, keys `(n 2)` by repetition": plain("in_batch", 0, 37),
    "queries `(2 n)`, keys `(n 2)` by a stack": plain("in_batch", 0, 43),
    "learned slopes": plain("mlp", 1),
    "a view by strides": plain("across", 4),
    "all frames but the first": plain("pieces", 1, frame=(0, 2, 2, 0, 0)),
    "an odd latent, padded by its other side": plain("attention", frame=(0, 6, 1, 0, 0, 0, 0, 0, 0, 1)),
    "an odd latent with a skip, padded by a reflection": plain("mlp", frame=(0, 6, 1, 0, 3, 0, 0, 1, 0, 2)),
    "feed-forward in chunks": plain("pieces", 0),
    "noise in other strides than the latent": plain("windows", 2, frame=(0, 4, 2, 0, 1)),
    "an odd side that shares a dimension with another": Recipe(
        padded((0, 54), 2 * CHOICES), (("windows", padded((21,), CHOICES)), ("convolved", padded((47,), CHOICES)))
    ),
}

# What the region cannot have as the model's tokens, and so its share of them: attention along columns needs as many active
# tokens in each, which are rows of the grid of 4 by 3; a convolution with strides takes tokens together.
SHARES = {"noise in other strides than the latent": 1 / 3, "an odd side that shares a dimension with another": 1 / 3}
