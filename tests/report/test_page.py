"""The report's page in a browser: nothing of it is right before somebody has clicked it."""

from __future__ import annotations

import shutil

import pytest
from runs import picture, told

from ras_compile.report.write import write

INSTALL = "needs Chromium: pip install playwright, and apt-get install chromium or playwright install chromium"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason=INSTALL)
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as running:
        try:
            found = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip(INSTALL)
        yield found
        found.close()


@pytest.fixture(params=[1280, 400], ids=["desktop", "phone"])
def opened(browser, request, tmp_path):
    """Opens a report from its file, without a network; afterwards nothing may have been wrong or asked for."""
    contexts, wrong = [], []

    def go(**given):
        path = tmp_path / "out.html"
        write(told(**given), path)
        context = browser.new_context(viewport={"width": request.param, "height": 800}, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: wrong.append(asked.url) if asked.url.startswith("http") else None)
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= request.param
        return page

    yield go
    for context in contexts:
        context.close()
    assert not wrong


def computed(page) -> list[bool]:
    """Which tokens the overlay leaves clear."""
    return page.evaluate(
        "(() => { const c = document.getElementById('overlay');"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return Array.from({length: c.width * c.height}, (_, i) => d[4 * i + 3] === 0); })()"
    )


def test_keys_and_scrubber_show_the_tokens_of_each_step(opened):
    page = opened()
    assert page.text_content("#number") == "2 of 5"  # the first one that skips something
    for step in (3, 4, 5, 5):
        page.keyboard.press("ArrowRight")
        assert page.text_content("#number") == f"{step} of 5"
        assert computed(page) == [token % 3 == step % 3 for token in range(24)]
    page.keyboard.press("Home")
    assert page.text_content("#told").startswith("dense: 24 tokens (100 %), 10 ms") and all(computed(page))
    page.locator("#step").fill("4")
    assert page.text_content("#told").startswith("sparse: 8 tokens (33.3 %), 4 ms, noise moved by 25 %")
    assert computed(page) == [token % 3 == 1 for token in range(24)]
    page.locator("#step").focus()
    page.keyboard.press("ArrowLeft")
    assert page.text_content("#number") == "3 of 5"


def test_other_overlays_and_the_timeline(opened):
    page = opened()
    for mode in ("count", "age", "now", "none"):
        page.select_option("#mode", mode)
    assert all(computed(page))
    box = page.locator("#timeline").bounding_box()
    page.locator("#timeline").click(position={"x": box["width"] * 0.95, "y": 20})
    assert page.text_content("#number") == "5 of 5"
    page.locator("#play").click()
    page.wait_for_function("document.getElementById('number').textContent === '1 of 5'")
    page.wait_for_function("document.getElementById('play').textContent === 'play'")
    assert page.text_content("#number") == "5 of 5"


def test_the_slider_uncovers_the_dense_picture(opened):
    page = opened()
    assert page.locator("#compare").is_visible()
    page.locator("#slider").fill("80")
    assert "80%" in page.evaluate("document.getElementById('adaptive').style.clipPath")
    assert opened(dense=None).locator("#compare").is_hidden()


def test_a_video_has_frames(opened):
    page = opened(grid=(2, 4, 6), picture=[picture()] * 5, dense=None, video=True)
    first = computed(page)
    page.locator("#frame").fill("4")
    tokens = [token % 3 == 2 for token in range(48)]
    assert [*first, *computed(page)] == tokens


def test_a_prompt_is_text(opened):
    prompt = "</script><script>console.log('bad')</script><img src=x onerror=\"console.log('bad')\"> & <b>bold</b>"
    page = opened(prompt=prompt)
    assert page.text_content("#prompt") == prompt and page.locator("h1 b").count() == 0


def test_without_a_picture_and_with_ten_thousand_tokens(opened):
    page = opened(steps=100, grid=(100, 100), picture=None, dense=None)
    page.select_option("#mode", "count")
    page.keyboard.press("Escape")
    page.locator("#step").fill("99")
    assert page.text_content("#number") == "99 of 99"
    page.locator("summary").first.click()
    assert page.locator("#options tr").count() > 10
