"""The report in a real browser, wide and narrow: nothing overflows, the slider slides, tabs turn."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import diffquant
from tests import browser as driver

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # diffusers and transformers warn of themselves
    pytest.mark.skipif(driver.CHROMIUM is None, reason="apt-get install chromium"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "out.html"
    found = diffquant.compare(
        "emoji_flux", prompts=["red apple"], seeds=[0, 1], num_inference_steps=2, device="cpu",
        candidates=[{"quantization": "fp8"}, {"quantization": "int4"}],
    )  # fmt: skip
    path.write_text(found.to_html(), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with driver.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_its_window_and_reports_no_error(
    browser: Any, url: str, width: int, tmp_path: Path
) -> None:
    browser.size(width, 900)
    browser.goto(url)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.run("document.querySelectorAll('svg').length") == 2 * 2 + 2
    assert browser.errors == []


def test_the_slider_moves_the_edge_between_the_two_pictures(browser: Any, url: str) -> None:
    browser.goto(url)
    browser.run(
        "window.slide = document.querySelector('.slide'); const range = slide.querySelector('input');"
        "range.value = 20; range.dispatchEvent(new Event('input'))"
    )
    shown = "getComputedStyle(slide.querySelector('.over-it')).clipPath"
    assert browser.run(shown) == "inset(0px 0px 0px 20%)"


def test_a_tab_shows_its_candidate_and_no_other(browser: Any, url: str) -> None:
    browser.goto(url)
    browser.run("document.querySelectorAll('.tabs button')[1].click()")
    hidden = "[...document.querySelectorAll('.candidate')].map(panel => panel.hidden)"
    assert browser.run(hidden) == [True, False]


def test_light_turns_dark_and_back(browser: Any, url: str) -> None:
    browser.goto(url)
    colour = "getComputedStyle(document.body).backgroundColor"
    light = browser.run(colour)
    browser.run("document.querySelector('.theme').click()")
    dark = browser.run(colour)
    browser.run("document.querySelector('.theme').click()")
    assert light != dark
    assert browser.run(colour) == light
