"""openai's video calls against a real server with a tiny Wan."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from diffquant import loading
from diffquant.resolve import ModelFlags
from tests import pipelines
from tests.serving import Served, serving, until
from tests.tiny import WAN_FP8, tiny_wan_pipeline

av = pytest.importorskip("av")
pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves

SMALL = {"num_inference_steps": 2, "num_frames": 5, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    base = tiny_wan_pipeline(tmp_path_factory.mktemp("wan") / "base")
    model = ModelFlags(model_path=str(base), transformer_path=str(WAN_FP8))
    pipeline = loading.load(model, loading.RunFlags(device="cpu"))
    with serving(lambda: pipeline) as running:
        yield running


def made(served: Served, seed: int = 42, **given: Any) -> Any:
    """A video, waited for at most 30 seconds."""
    asked = served.openai.videos.create(
        prompt="red car", size="32x32", **given, extra_body={**SMALL, "seed": seed}
    )
    assert asked.status in ("queued", "in_progress")
    until(lambda: served.openai.videos.retrieve(asked.id).status in ("completed", "failed"))
    return served.openai.videos.retrieve(asked.id)


def frames(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_openais_client_makes_lists_fetches_and_deletes_a_video(served: Served) -> None:
    done = made(served, seed=3)
    assert (done.status, done.progress, done.size, done.object) == (
        "completed", 100, "32x32", "video",
    )  # fmt: skip
    assert frames(served.openai.videos.download_content(done.id).read()) == 5
    thumbnail = served.openai.videos.download_content(done.id, variant="thumbnail").read()
    assert Image.open(io.BytesIO(thumbnail)).size == (32, 32)
    sheet = served.openai.videos.download_content(done.id, variant="spritesheet").read()
    assert Image.open(io.BytesIO(sheet)).size == (128, 128)
    assert done.id in [video.id for video in served.openai.videos.list()]
    assert served.openai.videos.delete(done.id).deleted is True
    with pytest.raises(openai.NotFoundError):
        served.openai.videos.retrieve(done.id)


def test_a_deleted_video_stops_at_its_next_step(served: Served) -> None:
    body = {"prompt": "red car", "size": "32x32", **SMALL, "num_inference_steps": 200}
    name = served.http.post("/v1/videos", json=body).json()["id"]
    until(lambda: served.http.get(f"/v1/videos/{name}").json()["status"] == "in_progress")
    job = name.removeprefix("video_")
    served.http.delete(f"/v1/videos/{name}")
    until(lambda: served.job(job)["state"] == "cancelled")
    assert served.job(job)["step"] < 200


def test_a_video_can_be_waited_for(served: Served) -> None:
    body = {"prompt": "red car", "size": "32x32", **SMALL}
    answer = served.http.post("/v1/videos/sync", json=body)
    assert answer.headers["content-type"] == "video/mp4"
    assert float(answer.headers["x-inference-time-s"]) > 0
    assert frames(answer.content) == 5


def test_the_list_has_pages(served: Served) -> None:
    names = [made(served).id for _ in range(3)][::-1]
    first = served.http.get("/v1/videos", params={"limit": 2}).json()
    assert [each["id"] for each in first["data"]] == names[:2]
    assert first["has_more"] is True
    rest = served.http.get("/v1/videos", params={"after": first["last_id"]}).json()
    assert rest["data"][0]["id"] == names[2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_frames", 100_000),
        ("seconds", 0),
        ("n", 2),
        ("input_reference", "https://example.org/cat.png"),
        ("output_path", "/tmp/x"),
        ("size", "wide"),
        ("quality", "hd"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(served: Served, field: str, value: Any) -> None:
    body = {"prompt": "red car", "size": "32x32", **SMALL, field: value}
    answer = served.http.post("/v1/videos", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


def test_seconds_and_frames_are_said_once(served: Served) -> None:
    body = {"prompt": "red car", "size": "32x32", **SMALL, "seconds": 4}
    answer = served.http.post("/v1/videos", json=body)
    assert "leave one out" in answer.json()["error"]["message"]


def test_a_file_is_refused_by_the_name_of_its_field(served: Served) -> None:
    files = {"input_reference": ("cat.png", b"\x89PNG" + b"0" * 100, "image/png")}
    answer = served.http.post("/v1/videos", data={"prompt": "red car"}, files=files)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "input_reference"


@pytest.mark.parametrize("body", [b"", b"[1]", b"\xff", b"[" * 50_000])
def test_a_hostile_body_is_a_400(served: Served, body: bytes) -> None:
    assert served.http.post("/v1/videos", content=body).status_code == 400


def test_pictures_are_not_drawn_by_a_pipeline_of_videos(served: Served) -> None:
    assert "POST /v1/videos" in served.draw(prompt="red car").json()["error"]["message"]
    assert httpx.get(f"{served.url}/v1/videos/video_x").status_code == 404


def test_a_video_begins_with_the_picture_that_was_sent(tmp_path: Path) -> None:
    base, _ = pipelines.saved(pipelines.PIPELINES["wan-i2v-experts"], tmp_path / "i2v")
    pipeline = loading.load(ModelFlags(model_path=str(base)), loading.RunFlags(device="cpu"))
    data = png(Image.new("RGB", (32, 32), "red"))
    text = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    asked = {"prompt": "red car", "size": "32x32", **SMALL}
    with serving(lambda: pipeline) as beginning:
        video = made(beginning, input_reference=data)
        inline = beginning.http.post(
            "/v1/videos/sync", json={**asked, "input_reference": {"image_url": text}}
        )
        without = beginning.http.post("/v1/videos", json=asked)
    assert (video.status, inline.status_code) == ("completed", 200)
    assert video.to_dict()["request"]["image"][0].startswith("upload-")
    assert without.json()["error"]["message"] == (
        "a WanImageToVideoPipeline begins with a picture: send input_reference"
    )


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_a_video_that_is_fetched_has_its_sound(tmp_path: Path) -> None:
    base, _ = pipelines.saved(pipelines.PIPELINES["ltx2"], tmp_path / "ltx2")
    model = ModelFlags(model_path=str(base))
    pipeline = loading.load(model, loading.RunFlags(device="cpu"))
    with serving(lambda: pipeline) as sounding:
        answer = sounding.http.post(
            "/v1/videos/sync", json={"prompt": "red apple", "size": "32x32", "fps": 8, **SMALL}
        )
    assert answer.status_code == 200, answer.text
    with av.open(io.BytesIO(answer.content)) as container:
        seen, heard = container.streams
        one = heard.codec_context.frame_size / heard.rate
        lasts = float(heard.duration * heard.time_base)
    assert (heard.codec.name, heard.rate) == ("aac", 8000)
    assert lasts == pytest.approx(float(seen.duration * seen.time_base), abs=one)
