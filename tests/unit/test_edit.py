"""Pictures go in: editing, filling a mask, and what is refused before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffquant import cli
from diffquant.errors import UsageError
from diffquant.run import Request, fill, generate, read_metadata, recorded, save
from tests import tiny

SMALL: dict[str, Any] = {
    "prompt": "red apple",
    "width": 32,
    "height": 32,
    "num_inference_steps": 2,
    "max_sequence_length": 16,
}

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, str]:
    made = {}
    for name, colour in {"red": "red", "blue": "blue", "mask": "white", "nothing": "black"}.items():
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
        made[name] = str(tmp_path / f"{name}.png")
    return made


@pytest.fixture
def small_kontext(monkeypatch: pytest.MonkeyPatch) -> Any:
    from diffusers.pipelines.flux import pipeline_flux_kontext

    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(32, 32)])
    return tiny.tiny_kontext()


def test_the_picture_to_edit_changes_the_picture_drawn(
    small_kontext: Any, pictures: dict[str, str]
) -> None:
    drawn = [
        generate(small_kontext, fill(Request(**SMALL, image=image), small_kontext, {})).images[0]
        for image in ((pictures["red"],), (pictures["blue"],), None)
    ]
    assert len({picture.tobytes() for picture in drawn}) == 3
    assert {picture.size for picture in drawn} == {(32, 32)}


def test_a_mask_says_what_is_painted_over(pictures: dict[str, str]) -> None:
    pipeline = tiny.tiny_fill()
    drawn = []
    for mask in ("mask", "nothing"):
        words = {**SMALL, "image": (pictures["red"],), "mask_image": pictures[mask]}
        drawn.append(generate(pipeline, fill(Request(**words), pipeline, {})).images[0].tobytes())
    assert drawn[0] != drawn[1]
    with pytest.raises(UsageError, match="FluxFillPipeline starts from a mask"):
        fill(Request(**SMALL, image=(pictures["red"],)), pipeline, {})


def test_the_record_names_the_pictures(
    small_kontext: Any, pictures: dict[str, str], tmp_path: Path
) -> None:
    request = fill(Request(**SMALL, image=(pictures["red"],)), small_kontext, {})
    made = recorded(generate(small_kontext, request), flags={}, report={})
    (path,) = save(made, tmp_path / "out")
    assert read_metadata(path)["request"]["image"] == [pictures["red"]]


def test_a_picture_for_a_pipeline_that_takes_none_is_refused(pictures: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="--image means nothing to a FluxPipeline"):
        fill(Request(**SMALL, image=(pictures["red"],)), tiny.tiny_flux(), {})


def test_a_file_that_is_missing_or_no_picture_is_told(
    small_kontext: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["generate", "--prompt", "x", "--image", "none.png"]) == 2
    assert "--image 'none.png': there is no such file" in capsys.readouterr().err
    (tmp_path / "text.png").write_text("no picture")
    request = fill(Request(**SMALL, image=(str(tmp_path / "text.png"),)), small_kontext, {})
    with pytest.raises(UsageError, match="is not a picture"):
        generate(small_kontext, request)


def test_a_video_starts_from_a_picture(pictures: dict[str, str]) -> None:
    pipeline = tiny.tiny_wan_image_to_video()
    words = {**SMALL, "num_frames": 5, "guidance_scale": 1.0}
    with pytest.raises(UsageError, match="starts from a picture, and there is none") as caught:
        fill(Request(**words), pipeline, {})
    assert caught.value.hint == "--image picture.png"
    (red,), (blue,) = (
        generate(pipeline, fill(Request(**words, image=(pictures[name],)), pipeline, {})).videos
        for name in ("red", "blue")
    )
    assert len(red) == 5
    assert red[0].tobytes() != blue[0].tobytes()


def test_qwen_image_edit_takes_the_picture_and_the_words(
    pictures: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit

    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda *_: (64, 64, None))
    pipeline = tiny.tiny_qwen_image_edit()
    drawn = []
    for name in ("red", "blue"):
        request = fill(Request(**SMALL, image=(pictures[name],)), pipeline, {})
        drawn.append(generate(pipeline, request).images[0])
    assert drawn[0].tobytes() != drawn[1].tobytes()
