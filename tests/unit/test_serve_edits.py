"""Pictures in, pictures out: what OpenAI's client sends to /v1/images/edits, and what is refused."""

import base64
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image, ImageDraw

from diffquant import loading, run, sources
from diffquant.resolve import ModelFlags
from diffquant.serve.settings import Limits
from tests import pipelines
from tests.serving import Served, decoded, serving

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves

STEPS = {"num_inference_steps": 3}
SIDE = 64


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The bundled weights in diffusers' pipeline that paints over the white part of a mask."""
    folder = tmp_path_factory.mktemp("inpaint")
    bundled = sources.checkpoint("emoji_flux").root.parent
    index = json.loads((bundled / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "_class_name": "FluxInpaintPipeline"})
    )
    for part in bundled.iterdir():
        if part.is_dir():
            (folder / part.name).symlink_to(part)
    return loading.load(ModelFlags(model_path=str(folder)), loading.RunFlags(device="cpu"))


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this module's server puts what comes in."""
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def served(pipeline: Any, uploads: Path) -> Iterator[Served]:
    kept, tempfile.tempdir = tempfile.tempdir, str(uploads)
    try:
        with serving(lambda: pipeline) as running:
            yield running
    finally:
        tempfile.tempdir = kept


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def picture(colour: str = "white") -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), colour)


def left_half_open() -> Image.Image:
    """OpenAI's kind of mask: transparent where to paint."""
    mask = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 255))
    ImageDraw.Draw(mask).rectangle((0, 0, SIDE // 2 - 1, SIDE), fill=(0, 0, 0, 0))
    return mask


def edited(served: Served, **files: Any) -> Any:
    form = {"prompt": "red apple", **{key: str(value) for key, value in STEPS.items()}}
    parts = [(name, (f"{name}.png", data, "image/png")) for name, data in files.items()]
    return served.http.post("/v1/images/edits", data=form, files=parts)


def changed(image: Image.Image, left: bool) -> float:
    """Mean distance from white of one half, 0 to 255."""
    half = image.convert("L").crop(
        (0, 0, SIDE // 2 - 8, SIDE) if left else (SIDE // 2 + 8, 0, SIDE, SIDE)
    )
    return 255 - sum(half.tobytes()) / len(half.tobytes())


def test_openais_client_edits_where_the_mask_is_transparent(served: Served) -> None:
    answer = served.openai.images.edit(
        image=("white.png", png(picture())),
        mask=("mask.png", png(left_half_open())),
        prompt="red apple",
        extra_body=STEPS,
    )
    assert answer.data is not None
    image = decoded(answer.data[0].b64_json or "")
    assert image.size == (SIDE, SIDE)
    assert changed(image, left=True) > 4 * changed(image, left=False)


def test_a_mask_without_transparency_is_white_where_to_paint(served: Served) -> None:
    alpha = left_half_open().getchannel("A")
    grey = alpha.point(lambda value: 255 - value)
    one = edited(served, image=png(picture()), mask=png(left_half_open())).json()
    other = edited(served, image=png(picture()), mask=png(grey)).json()
    first, second = (decoded(each["data"][0]["b64_json"]) for each in (one, other))
    assert first.tobytes() == second.tobytes()


def test_nothing_of_an_upload_stays_and_no_path_is_told(served: Served, uploads: Path) -> None:
    answer = edited(served, image=png(picture()), mask=png(left_half_open()))
    assert answer.status_code == 200, answer.text
    assert list(uploads.iterdir()) == []
    told = answer.json()["request"]
    assert told["image"][0].startswith("upload-") and "/" not in told["image"][0]


def test_the_record_in_the_picture_names_the_upload_only(served: Served, tmp_path: Path) -> None:
    answer = edited(served, image=png(picture()), mask=png(left_half_open())).json()
    path = tmp_path / "edited.png"
    path.write_bytes(base64.b64decode(answer["data"][0]["b64_json"]))
    request = run.read_metadata(path)["request"]
    assert request["image"] == answer["request"]["image"]
    assert request["mask_image"].startswith("upload-")


def test_a_stream_calls_its_events_edits(served: Served) -> None:
    form = {"prompt": "red apple", "stream": "true", "progress": "true", "num_inference_steps": "3"}
    files = {"image": ("a.png", png(picture())), "mask": ("m.png", png(left_half_open()))}
    with served.http.stream("POST", "/v1/images/edits", data=form, files=files) as got:
        kinds = [line.partition(": ")[2] for line in got.iter_lines() if line.startswith("event")]
    assert set(kinds) == {"image_edit.progress", "image_edit.completed"}
    assert kinds[-1] == "image_edit.completed"


@pytest.mark.parametrize(
    ("files", "param"),
    [
        ({}, "image"),
        ({"image": b"no picture"}, "image"),
        ({"image": b""}, "image"),
        ({"image": png(picture())[:100]}, "image"),
        ({"image": png(picture()), "mask": b"GIF89a"}, "mask"),
        ({"image": png(picture())}, None),
        ({"image": png(picture()), "control": png(picture())}, "control"),
    ],
)
def test_what_is_no_picture_is_a_400_that_names_it(
    served: Served, uploads: Path, files: dict[str, bytes], param: str | None
) -> None:
    answer = edited(served, **files)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert list(uploads.iterdir()) == []


def test_a_picture_may_come_as_text_and_is_never_fetched(served: Served, uploads: Path) -> None:
    text = {
        name: "data:image/png;base64," + base64.b64encode(png(image)).decode()
        for name, image in (("image", picture()), ("mask", left_half_open()))
    }
    form = {"prompt": "red apple", **{key: str(value) for key, value in STEPS.items()}}
    as_text = served.http.post("/v1/images/edits", data={**form, **text})
    as_files = edited(served, image=png(picture()), mask=png(left_half_open()))
    assert as_text.json()["request"] == as_files.json()["request"]
    address = served.http.post(
        "/v1/images/edits", data={**form, **text, "image": "http://127.0.0.1/a.png"}
    )
    assert address.status_code == 400
    assert "nothing is fetched" in address.json()["error"]["message"]
    assert list(uploads.iterdir()) == []


def test_a_bomb_is_refused_by_its_header(served: Served) -> None:
    side = 5000
    assert side * side > Limits().uploaded
    bomb = png(Image.new("1", (side, side)))
    assert len(bomb) < 10_000
    answer = edited(served, image=bomb)
    assert answer.status_code == 400
    assert f"{side}x{side}" in answer.json()["error"]["message"]


def test_a_field_that_would_be_ignored_is_named(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.openai.images.edit(
            image=("white.png", png(picture())), prompt="red apple", input_fidelity="high"
        )
    assert caught.value.param == "input_fidelity"


def test_a_pipeline_that_follows_edges_is_served(tmp_path: Path) -> None:
    base, _ = pipelines.saved(pipelines.PIPELINES["flux-control"], tmp_path / "control")
    model = ModelFlags(model_path=str(base))
    form = {"prompt": "red apple", "num_inference_steps": "2", "size": "32x32"}
    files = {"image": ("edges.png", png(picture()))}
    with serving(lambda: loading.load(model, loading.RunFlags(device="cpu"))) as following:
        drawn = following.http.post("/v1/images/edits", data=form, files=files)
        missing = following.draw(prompt="red apple", size="32x32")
    assert drawn.status_code == 200, drawn.text
    assert "a FluxControlPipeline follows a picture" in missing.json()["error"]["message"]


def test_a_pipeline_without_pictures_in_says_where_to_go() -> None:
    with serving(lambda: loading.load(run=loading.RunFlags(device="cpu"))) as plain:
        answer = edited(plain, image=png(picture()))
    assert answer.status_code == 400
    assert "/v1/images/generations" in answer.json()["error"]["message"]
