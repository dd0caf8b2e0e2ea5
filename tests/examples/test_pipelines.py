"""One file for each kind of pipeline: each runs, and has dense and sparse steps."""

from __future__ import annotations

import pytest
from scripts import load

NAMES = ("text_to_image", "image_to_image", "inpainting", "editing", "video", "audio", "servers")
FILES = dict(zip(NAMES, load(["pipelines"], NAMES), strict=True))
SHIPPED = ("image_to_image", "servers")  # their model takes seconds a step; that of one file is enough here


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, tmp_path, monkeypatch):
    if name in SHIPPED:
        monkeypatch.setattr(FILES[name], "load", lambda kind, args: FILES["inpainting"].text_to_image(kind))
    less = ["--side", "64", "--steps", "6"] if name == "text_to_image" else ["--steps", "20"]
    records = FILES[name].main(["--inner-backend", "eager", "--output", str(tmp_path), *less])
    assert {record.kind for record in records} == {"dense", "sparse"}
    assert name == "video" or any(tmp_path.iterdir())


def test_what_is_known_is_computed_last(tmp_path):
    records = FILES["inpainting"].main(["--inner-backend", "eager", "--steps", "20", "--output", str(tmp_path)])
    for rows in (record.rows[0] for record in records if record.rows is not None):
        assert (rows % 8 < 4).sum() == min(len(rows), 32)  # the left half of 8 x 8 tokens is drawn
