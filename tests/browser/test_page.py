"""The page of a run in a real browser: no request but for itself, no message, nothing too wide, in light and dark.

`make test-browser` runs it, in an environment of its own; the pictures are left in `results/browser`.
"""

import os
from pathlib import Path

import pytest
from run_folders import write_run

from qzo.report.curves import panels_of
from qzo.report.examples import Answered
from qzo.report.page import page
from qzo.report.peaks import Peak, measured
from qzo.report.reading import read_story

pytestmark = pytest.mark.browser
BROWSER = os.environ.get("QZO_BROWSER")
PICTURES = Path("results/browser")
MIB = 2**20
BLANK = 20  # of 255: how far the background of dark and light must be from the middle


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium. The environment of `make test-browser` has both; elsewhere the test is left out."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; make test-browser")
    if not BROWSER:
        pytest.skip("QZO_BROWSER names no browser; make test-browser")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A page with everything in it, of a run whose names are hostile."""
    story = read_story(write_run(tmp_path_factory.mktemp("browser") / "run"))
    roles = {"weights": 300 * MIB, "quantization": 90 * MIB, "gradients": 500 * MIB, "activations": 200 * MIB}
    peaks = [*measured(story), Peak("ft-amp", "simulated, CPU", "allocated", roles)]
    answers = [
        Answered("Where is my parcel?\n" * 3, "shipping", "billing", "Shipping."),
        Answered("x" * 999, "y", "", "z"),
    ]
    place = story.folder.parent / "report.html"
    place.write_text(page(story, panels_of(story), peaks, None, answers), encoding="utf-8")
    return place


@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_shown_whole_and_asks_nothing_of_a_network(chromium, file, scheme, width):
    context = chromium.new_context(  # closed with the browser: after one is closed, others give no picture
        color_scheme=scheme, viewport={"width": width, "height": 900}
    )
    shown, requests, messages = context.new_page(), [], []
    shown.on("request", lambda request: requests.append(request.url))
    shown.on("console", lambda message: messages.append(message.text))
    shown.on("pageerror", lambda error: messages.append(str(error)))
    shown.on("dialog", lambda dialog: messages.append(dialog.message))
    shown.goto(file.as_uri())
    shown.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    PICTURES.mkdir(parents=True, exist_ok=True)
    shown.screenshot(path=PICTURES / f"{scheme}-{width}.png", full_page=True)
    assert requests == [file.as_uri()] and messages == []
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    heights = shown.evaluate("[...document.querySelectorAll('svg')].map(each => each.getBoundingClientRect().height)")
    assert len(heights) == 4 and min(heights) > 150
    smallest = shown.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')].map(each => each.getBoundingClientRect().height))"
    )
    assert smallest > 9  # pixels of the smallest letters' line
    channel = shown.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
    assert int(channel) < BLANK * 2 if scheme == "dark" else int(channel) > 255 - BLANK
