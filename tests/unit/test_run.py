"""Requests are filled from the right source, pictures are checked, saved and never overwritten."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffquant import run
from diffquant.errors import NonFiniteError, RunError, UsageError
from diffquant.run import Request, Result, fill, generate, read_metadata, recorded, save
from tests import tiny

SMALL = Request(
    prompt="red apple", width=32, height=32, num_inference_steps=2, max_sequence_length=16
)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny.tiny_flux()


@pytest.fixture(scope="module")
def result(pipeline: Any) -> Result:
    return generate(pipeline, fill(SMALL, pipeline, {}))


# fill


def test_typed_values_win_over_the_preset_and_the_preset_over_the_pipeline(pipeline: Any) -> None:
    defaults = {"num_inference_steps": 7, "guidance_scale": 2.5}
    filled = fill(Request(prompt="x", num_inference_steps=3), pipeline, defaults)
    assert filled.num_inference_steps == 3
    assert filled.guidance_scale == 2.5
    assert filled.max_sequence_length == 512
    assert filled.seed == run.DEFAULT_SEED


def test_a_default_the_pipeline_does_not_know_is_left_out_but_a_typed_value_is_refused(
    pipeline: Any,
) -> None:
    assert fill(Request(prompt="x"), pipeline, {"num_frames": 9}).num_frames is None
    with pytest.raises(UsageError, match="--num-frames means nothing to a FluxPipeline"):
        fill(Request(prompt="x", num_frames=9), pipeline, {})


def test_a_negative_prompt_that_would_have_no_effect_is_refused(pipeline: Any) -> None:
    request = Request(prompt="x", negative_prompt="blurry")
    with pytest.raises(UsageError, match="no effect at --true-cfg-scale 1") as caught:
        fill(request, pipeline, {})
    assert caught.value.hint == "--true-cfg-scale 4"


def test_true_guidance_without_a_negative_prompt_gets_an_empty_one(pipeline: Any) -> None:
    assert fill(Request(prompt="x", true_cfg_scale=4.0), pipeline, {}).negative_prompt == ""


# generate


def test_every_step_is_reported_and_timed(pipeline: Any) -> None:
    seen: list[tuple[int, int]] = []
    drawn = generate(pipeline, fill(SMALL, pipeline, {}), lambda done, of: seen.append((done, of)))
    assert seen == [(1, 2), (2, 2)]
    assert len(drawn.step_seconds) == 2
    assert drawn.images[0].size == (32, 32)


def test_the_picture_is_what_diffusers_itself_draws(pipeline: Any, result: Result) -> None:
    plain = pipeline(
        "red apple",
        width=32,
        height=32,
        num_inference_steps=2,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(run.DEFAULT_SEED),
    )
    assert plain.images[0].tobytes() == result.images[0].tobytes()


def test_another_seed_draws_another_picture(pipeline: Any, result: Result) -> None:
    other = fill(Request(**{**SMALL.typed, "seed": 7}), pipeline, {})
    assert generate(pipeline, other).images[0].tobytes() != result.images[0].tobytes()


def test_image_i_of_a_request_has_the_noise_of_seed_plus_i(pipeline: Any) -> None:
    two = generate(pipeline, fill(Request(**SMALL.typed, num_images_per_prompt=2), pipeline, {}))
    second = generate(pipeline, fill(Request(**SMALL.typed, seed=43), pipeline, {}))
    difference = _difference(two.images[1], second.images[0])
    assert difference < 2.0
    assert _difference(two.images[0], second.images[0]) > 2 * difference


def _difference(first: Image.Image, second: Image.Image) -> float:
    ours, theirs = (torch.tensor(list(image.tobytes())).float() for image in (first, second))
    return float((ours - theirs).abs().mean())


def test_a_layer_that_gives_nan_is_named_with_the_step() -> None:
    broken = tiny.tiny_flux()
    with torch.no_grad():
        broken.transformer.single_transformer_blocks[1].proj_mlp.weight[0, 0] = torch.nan
    path = "transformer.single_transformer_blocks.1.proj_mlp"
    with pytest.raises(NonFiniteError, match=f"after step 1 of 2.*{path}"):
        generate(broken, fill(SMALL, broken, {}))


def test_pixels_that_are_not_finite_stop_the_run() -> None:
    broken = tiny.tiny_flux()
    with torch.no_grad():
        broken.vae.decoder.conv_out.weight[0, 0] = torch.nan
    with pytest.raises(
        NonFiniteError, match=r"(?s)pixels are not finite.*vae\.decoder\.conv_out.*--dtype float32"
    ):
        generate(broken, fill(SMALL, broken, {}))


def test_a_picture_of_one_colour_is_not_saved() -> None:
    broken = tiny.tiny_flux()
    with torch.no_grad():
        broken.vae.decoder.conv_out.weight.zero_()
        broken.vae.decoder.conv_out.bias.fill_(-9.0)
    with pytest.raises(RunError, match="one colour only"):
        generate(broken, fill(SMALL, broken, {}))


def test_a_request_without_a_prompt_is_refused(pipeline: Any) -> None:
    with pytest.raises(UsageError, match="no prompt"):
        generate(pipeline, Request())


# save


def drawing(prompt: str = "A red apple!", **values: Any) -> Result:
    image = Image.new("RGB", (4, 4), "red")
    request = Request(prompt=prompt, seed=3, **values)
    return Result(request=request, images=(image,), seconds=1.0, step_seconds=(0.5, 0.5))


def test_the_name_is_made_of_prompt_and_seed_and_nothing_is_overwritten(tmp_path: Path) -> None:
    names = [save(drawing(), tmp_path / "outputs")[0].name for _ in range(3)]
    assert names == ["a-red-apple-3.png", "a-red-apple-3-2.png", "a-red-apple-3-3.png"]
    assert not list(tmp_path.rglob("*.part"))


def test_a_prompt_cannot_leave_the_output_folder(tmp_path: Path) -> None:
    (path,) = save(drawing("../../etc/passwd " + "x" * 300), tmp_path)
    assert path.parent == tmp_path
    assert len(path.name) < 80


def test_a_typed_name_gets_its_suffix_and_other_kinds_of_picture_are_refused(
    tmp_path: Path,
) -> None:
    assert save(drawing(), tmp_path, "mine")[0].name == "mine.png"
    assert save(drawing(), tmp_path, "mine.png")[0].name == "mine-2.png"
    with pytest.raises(UsageError, match="written as PNG, not '.jpg'"):
        save(drawing(), tmp_path, "mine.jpg")


def test_the_picture_holds_its_whole_history(tmp_path: Path) -> None:
    report = {"components": {"transformer": {"digest": "abc", "kernels": {"x": "cpu_fp8"}}}}
    written = recorded(drawing("größer"), flags={"dtype": "bfloat16"}, report=report)
    (path,) = save(written, tmp_path)
    record = read_metadata(path)
    assert record["request"] == {"prompt": "größer", "seed": 3}
    assert record["report"] == report
    assert record["flags"] == {"dtype": "bfloat16"}
    assert {"torch", "diffusers", "threads"} <= set(record["versions"])
    assert json.loads(json.dumps(record)) == record


def test_a_picture_without_a_record_says_so(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UsageError, match="no record of how it was made"):
        read_metadata(tmp_path / "plain.png")
    with pytest.raises(UsageError, match="is not a picture"):
        read_metadata(tmp_path / "text.png")
    with pytest.raises(UsageError, match="there is no file"):
        read_metadata(tmp_path / "missing.png")


def test_what_diffusers_refuses_is_wrong_usage_not_a_crash(pipeline: Any) -> None:
    request = fill(Request(**{**SMALL.typed, "max_sequence_length": 600}), pipeline, {})
    with pytest.raises(UsageError, match="FluxPipeline refuses: .*max_sequence_length"):
        generate(pipeline, request)
