"""A tiny Wan of two experts: videos, per frame and in time, and calls of both transformers."""

from typing import Any

import pytest

import diffquant
from diffquant.compare.comparison import Comparison
from diffquant.compare.report import page
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    base = tiny.tiny_wan_pipeline(tmp_path_factory.mktemp("tiny") / "wan", experts=2)
    sizes: dict[str, Any] = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 3}
    return diffquant.compare(
        str(base),
        prompts=["red car"],
        max_sequence_length=16,
        device="cpu",
        candidates=[{"quantization": "fp8", "quantize_all": True}],
        **sizes,
    )


def test_both_experts_are_quantized_asked_and_judged(comparison: Comparison) -> None:
    (candidate,) = comparison.candidates
    asked = {each.component for each in candidate.one_step}
    assert asked == {"transformer", "transformer_2"}
    assert {layer.path.partition(".")[0] for layer in candidate.layers} == asked
    for layer in candidate.layers:
        assert layer.kernel is not None, layer.path
        assert layer.weight is not None, layer.path
    assert all(each.distance.relative_l2 > 0 for each in candidate.one_step)


def test_a_video_is_judged_per_frame_and_in_time(comparison: Comparison) -> None:
    (pair,) = comparison.candidates[0].pairs
    assert pair.candidate_frames.shape == (5, 3, 32, 32)
    assert len(pair.likeness.frames) == 5
    assert pair.likeness.flicker is not None
    assert pair.likeness.flicker > 0
    html = page(comparison)
    assert "frame 3 of 5" in html
    assert "worst frame" in html
