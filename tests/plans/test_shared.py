"""Sizes and strides as functions of the lengths, and what of them is checked before a program runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ras_compile.passes.lowering.interpolate import NotAffine
from ras_compile.plans.shared import Shared, Sized, all_fit

POINTS = [(5,), (6,), (9,)]


def of(make) -> Sized:
    return Sized.of(POINTS, [make(length) for (length,) in POINTS])


def text(length: int) -> torch.Tensor:
    return torch.empty(2, 2 * length + 1, 3)


def heads(length: int) -> torch.Tensor:
    """Keys of two samples and as many heads as tokens: the first stride is no affine function of the length."""
    return torch.empty(2, length, length, 4)


def test_sizes_and_strides_at_another_length():
    for make, strides in ((text, [45, 3, 1]), (heads, [196, 28, 4, 1])):
        sizes, found = of(make).at((7,))
        assert sizes == list(make(7).shape) and found == strides == list(make(7).stride())


def test_what_depends_on_no_length():
    assert not of(lambda length: torch.empty(2, 3)).varies
    assert of(text).varies
    assert of(lambda length: torch.empty(2, 2 * length).T[:3]).varies, "its strides alone"


def test_one_of_two_lengths_is_enough():
    points = [(5, 4), (6, 4), (5, 6), (9, 9)]
    assert Sized.of(points, [torch.empty(2, first) for first, _ in points]).varies


@pytest.mark.parametrize(
    "make",
    [
        lambda length: torch.empty(length // 2),
        lambda length: torch.empty_strided((2, 3), (length**2, 1)),
        # the extent of a dimension of one entry explains no stride
        lambda length: torch.empty_strided((2, 1), (length**2, length**2)),
    ],
)
def test_what_has_no_such_form_is_refused(make):
    with pytest.raises(NotAffine, match="a tensor of shape"):
        of(make)


def test_an_input_fits_by_its_sizes_and_by_the_strides_that_matter():
    sized = of(text)
    assert sized.fits(text(7), (7,)) and not sized.fits(text(7), (8,))
    assert not sized.fits(text(7).transpose(0, 1).contiguous().transpose(0, 1), (7,)), "other strides"
    one = of(lambda length: torch.empty(1, length))
    assert one.fits(torch.empty_strided((1, 7), (100, 1)), (7,)), "the stride of one entry is read by nobody"


def test_a_program_fits_where_all_of_it_does():
    sized, given = [of(text), of(heads)], [text(7), heads(7)]
    assert all_fit(sized, (7,), given) and not all_fit(sized, (7,), [text(7), heads(8)])
    for holds in (True, False):
        program = Shared(None, SimpleNamespace(holds=lambda point, holds=holds: holds), sized)
        assert program.fits((7,), given) == holds and not program.fits((8,), given)
