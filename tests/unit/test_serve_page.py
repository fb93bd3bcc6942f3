"""The page in a real browser: draw, cancel, an error, a reload, a phone, no other network."""

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from diffquant import loading
from diffquant.resolve import ModelFlags
from diffquant.serve.page import page
from tests import browser as driver
from tests.serving import serving

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves
needs_chromium = pytest.mark.skipif(driver.CHROMIUM is None, reason="apt-get install chromium")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    pipeline = loading.load(run=loading.RunFlags(device="cpu"))

    def base() -> Any:
        return loading.load(ModelFlags(model_path="emoji_flux"), loading.RunFlags(device="cpu"))

    with serving(lambda: pipeline, reference=base, drain=1.0) as served:
        yield f"{served.url}/"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with driver.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def tab(browser: Any, url: str) -> Any:
    """The page freshly opened, with nothing remembered."""
    browser.size(1280, 800)
    browser.goto(url)
    browser.run("localStorage.clear()")
    browser.goto(url)
    browser.until("typeof info !== 'undefined' && info !== null")
    browser.errors.clear()
    return browser


def ask(tab: Any, prompt: str, **fields: object) -> None:
    tab.run("document.getElementById('prompt').focus()")
    tab.type(prompt)
    for name, value in fields.items():
        tab.run(f"document.querySelector('[name={name}]').value = '{value}'")
    tab.press("Enter", "Ctrl")


@needs_chromium
def test_a_picture_appears_with_its_parameters_and_its_truth(tab: Any) -> None:
    ask(tab, "red apple", seed=7, num_inference_steps=4)
    tab.until("history.length === 1 && !abort")
    assert "4 steps · seed 7" in tab.run("document.getElementById('parameters').textContent")
    truth = tab.run("document.getElementById('truth-shown').textContent")
    assert truth == "transformer: 26/34 linears fp8 via cpu_fp8 (weight-only), 8 bf16"
    assert tab.run("document.getElementById('picture').naturalWidth") == 64
    assert tab.errors == []


@needs_chromium
def test_a_size_that_was_rounded_is_told(tab: Any) -> None:
    ask(tab, "red apple", width=70, num_inference_steps=2)
    tab.until("history.length === 1 && !abort")
    told = tab.run("document.getElementById('truth-shown').textContent")
    assert "70x64 was asked for, the pipeline drew 64x64" in told


@needs_chromium
def test_a_slider_lies_between_the_served_and_the_unquantized_picture(tab: Any) -> None:
    tab.run("document.getElementById('compare').click()")
    ask(tab, "red apple", seed=7, num_inference_steps=4)
    tab.until("history.length === 1 && !abort && document.getElementById('reference').complete")
    tab.run("document.getElementById('cut').value = 20; cut()")
    cut = "getComputedStyle(document.getElementById('reference')).clipPath"
    assert tab.run(cut) == "inset(0px 0px 0px 20%)"
    assert tab.run("document.getElementById('reference').naturalWidth") == 64
    tab.run("document.getElementById('compare').click()")
    ask(tab, "", seed=8, num_inference_steps=2)
    tab.until("history.length === 2 && !abort")
    assert tab.run("document.getElementById('slider').hidden") is True
    assert tab.errors == []


@needs_chromium
def test_steps_are_seen_and_escape_cancels(tab: Any) -> None:
    ask(tab, "red apple", num_inference_steps=200)
    tab.until("document.getElementById('picture').alt.includes('step ')")
    tab.press("Escape")
    tab.until("!abort")
    assert "cancelled" in tab.run("document.getElementById('error').textContent")
    assert tab.run("history.length") == 0
    assert tab.run("document.getElementById('draw').disabled") is False


@needs_chromium
def test_a_refusal_is_shown_and_the_next_one_draws(tab: Any) -> None:
    ask(tab, "pear", width=99999)
    tab.until("!document.getElementById('error').hidden")
    assert "at most 4096" in tab.run("document.getElementById('error').textContent")
    ask(tab, "", width=64, num_inference_steps=2)
    tab.until("history.length === 1 && !abort")
    assert tab.run("document.getElementById('error').hidden") is True


@needs_chromium
def test_the_history_survives_a_reload_and_is_leafed_through_with_keys(tab: Any, url: str) -> None:
    ask(tab, "pear", num_inference_steps=2)
    tab.until("history.length === 1 && !abort")
    tab.run("document.getElementById('prompt').value = ''")
    ask(tab, "banana", num_inference_steps=2)
    tab.until("history.length === 2 && !abort")
    tab.goto(url)
    tab.until("typeof info !== 'undefined' && info !== null && history.length === 2")
    assert tab.run("document.getElementById('prompt-shown').textContent") == "banana"
    tab.press("ArrowRight", "Alt")
    assert tab.run("document.getElementById('prompt-shown').textContent") == "pear"


@needs_chromium
def test_the_page_fits_a_phone(tab: Any) -> None:
    tab.size(400, 800)
    time.sleep(0.1)
    assert tab.run("document.documentElement.scrollWidth") <= 400
    heights = "[...document.querySelectorAll('.buttons button')].map(b => b.offsetHeight)"
    assert min(tab.run(heights)) >= 44


def test_the_page_is_one_small_file_that_asks_nobody_else() -> None:
    text, policy = page()
    assert len(text) < 24_000
    assert not re.search(r"https?://|//\w+\.\w+|src=|@import", text)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
