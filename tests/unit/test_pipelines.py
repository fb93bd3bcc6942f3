"""Every kind of pipeline draws, dense and quantized while loading, and as diffusers itself does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import diffquant
from diffquant.errors import UsageError
from diffquant.linear import QuantLinear
from diffquant.run import Request, Result, fill, generate
from tests import pipelines, tiny
from tests.pipelines import PIPELINES, Kind

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    pipelines.draw_small(monkeypatch)


@pytest.fixture
def ask(tmp_path: Path) -> Callable[[Kind], dict[str, Any]]:
    def asked(kind: Kind) -> dict[str, Any]:
        for colour in ("red", "white"):
            Image.new("RGB", (32, 32), colour).save(tmp_path / f"{colour}.png")
        picture = str(tmp_path / "red.png")
        return {
            "prompt": "red apple",
            "width": 32,
            "height": 32,
            "num_inference_steps": 2,
            "guidance_scale": 1.0,
            **({"num_frames": 5} if kind.video else {}),
            **({"image": (picture,) * kind.pictures} if kind.pictures else {}),
            **({"mask_image": str(tmp_path / "white.png")} if kind.masked else {}),
            **kind.request,
        }

    return asked


def drawn(pipeline: Any, words: dict[str, Any]) -> Result:
    return generate(pipeline, fill(Request(**words), pipeline, {}))


def pixels(result: Result) -> torch.Tensor:
    """All pictures, or all frames, between 0 and 255."""
    pictures = [*result.images, *(frame for clip in result.videos for frame in clip)]
    return torch.stack(
        [torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) for picture in pictures]
    ).float()


@pytest.mark.parametrize("name", PIPELINES)
def test_every_kind_draws_dense_as_diffusers_does_and_quantized_nearly_so(
    name: str, tmp_path: Path, ask: Callable[[Kind], dict[str, Any]]
) -> None:
    kind = PIPELINES[name]
    words = ask(kind)
    folder, handed = pipelines.saved(kind, tmp_path / "pipeline")
    truth = pixels(drawn(pipelines.loaded(folder, handed), words))
    dense = diffquant.load(str(folder), components=handed, device="cpu")
    ours = pixels(drawn(dense, words))
    assert {plan.family for plan in diffquant.report(dense).plans.values()} == {kind.family}
    assert torch.equal(ours, truth)
    quantized = diffquant.load(
        str(folder),
        components=handed,
        quantization="int8_weight_only",
        component_quantizations={"text_encoder": "int8_weight_only"},
        quantize_all=True,
        device="cpu",
    )
    plans = diffquant.report(quantized).plans
    for component, plan in plans.items():
        layers = [
            part
            for part in getattr(quantized, component).modules()
            if isinstance(part, QuantLinear)
        ]
        assert len(layers) == len(plan.quantized) > 0
    difference = (pixels(drawn(quantized, words)) - truth).abs().mean()
    assert 0 < difference < 12


def test_a_pipeline_that_follows_a_picture_is_not_run_without_one(
    ask: Callable[[Kind], dict[str, Any]],
) -> None:
    kind = PIPELINES["flux-control"]
    pipeline, words = kind.make(), ask(kind)
    first = pixels(drawn(pipeline, words))
    Image.new("RGB", (32, 32), "blue").save(words["image"][0])
    assert not torch.equal(pixels(drawn(pipeline, words)), first)
    words.pop("image")
    with pytest.raises(UsageError, match="a FluxControlPipeline follows a picture"):
        fill(Request(**words), pipeline, {})


@pytest.mark.parametrize("name", [name for name, kind in PIPELINES.items() if kind.pictures])
def test_several_pictures_are_refused_where_they_would_be_a_batch(
    name: str, ask: Callable[[Kind], dict[str, Any]]
) -> None:
    kind = PIPELINES[name]
    pipeline, words = kind.make(), ask(kind)
    words["image"] = words["image"][:1] * 2
    if kind.pictures == 2:
        assert drawn(pipeline, words).images
    else:
        with pytest.raises(UsageError, match="starts from one picture, and there are 2"):
            fill(Request(**words), pipeline, {})


def test_frames_a_second_reach_the_pipeline_that_draws_by_them(
    ask: Callable[[Kind], dict[str, Any]],
) -> None:
    kind = PIPELINES["ltx2"]
    pipeline, words = kind.make(), ask(kind)
    assert fill(Request(**words), pipeline, {}).fps == 24
    slow, fast = (pixels(drawn(pipeline, {**words, "fps": fps})) for fps in (4, 50))
    assert not torch.equal(slow, fast)


def test_a_component_that_is_handed_over_is_used_and_one_without_a_place_refused(
    tmp_path: Path,
) -> None:
    base = str(tiny.tiny_flux_pipeline(tmp_path / "flux"))
    mine = tiny.tiny_flux().scheduler
    assert diffquant.load(base, components={"scheduler": mine}, device="cpu").scheduler is mine
    with pytest.raises(UsageError, match="components has 'schedular', and the pipeline has no"):
        diffquant.load(base, components={"schedular": mine}, device="cpu")
    with pytest.raises(UsageError, match="components has 'transformer', which is loaded from"):
        diffquant.load(base, components={"transformer": None}, device="cpu")
