"""What a report holds, and the files that it is written to."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import generated, picture, told

from ras_compile.errors import ConfigError
from ras_compile.report.pictures import as_uri, few, frames_of, from_uri
from ras_compile.report.run import collect, grid_of, load, masks_of
from ras_compile.report.write import checked, page, write
from ras_compile.summary import Summary


def test_the_tokens_of_each_step_come_back_bit_for_bit():
    for grid in ((4, 6), (3, 3), (2, 3, 5)):
        run = generated(grid=grid)
        masks = masks_of(told(grid=grid))
        for mask, step in zip(masks, run.steps, strict=True):
            expected = torch.ones(step.tokens, dtype=torch.bool)
            if step.rows is not None:
                expected = torch.zeros_like(expected).index_fill(0, step.rows, True)
            assert torch.equal(mask, expected)


def test_ten_thousand_tokens_and_a_hundred_steps_stay_small():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (1600, 1600, 3), dtype=np.uint8).repeat(1, 0))
    assert len(page(told(100, (100, 100), picture=noise, dense=None))) < 5e6
    assert len(page(told(100, (100, 100), picture=None, dense=None))) < 3e5


@pytest.mark.parametrize(
    "value",
    [
        picture(), [picture()], [picture(), Image.new("RGB", (9, 9))], np.asarray(picture()), np.asarray(picture())[None],
        np.asarray(picture()) / 255, torch.from_numpy(np.array(picture())).movedim(-1, 0) / 255,
        (torch.from_numpy(np.array(picture())).movedim(-1, 0) / 255)[None].bfloat16().float(),
    ],
)  # fmt: skip
def test_a_picture_in_every_form(value):
    found = frames_of(value)
    assert len(found) == 1 and found[0].size == (48, 32)
    near = np.asarray(found[0]).astype(int) - np.asarray(picture()).astype(int)
    assert abs(near).max() <= 1


@pytest.mark.parametrize(
    "value",
    [
        [picture()] * 3, [[picture()] * 3], np.asarray(picture())[None].repeat(3, 0), torch.rand(1, 3, 3, 32, 48),
        torch.rand(3, 3, 32, 48), [np.asarray(picture())[None].repeat(3, 0)],
    ],
)  # fmt: skip
def test_a_video_in_every_form(value):
    assert [frame.size for frame in frames_of(value, video=True)] == [(48, 32)] * 3


@pytest.mark.parametrize("value", [torch.rand(1, 16, 8, 8), [], "a cat", torch.rand(8), np.zeros((4, 4, 7))])
def test_what_is_no_picture_is_said(value):
    with pytest.raises(ConfigError, match="is no picture"):
        frames_of(value)


def test_a_small_picture_is_held_exactly_and_a_long_video_in_part():
    assert list(from_uri(as_uri(picture(), True)).tobytes()) == list(picture().tobytes())
    frames = few([Image.new("RGB", (1000, 500), (shade, 0, 0)) for shade in range(100)])
    assert len(frames) == 48 and {frame.size for frame in frames} == {(512, 256)}
    assert frames[0].getpixel((0, 0))[0] == 0 and frames[-1].getpixel((0, 0))[0] == 99


@pytest.mark.parametrize(
    ("grid", "tokens", "size", "frames", "expected"),
    [
        ((4, 6), 24, (60, 40), 1, [1, 4, 6]),
        ((2, 4, 6), 48, None, 1, [2, 4, 6]),
        ((4096,), 4096, (1024, 1024), 1, [1, 64, 64]),
        ((3456,), 3456, (1152, 768), 1, [1, 48, 72]),
        ((5 * 24,), 120, (60, 40), 17, [5, 4, 6]),  # a packed video whose frames are taken four at a time
        ((13,), 13, (64, 64), 1, [1, 1, 13]),  # nothing fits: a strip
        ((), 0, None, 0, [1, 1, 1]),
    ],
)
def test_tokens_find_their_rows(grid, tokens, size, frames, expected):
    assert grid_of(grid, tokens, size, frames) == expected


def test_what_users_wrote_is_data_and_never_markup():
    html = page(told(prompt="</script><script>alert(1)</script><b>"))
    assert html.count("</script>") == 2 and "<b>" not in html
    assert "http://" not in html.replace("http://www.w3.org", "") and "https://" not in html


def test_every_kind_of_file(tmp_path):
    data = told()
    for name in ("out.html", "focus.png", "steps.gif", "run.json"):
        write(data, checked(tmp_path / name))
    assert Image.open(tmp_path / "focus.png").width == 3 * 512 + 8
    with Image.open(tmp_path / "steps.gif") as film:
        assert film.n_frames == 6
    assert load(tmp_path / "run.json") == json.loads(json.dumps(data))
    write(told(picture=None, dense=None), tmp_path / "alone.png")
    write(told(picture=None, dense=None), tmp_path / "alone.gif")


@pytest.mark.parametrize("change", [float("nan"), float("inf")])
def test_a_noise_that_is_not_a_number_leaves_a_page_that_opens(change):
    """JSON knows neither: a page that held them was empty."""
    run = generated()
    data = collect(replace(run, steps=(replace(run.steps[0], change=change),)), None, None, "", False)
    assert data["steps"][0]["change"] is None and "from step 0 on" in data["sentence"][-1]
    json.dumps(data, allow_nan=False)


def test_the_times_computed_are_what_the_picture_shows(tmp_path):
    write(told(3, (2, 2), picture=None, dense=None), tmp_path / "focus.png")  # dense, dense, tokens 2 only
    shown = np.asarray(Image.open(tmp_path / "focus.png"))[22:]
    corners = [tuple(map(int, shown[y, x])) for y in (5, -5) for x in (5, -5)]
    assert corners == [(0, 0, 0), (0, 0, 0), (255, 255, 255), (0, 0, 0)]


def test_what_cannot_be_written_is_said_in_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="there is no run to report yet"):
        collect(Summary(), None, None, "", False)
    with pytest.raises(ConfigError, match="dense= is a picture of 24 x 16 and the other one of 48 x 32"):
        told(dense=picture(24, 16))
    with pytest.raises(ConfigError, match="there is no folder .*nowhere.* make it first"):
        checked(tmp_path / "nowhere" / "out.html")
    (tmp_path / "run.html").mkdir()
    with pytest.raises(ConfigError, match="is a folder; give the name of a file in it"):
        checked(tmp_path / "run.html")
    with pytest.raises(ConfigError, match=r"ends in .html, .png, .gif or .json, not 'out.pdf'"):
        checked(tmp_path / "out.pdf")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "run.json")
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(ConfigError, match="is no report"):
        load(tmp_path / "run.json")
