"""What works alone works together: encodings with offload, compilation, LoRA and callbacks.

`docs/combinations.md` is written by `python -m tests.unit.test_combinations` from this data.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import diffquant
from diffquant import run
from diffquant.offload import blocks

INK = "emoji_flux_blue_ink:0.7"
ASKED = {"num_inference_steps": 2, "height": 64, "width": 64, "max_sequence_length": 16}
#: What is loaded; None is the bundled ModelOpt FP8 file, and "dense" the BF16 model.
ENCODINGS: tuple[str | None, ...] = (
    None, "dense", "fp8", "fp8_block", "int8", "mxfp8", "mxfp4", "nvfp4", "int4", "svdq-int4",
    "svdq-nvfp4",
)  # fmt: skip
QUICK: tuple[str | None, ...] = (None, "int8", "nvfp4", "svdq-int4")
PAGE = Path(__file__).parents[2] / "docs" / "combinations.md"

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


@dataclass(frozen=True)
class Way:
    """How a picture is drawn, beside its encoding."""

    disk: bool = False
    compile: bool = False
    lora: bool = False
    callback: bool = False

    def __str__(self) -> str:
        return "+".join(item.name for item in fields(self) if getattr(self, item.name)) or "plain"


WAYS = tuple(Way(*chosen) for chosen in itertools.product((False, True), repeat=4))
#: Two for each quick encoding: every factor on and off with every encoding, every pair of factors.
CHOSEN = {
    None: (Way(True, True, False, True), Way(False, False, True, False)),
    "int8": (Way(True, False, True, True), Way(False, True, False, False)),
    "nvfp4": (Way(True, True, True, False), Way(False, False, False, True)),
    "svdq-int4": (Way(True, False, False, False), Way(False, True, True, True)),
}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def drawn(encoding: str | None, way: Way) -> tuple[Tensor, list[int]]:
    """Pixels, and the steps a callback saw."""
    asked = {} if encoding is None else {"model_path": "emoji_flux"}
    if encoding not in (None, "dense"):
        asked["quantization"] = str(encoding)
    pipeline = diffquant.load(
        device="cpu",
        offload="disk" if way.disk else "none",
        lora=(INK,) if way.lora else (),
        **asked,
    )
    if way.compile:
        # Traced as for any compiler, and run as traced: a block that breaks apart raises.
        for block in blocks(pipeline.transformer):
            block.compile(backend="eager", fullgraph=True)
    seen: list[int] = []

    def watch(_: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if way.callback:
            seen.append(step)
        return values

    request = run.fill(run.Request(prompt="red apple"), pipeline, ASKED)
    return run.draw(pipeline, request, watch), seen


@cache
def plain(encoding: str | None, lora: bool) -> Tensor:
    return drawn(encoding, Way(lora=lora))[0]


def require_same(encoding: str | None, way: Way) -> None:
    pixels, seen = drawn(encoding, way)
    assert torch.equal(pixels, plain(encoding, way.lora)), way
    assert seen == ([0, 1] if way.callback else [])


@pytest.mark.parametrize("encoding", QUICK, ids=str)
def test_together_they_draw_what_the_encoding_draws_alone(encoding: str | None) -> None:
    for way in CHOSEN[encoding]:
        require_same(encoding, way)


def test_every_pair_of_factors_is_among_the_quick_ones() -> None:
    ways = [way for chosen in CHOSEN.values() for way in chosen]
    for one, other in itertools.combinations([item.name for item in fields(Way)], 2):
        assert {(getattr(way, one), getattr(way, other)) for way in ways} == {
            (False, False), (False, True), (True, False), (True, True),
        }  # fmt: skip


def test_a_lora_that_was_lost_on_the_way_would_be_seen() -> None:
    assert not torch.equal(plain(None, lora=True), plain(None, lora=False))


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_every_encoding_in_every_way(encoding: str | None, way: Way) -> None:
    require_same(encoding, way)


def test_the_page_says_what_is_tested() -> None:
    assert PAGE.read_text("utf-8") == page()


def page() -> str:
    """The table of combinations as Markdown."""
    quick = {(encoding, way) for encoding, ways in CHOSEN.items() for way in ways}
    head = ["encoding", *map(str, WAYS)]
    rows = [
        [_called(encoding), *("CI" if (encoding, way) in quick else "long" for way in WAYS)]
        for encoding in ENCODINGS
    ]
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        "# What was tested together\n\n"
        "The bundled pipeline on a CPU, two steps. Every combination draws the picture that its "
        "encoding\ndraws alone (with the LoRA where there is one), bit for bit. *disk* is "
        "`--offload disk`, *compile* traces the\nrepeated blocks as whole graphs (Dynamo, eager "
        "backend), *lora* is the bundled LoRA at 0.7, *callback*\n`callback_on_step_end`. "
        "*CI* runs at every change, *long* with `make long`.\n\n"
        f"{table}\n"
    )


def _called(encoding: str | None) -> str:
    return "ModelOpt FP8 file" if encoding is None else encoding


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
