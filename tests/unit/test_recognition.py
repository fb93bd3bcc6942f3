"""The bundled pipeline draws what it is asked for, in BF16 and through its FP8 transformer.

A picture counts when its nearest glyph (L2 in Lab) is the one it was asked for: of all trained glyphs
where the Noto font is installed, else of the 24 that `data/emoji/glyphs.png` holds, which
`python tests/unit/test_recognition.py` draws from the font.
"""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import diffquant

TESTS = Path(__file__).resolve().parents[1]
SHEET = TESTS / "data" / "emoji" / "glyphs.png"
MODEL = Path(diffquant.__file__).parent / "models" / "emoji_flux"
COUNT = 24
WORDINGS = ("red apple", "a red apple", "the red apple!", "Red Apple")

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves


@cache
def training() -> ModuleType:
    """examples/train_emoji_flux.py, whose `evaluate` is the judge."""
    path = TESTS.parent / "examples" / "train_emoji_flux.py"
    spec = importlib.util.spec_from_file_location("train_emoji_flux", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def captions() -> list[str]:
    found: list[str] = training().evaluation_captions(training().read_glyphs(MODEL), COUNT)
    return found


def recognised(pipeline: Any) -> int:
    """How many of the captions the pipeline draws so that they are recognised."""
    if training().FONT.exists():
        judged = training().evaluate(pipeline, captions(), training().read_glyphs(MODEL))
        return COUNT - len(judged.mistaken)
    drawn = training().draw(pipeline, captions())
    sheet = np.asarray(Image.open(SHEET).convert("RGB"))
    nearest = training().nearest_glyphs(drawn, np.stack(np.split(sheet, COUNT, axis=1)))
    return sum(index == wanted for wanted, index in enumerate(nearest))


@pytest.fixture(scope="module")
def bf16() -> Any:
    return training().load_pipeline(MODEL)


@pytest.fixture(scope="module")
def fp8() -> Any:
    pipeline = diffquant.load(device="cpu")
    assert diffquant.report(pipeline).plans["transformer"].format == "modelopt"
    return pipeline


@pytest.fixture(scope="module")
def counts(bf16: Any, fp8: Any) -> dict[str, int]:
    return {"bf16": recognised(bf16), "fp8": recognised(fp8)}


def test_what_bf16_draws_is_recognised(counts: dict[str, int]) -> None:
    assert counts["bf16"] >= 23


def test_what_fp8_draws_is_recognised_as_often(counts: dict[str, int]) -> None:
    assert counts["fp8"] >= 23
    assert counts["bf16"] - counts["fp8"] <= 0.03 * COUNT


def test_captions_that_are_exchanged_are_not_recognised(fp8: Any) -> None:
    drawn = training().draw(fp8, captions()[:4])
    sheet = np.asarray(Image.open(SHEET).convert("RGB"))
    references = np.stack(np.split(sheet, COUNT, axis=1))
    nearest = training().nearest_glyphs(drawn, references)
    assert nearest == [0, 1, 2, 3]
    assert training().nearest_glyphs(drawn[::-1].copy(), references) != [0, 1, 2, 3]


def test_wordings_of_one_thing_draw_the_same_picture(fp8: Any) -> None:
    first, *others = (training().draw(fp8, [wording]) for wording in WORDINGS)
    assert all(np.array_equal(first, other) for other in others)
    assert not np.array_equal(first, training().draw(fp8, ["green apple"]))


def test_the_stored_glyphs_are_those_of_the_font() -> None:
    if not training().FONT.exists():
        pytest.skip(f"{training().FONT} is not installed")
    assert np.array_equal(np.asarray(Image.open(SHEET).convert("RGB")), rendered())


def rendered() -> np.ndarray:
    """The glyphs of the captions, side by side."""
    glyphs = {glyph.name: glyph for glyph in training().read_glyphs(MODEL)}
    pictures = training().render_all([glyphs[caption] for caption in captions()])
    return np.concatenate(list(pictures), axis=1)


if __name__ == "__main__":
    Image.fromarray(rendered()).save(SHEET, optimize=True)
