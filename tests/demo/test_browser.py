"""The page in a real browser: `make test-browser`. Skipped where gradio, playwright or a Chromium is missing."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from hf_hyla.runs import RunRecord
from hf_hyla.utils import models_folder


pytest.importorskip("gradio", reason="gradio is not installed: pip install hf-hyla[demo]", exc_type=ImportError)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: apt-get install chromium"),
]
expect = playwright.expect
# Milliseconds that a step may take on a machine that does other things.
_PATIENCE = 60_000
expect.set_options(timeout=_PATIENCE)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a demo that runs in a process of its own, with the models of the package."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "hf_hyla", "demo", "--no-browser", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "no_proxy": "127.0.0.1"}
    demo = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    found = next((match for line in demo.stdout if (match := re.search(r"The demo is at (\S+)", line))), None)
    assert found, "the demo has ended without an address"
    yield found[1]
    demo.terminate()
    demo.wait(_PATIENCE / 1000)


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 900)], ids=["desktop"])
def page(request, chromium, address):
    """The page, loaded. Whatever it asks of another place than the demo's, or complains of, fails the test."""
    width, height = request.param
    page = chromium.new_page(viewport={"width": width, "height": height}, reduced_motion="reduce")
    page.set_default_timeout(_PATIENCE)
    elsewhere, errors = [], []
    page.on("request", lambda asked: asked.url.startswith((address, "data:", "blob:")) or elsewhere.append(asked.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: said.type == "error" and errors.append(said.text))
    page.goto(address)
    expect(page.locator("#answers .hyla-model")).to_have_count(2)
    yield page
    page.close()
    assert (elsewhere, errors) == ([], [])


def panels(page) -> list[str]:
    """What the panels hold, in words, once the board is still."""
    page.wait_for_timeout(500)
    return [one.get_attribute("aria-label") for one in page.locator("#board [data-panel]").all()]


def cells(page) -> list[str]:
    return [one.get_attribute("fill") for one in page.locator("#answers .hyla-heat rect").all()]


def choose(page, where: str, option: str) -> None:
    page.locator(f"{where} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def test_the_page_loads_and_says_how_good_its_models_are(page):
    assert len(panels(page)) == 8
    expect(page.locator("#about")).to_contain_text("Unseen combination")
    expect(page.locator("#about")).to_contain_text("Ideal observer: The answer is")
    for name in ("hyla-sraven", "softmax-sraven"):
        accuracy = RunRecord.load(models_folder() / name).metrics["ood"]["accuracy"]
        expect(page.locator("#answers")).to_contain_text(f"Right on {accuracy:.1%} of unseen")
    expect(page.locator("#answers .hyla-model h3")).to_have_text(["HYLA", "Softmax attention"])
    # 2 models, 4 features, 4 layers, 2 keys, 16 heads.
    assert len(cells(page)) == 2 * 4 * 4 * 2 * 16
    if path := os.environ.get("HYLA_SCREENSHOT"):
        page.screenshot(path=path, full_page=True)


def test_new_puzzles_are_drawn_by_trained_and_by_unseen_rules(page):
    before = panels(page)
    page.click("#new")
    expect(page.locator("#about")).to_contain_text("Trained combination")
    drawn = panels(page)
    assert drawn != before
    page.click("#unseen")
    expect(page.locator("#about")).to_contain_text("Unseen combination")
    assert panels(page) not in (before, drawn)


def test_a_changed_rule_changes_the_board_and_the_codes(page):
    before, codes = panels(page), cells(page)
    choose(page, "#rule-0", "constant")
    expect(page.locator("#board [data-panel='1']")).not_to_have_attribute("aria-label", before[1])
    after = panels(page)
    shapes = [label.split(" ", 7)[6].rstrip("s") for label in after[:3]]
    assert len(set(shapes)) == 1, after
    assert [a == b for a, b in zip(codes, cells(page), strict=True)].count(False) > 50
    page.get_by_label("Shuffle the features").check()
    expect(page.locator("#board [data-panel='1']")).not_to_have_attribute("aria-label", after[1])


def test_a_panel_is_changed_by_keyboard_alone(page):
    page.locator("#board [data-panel='4']").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Digits of the framed panel: row 2, column 2")).to_be_visible()
    expect(page.locator("#board [data-panel='4']")).to_be_focused()
    page.get_by_label("Digits of the framed panel").fill("1 2 3 4")
    page.keyboard.press("Enter")
    expect(page.locator("#about")).to_contain_text("You changed a panel")
    assert panels(page)[4] == "row 2, column 2: 5 green triangles of size 3, digits 1 2 3 4"
    page.get_by_label("Digits on the panels").check()
    expect(page.locator("#board [data-panel='4']")).to_contain_text("1 2 3 4")


def test_wrong_digits_are_answered_by_a_sentence_and_change_nothing(page):
    before = panels(page)
    page.locator("#board [data-panel='2']").click()
    expect(page.get_by_label("Digits of the framed panel: row 1, column 3")).to_be_visible()
    for wrong in ("1 2 3 9", "one"):
        page.get_by_label("Digits of the framed panel").fill(wrong)
        page.get_by_role("button", name="Change").click()
        expect(page.get_by_text(f"got '{wrong}'").first).to_contain_text("A panel is 4 whole numbers from 0 to 7")
    assert panels(page) == before


def test_the_second_tab_draws_the_answers_of_a_function(page):
    page.get_by_role("tab", name="Fuzzy logic").click()
    lines = page.locator("#curve polyline")
    expect(lines).to_have_count(3)
    expect(page.locator("#curve")).to_contain_text("Unseen combination")
    before = lines.nth(1).get_attribute("points")
    page.get_by_role("radio", name="x3").check()
    expect(page.locator("#curve")).to_contain_text("x3, with x1")
    assert lines.nth(1).get_attribute("points") != before
    page.click("#new-function")
    expect(page.locator("#curve")).to_contain_text("Models were trained on functions of these terms")
    choose(page, "#term-0", "x1 and x2 and x3 and x4")
    expect(page.locator("#curve")).to_contain_text("set aside")
    choose(page, "#term-1", "x1 and x2 and x3 and x4")
    expect(page.get_by_role("alert")).to_contain_text("A function has 2 different terms: choose another one")
    choose(page, "#term-1", "not x1 and x2 and x3 and x4")
    expect(lines).to_have_count(3)


@pytest.mark.parametrize("page", [(390, 844)], indirect=True, ids=["phone"])
def test_the_page_fits_a_phone(page):
    for tab, picture in (("Puzzles", ".hyla-board"), ("Fuzzy logic", ".hyla-curve")):
        page.get_by_role("tab", name=tab).click()
        expect(page.locator(picture)).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        box = page.locator(picture).bounding_box()
        assert box["x"] >= 0 and box["width"] > 280 and box["x"] + box["width"] <= 390
