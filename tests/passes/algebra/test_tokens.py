"""The token view of a tensor: samples, tokens, pixels of a patch, channels; of a part of a tensor, and written back."""

from __future__ import annotations

import pytest
import torch

from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.algebra.layout import Axis, Concat, Frame, Group, Layout
from ras_compile.passes.algebra.order import OWN, RANKS, Atom, Order
from ras_compile.passes.algebra.tokens import channel_count, token_view


def patches() -> Frame:
    """[2, 3, 4, 6] in patches of two by two: two by three tokens, four pixels, three channels."""
    frame = Frame.of((2, 3, 4, 6))
    for dim in (2, 3):
        frame = frame.refined(frame.atoms(dim)[0].atom, frame.shape[dim] // 2)
        frame = frame.without(frozenset([frame.atoms(dim)[1].atom]))
    return frame.without(frozenset([frame.atoms(1)[0].atom]))


def packed(**facts) -> Frame:
    """[2, 5, 3]: five tokens of three channels."""
    return Frame((2, 5, 3), ((2,), (5,), (3,)), excluded=frozenset([Atom(2, 1)]), **facts)


def test_patches_are_tokens_their_entries_pixels_and_the_rest_channels():
    frame, latent = patches(), torch.arange(144.0).reshape(2, 3, 4, 6)
    view = token_view(frame.layout(), frame)
    wanted = latent.unflatten(3, (3, 2)).unflatten(2, (2, 2)).permute(0, 2, 4, 3, 5, 1).reshape(2, 6, 4, 3)
    assert torch.equal(view(latent), wanted)
    assert view.token_dims == {2, 3} and view.uncut is view
    assert channel_count(frame.layout(), frame) == 3


def test_channels_behind_the_first_ones_are_left_as_they_are():
    frame, latent = patches(), torch.randn(2, 3, 4, 6)
    view = token_view(frame.layout(), frame, 2)
    assert view(latent).shape == (2, 6, 4, 2)
    written = latent.clone()
    view.write(written, torch.zeros(2, 6, 4, 2))
    assert not written[:, :2].any() and torch.equal(written[:, 2], latent[:, 2])


def test_a_segment_is_cut_out_and_written_alone():
    frame = packed()
    batch, tokens = frame.atoms(0), frame.atoms(1)
    layout = Layout((batch, (Concat(((Axis(2),), tokens, (Axis(4),))),), (Axis(3),)))
    value = torch.randn(2, 11, 3)
    view = token_view(layout, frame)
    assert torch.equal(view(value), value[:, 2:7, None]) and view.cuts == ((1, 2, 5),)
    assert view.uncut.cuts == () and torch.equal(view.uncut(view.cut(value)), view(value))
    written = value.clone()
    view.write(written, torch.zeros(2, 5, 1, 3))
    assert not written[:, 2:7].any()
    assert torch.equal(written[:, :2], value[:, :2]) and torch.equal(written[:, 7:], value[:, 7:])


def test_patches_that_are_not_full_repeat_the_last_entry():
    frame = Frame.of((1, 3, 1))
    (axis, *_), channel = frame.atoms(1), frame.atoms(2)
    frame = frame.clipped(axis.atom, 2, 2).without(frozenset([channel[0].atom, Atom(1, 1)]))
    value = torch.tensor([[[1.0], [2.0], [3.0]]])
    view = token_view(frame.layout(), frame)
    assert view(value).flatten().tolist() == [1, 2, 3, 3] and view.filled == ((1, 4),)
    view.write(value, view(value) * 10)
    assert value.flatten().tolist() == [10, 20, 30]


@pytest.mark.parametrize("rank", [0, 2])
def test_of_the_tokens_of_all_processes_a_process_views_its_own(rank):
    whole = Frame((2, 15, 3), ((2,), (15,), (3,)), excluded=frozenset([Atom(2, 1)]), shards=Group("all", 3, rank))
    frame, value = whole.sharded(5 * rank, 5 * rank + 5), torch.randn(2, 15, 3)
    layout = Layout((frame.atoms(0), (Axis(3, RANKS), Axis(5, OWN)), (Axis(3),)))
    for shown in (layout, frame.layout()):
        view, own = token_view(shown, frame), slice(5 * rank, 5 * rank + 5)
        assert torch.equal(view(value), value[:, own, None])
        assert view.shape == (2, 5, 1) and view.everyone.shape == (2, 15, 1)
        assert torch.equal(view.everyone(value), value[:, :, None]) and view.everyone.everyone is view.everyone
        written = value.clone()
        view.write(written, torch.zeros(2, 5, 1, 2))  # of the first two channels alone
        assert not written[:, own, :2].any()
        written[:, own, :2] = value[:, own, :2]
        assert torch.equal(written, value), "and nothing else"
    other = Layout((frame.atoms(0), (Axis(5, OWN), Axis(3, RANKS)), (Axis(3),)))
    with pytest.raises(UnsupportedGraph, match="stand between each other"):
        token_view(other, frame)
    alone = packed(shards=frame.shards)
    assert torch.equal(token_view(alone.layout(), alone)(value[:, :5]), value[:, :5, None])


def test_what_holds_a_part_of_the_grid_or_segments_in_pieces_is_refused():
    frame = packed()
    batch, tokens = frame.atoms(0), frame.atoms(1)
    with pytest.raises(UnsupportedGraph, match="only a part of the token grid"):
        token_view(Layout((batch, (Axis(5),), (Axis(3),))), frame)
    repeated = Layout((batch, (Axis(2), Concat(((Axis(2),), tokens))), (Axis(3),)))
    with pytest.raises(UnsupportedGraph, match="repeated or split"):
        token_view(repeated, frame)


def test_samples_are_no_channels():
    frame = packed()
    batch, tokens = frame.atoms(0), frame.atoms(1)
    assert channel_count(Layout((tokens, (*batch, Axis(3)))), frame) == 3
    assert channel_count(Layout((batch, (*tokens, Axis(7)), (Axis(3),))), frame) == 3, "pixels are none, either"


def test_tokens_that_are_left_in_another_order_are_refused():
    frame = packed()
    ((tokens,),) = (frame.atoms(1),)
    order = Order.of(((tokens.atom, 5),), torch.tensor([4, 3, 2, 1, 0]))
    with pytest.raises(UnsupportedGraph, match="undo the order at the end"):
        token_view(Layout((frame.atoms(0), frame.ordered(order), (Axis(3),))), frame)
