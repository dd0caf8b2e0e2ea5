"""The page to draw with, in a browser, with the model that this repository ships."""

from __future__ import annotations

import os
import shutil

import pytest
from scripts import load

CHROMIUM = "needs Chromium: pip install playwright, and apt-get install chromium or playwright install chromium"


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
