"""Videos of tiny Wan and HunyuanVideo pipelines, in files that tell how they were made."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from diffquant import cli, run, video
from diffquant.errors import UsageError
from diffquant.run import Request, Result, fill, generate, read_metadata, recorded, save
from tests import tiny

SMALL = Request(
    prompt="red car",
    width=32,
    height=32,
    num_frames=5,
    num_inference_steps=2,
    max_sequence_length=16,
    guidance_scale=1.0,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tiny.tiny_wan_pipeline(tmp_path_factory.mktemp("tiny") / "wan")
    return made


def moving(fps: int | None = 8) -> Result:
    """A red square that crosses the picture in four frames."""
    frames = []
    for place in range(4):
        frame = Image.new("RGB", (32, 16), "white")
        frame.paste("red", (8 * place, 4, 8 * place + 8, 12))
        frames.append(frame)
    request = Request(prompt="Square", seed=1, fps=fps)
    made = Result(
        request=request, images=(), seconds=1.0, step_seconds=(1.0,), videos=(tuple(frames),)
    )
    return recorded(made, flags={"dtype": "bfloat16"}, report={"truth": ["größer"]})


@pytest.mark.parametrize("ending", [".mp4", ".gif", ".webp"])
def test_a_video_holds_its_history_and_is_never_overwritten(tmp_path: Path, ending: str) -> None:
    first, second = (save(moving(), tmp_path, f"clip{ending}")[0] for _ in range(2))
    assert (first.name, second.name) == (f"clip{ending}", f"clip-2{ending}")
    record = read_metadata(first)
    assert record["request"] == {"prompt": "Square", "seed": 1, "fps": 8}
    assert record["report"] == {"truth": ["größer"]}
    assert not list(tmp_path.rglob("*.part"))


def test_an_mp4_has_every_frame_at_the_asked_rate(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    (path,) = save(moving(), tmp_path)
    assert path.name == "square-1.mp4"
    with av.open(path) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 8
    assert [frame.size for frame in frames] == [(32, 16)] * 4
    red = [frame.getpixel((8 * place + 4, 8)) for place, frame in enumerate(frames)]
    assert all(pixel[0] > 180 and pixel[1] < 90 for pixel in red)


def test_a_gif_shows_its_frames_and_png_writes_each_alone(tmp_path: Path) -> None:
    (path,) = save(moving(), tmp_path, "clip.gif")
    with Image.open(path) as image:
        assert image.n_frames == 4
        assert image.info["duration"] == pytest.approx(125, abs=5)
    paths = save(moving(), tmp_path, "clip.png")
    assert [path.name for path in paths] == [f"clip-000{index}.png" for index in range(4)]
    assert read_metadata(paths[2])["frame"] == 2


def test_an_ending_nothing_writes_and_a_missing_package_are_told_before_drawing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert video.ending(None) == video.ending("clip") == ".mp4"
    with pytest.raises(UsageError, match="not written as '.avi'"):
        video.ending("clip.avi")
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs PyAV") as caught:
        video.ending(None)
    assert "diffquant[video]" in str(caught.value)
    assert video.ending("clip.webp") == ".webp"


def clicking(seconds: float, at: float, rate: int = 24_000) -> video.Sound:
    """Silence of that length with one click in it, the right channel softer than the left."""
    samples = numpy.zeros((2, round(seconds * rate)), numpy.float32)
    place = round(at * rate)
    samples[:, place : place + 24] = [[0.9], [0.3]]
    return video.Sound(samples=samples, rate=rate)


def heard(path: Path) -> tuple[Any, Any]:
    """The one audio stream of a file, and its samples [channels, S]."""
    with pytest.importorskip("av").open(path) as container:
        (stream,) = container.streams.audio
        return stream, numpy.concatenate([f.to_ndarray() for f in container.decode(stream)], 1)


@pytest.mark.parametrize("drawn", [0.3, 0.5, 0.62])
def test_an_mp4_sounds_as_long_as_its_frames_last_and_is_in_time(
    tmp_path: Path, drawn: float
) -> None:
    (path,) = save(replace(moving(), sounds=(clicking(drawn, at=0.25),)), tmp_path)
    stream, samples = heard(path)
    assert (stream.codec.name, stream.rate, stream.layout.name) == ("aac", 24_000, "stereo")
    frames, one = 4 / 8 * 24_000, stream.codec_context.frame_size
    assert abs(stream.duration * stream.time_base * 24_000 - frames) <= one
    loud = numpy.abs(samples).argmax(1)
    assert numpy.abs(loud - 0.25 * 24_000).max() < one / 8
    assert numpy.abs(samples[1]).max() < 0.6 * numpy.abs(samples[0]).max()


def test_a_video_without_sound_has_no_track_for_it_and_says_nothing(tmp_path: Path) -> None:
    (path,) = save(moving(), tmp_path)
    with pytest.importorskip("av").open(path) as container:
        assert not container.streams.audio
    assert "sound" not in read_metadata(path)


@pytest.mark.parametrize("ending", [".gif", ".webp", ".png"])
def test_a_file_that_holds_no_sound_says_that_there_was_some(tmp_path: Path, ending: str) -> None:
    sounding = replace(moving(), sounds=(clicking(0.5, at=0.1),))
    path = save(recorded(sounding, flags={}, report={}), tmp_path, f"clip{ending}")[0]
    assert read_metadata(path)["sound"] == f"left out: {ending} holds none"


@pytest.mark.parametrize("name", ["tiny_wan", "tiny_hunyuan_video"])
def test_a_video_pipeline_makes_the_asked_frames(name: str) -> None:
    pipeline = getattr(tiny, name)()
    words = {**SMALL.typed, "max_sequence_length": 16 if name == "tiny_wan" else 32}
    request = fill(Request(**words), pipeline, {"fps": 24})
    made = generate(pipeline, request)
    assert made.images == ()
    assert [len(frames) for frames in made.videos] == [5]
    assert made.videos[0][0].size == (32, 32)
    assert made.request.fps == 24


def test_two_videos_of_one_prompt_differ(base: Path) -> None:
    pipeline = tiny.tiny_wan()
    request = fill(Request(**SMALL.typed, num_images_per_prompt=2), pipeline, {})
    first, second = generate(pipeline, request).videos
    assert request.fps == run.DEFAULT_FPS
    assert first[0].tobytes() != second[0].tobytes()


def test_a_quantized_wan_draws_on_the_command_line_and_again(
    base: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = ["--model-path", str(base), "--transformer-path", str(tiny.WAN_FP8)]
    sizes = ["--width", "32", "--height", "32", "--num-frames", "5", "--fps", "8"]
    words = ["generate", "--prompt", "red car", *paths, *sizes, "--max-sequence-length", "16"]
    assert cli.run([*words, "--num-inference-steps", "2", "--device", "cpu", "--json"]) == 0
    out, err = capsys.readouterr()
    (first,) = json.loads(out)["paths"]
    assert first == "outputs/red-car-42.mp4"
    assert "fp8 via" in err
    again = ["generate", "--config-from-metadata", first, "--output-file-name", "again.gif"]
    assert cli.run(again) == 0
    second = capsys.readouterr().out.strip()
    assert second == "outputs/again.gif"
    assert read_metadata(Path(second))["request"] == read_metadata(Path(first))["request"]
    assert cli.run([*words, "--output-file-name", "x.avi"]) == 2
