"""The page to draw with, in a browser, with the model that this repository ships."""

from __future__ import annotations

import argparse
import os
import shutil

import pytest
from scripts import load

import ras_compile
from ras_compile.config import PRESETS

CHROMIUM = "needs Chromium: pip install playwright, and apt-get install chromium or playwright install chromium"


@pytest.fixture
def studio():
    """What draws, without a page."""
    shared, made = load([".", "pipelines"], ["shared", "studio"])
    small = {"height": 64, "width": 64, "max_sequence_length": 1}
    pipe = shared.load("StableDiffusion3Pipeline", argparse.Namespace(pipeline=None))
    studio = made.Studio(pipe, small, inner_backend="eager")
    assert set(made.PRESETS) == set(PRESETS)
    yield studio
    studio.handle.detach()


def test_all_steps_are_shown_then_the_map_then_plain_steps(studio):
    first, *shown = studio.draw("a red apple", 8, "fast", 0)
    assert first[:3] == (None, None, None) and "compiles" in first[3]
    pictures, maps, plain, told = zip(*shown, strict=True)
    assert all(picture.size == (64, 64) for picture in pictures) and pictures[0] != pictures[7]
    assert told[:8] == tuple(f"drawing: step {step} of 8" for step in range(1, 9))
    assert maps[-1].size == (256, 256) and maps[-1].getextrema() == ((0, 255),) * 3
    assert plain[:-1] == (None,) * (len(shown) - 1) and plain[-1].size == (64, 64)
    assert "dense" in told[-1] and "plain steps:" in told[-1]


def test_a_page_that_is_left_stops_drawing(studio):
    left = studio.draw("a red apple", 50, "fast", 0)
    next(left), next(left)
    left.close()
    assert len(ras_compile.trace(studio.handle)) < 50
    *_, (picture, *_) = studio.draw("a red apple", -3, "fast", None)  # two steps at least, and any seed
    assert picture.size == (64, 64)


@pytest.fixture(scope="module")
def served():
    """The page's address."""
    pytest.importorskip("gradio", reason="needs Gradio: pip install '.[app]'")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    (app,) = load(["."], ["app"])
    blocks = app.main(["--inner-backend", "eager"], prevent_thread_lock=True, quiet=True)
    yield blocks.local_url
    blocks.close()


@pytest.fixture(params=[1280, 400], ids=["desktop", "phone"])
def page(served, request):
    playwright = pytest.importorskip("playwright.sync_api", reason=CHROMIUM)
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    wrong = []
    with playwright.sync_playwright() as running:
        try:
            browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip(CHROMIUM)
        opened = browser.new_page(viewport={"width": request.param, "height": 900})
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.on(
            "request",
            lambda asked: wrong.append(asked.url) if not asked.url.startswith((served, "data:", "blob:")) else None,
        )
        opened.goto(served)
        opened.get_by_role("button", name="Draw").wait_for()
        assert opened.evaluate("document.documentElement.scrollWidth") <= request.param
        yield opened
        if where := os.environ.get("RAS_SCREENSHOTS"):
            opened.screenshot(path=f"{where}/app-{request.param}.png", full_page=True)
        browser.close()
    assert not wrong


def test_it_draws(page):
    page.get_by_label("Prompt").fill("a red apple")
    page.get_by_label("number input for Steps").fill("12")
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("of 12").wait_for(timeout=60_000)
    page.get_by_text("plain steps:").wait_for(timeout=120_000)
    told = page.locator("#told").inner_text()
    assert told.startswith("12 steps, region-adaptive:") and "dense" in told and "sparse" in told
    pictures = page.locator("img")
    page.wait_for_function("document.querySelectorAll('img').length >= 3")
    sizes = [picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") for picture in pictures.all()[:3]]
    assert sizes == [[128, 128], [512, 512], [128, 128]]
