"""The sound a tiny LTX-2 draws: as diffusers gives it, in the file, and told."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from diffquant import cli
from diffquant.errors import NonFiniteError, RunError
from diffquant.run import Request, fill, generate, generate_together, read_metadata, save
from diffquant.sound import sample_rate, sounds
from tests import pipelines
from tests.pipelines import PIPELINES

av = pytest.importorskip("av")
pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves

SMALL = {
    "prompt": "red apple",
    "width": 32,
    "height": 32,
    "num_frames": 5,
    "fps": 8,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "max_sequence_length": 16,
}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    made = pipelines.ltx2()
    made.set_progress_bar_config(disable=True)
    return made


def asked(pipeline: Any, **more: Any) -> Request:
    return fill(Request(**{**SMALL, **more}), pipeline, {})


def test_each_video_sounds_as_diffusers_lets_it(pipeline: Any) -> None:
    made = generate(pipeline, asked(pipeline, num_images_per_prompt=2, seed=1))
    told = {name: value for name, value in SMALL.items() if name != "fps"}
    told["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in (1, 2)]
    with torch.inference_mode():
        truth = pipeline(**told, frame_rate=8, num_videos_per_prompt=2, output_type="pt").audio
    first, second = made.sounds
    assert numpy.array_equal(first.samples, truth[0].float().numpy())
    assert numpy.array_equal(second.samples, truth[1].float().numpy())
    assert not numpy.array_equal(first.samples, second.samples)
    assert first.rate == pipeline.vocoder.config.output_sampling_rate == 8000


def test_requests_drawn_together_keep_each_its_own_sound(pipeline: Any) -> None:
    requests = [asked(pipeline, seed=seed) for seed in (1, 2)]
    (first,), (second,) = (each.sounds for each in generate_together(pipeline, requests))
    assert first.samples.shape == second.samples.shape
    assert not numpy.array_equal(first.samples, second.samples)


def test_the_file_of_a_video_has_its_sound_and_lasts_as_long_as_its_frames(
    pipeline: Any, tmp_path: Path
) -> None:
    made = generate(pipeline, asked(pipeline, num_frames=9))
    (path,) = save(made, tmp_path)
    with av.open(path) as container:
        seen, heard = container.streams
        lasts = [float(stream.duration * stream.time_base) for stream in (seen, heard)]
        samples = numpy.concatenate([frame.to_ndarray() for frame in container.decode(heard)], 1)
    one = heard.codec_context.frame_size / heard.rate
    assert lasts == [9 / 8, pytest.approx(9 / 8, abs=one)]
    assert made.sounds[0].samples.shape[1] / 8000 == pytest.approx(9 / 8, abs=one)
    assert (heard.rate, len(samples)) == (8000, 2)


def test_the_command_says_what_became_of_the_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, _ = pipelines.saved(PIPELINES["ltx2"], tmp_path / "ltx2")
    flags = [word for key, value in SMALL.items() for word in _typed(key, value)]
    words = ["generate", "--model-path", str(base), "--device", "cpu", *flags]
    words += ["--output-path", str(tmp_path), "--output-file-name"]
    assert cli.run([*words, "clip.mp4"]) == 0
    assert "with sound (8000 Hz stereo), saved as" in capsys.readouterr().err
    told = read_metadata(tmp_path / "clip.mp4")["sound"]
    assert (told["sample_rate"], told["channels"]) == (8000, 2)
    assert cli.run([*words, "clip.webp"]) == 0
    said = capsys.readouterr().err
    assert "note: what is heard (8000 Hz stereo) is left out, .webp holds no sound" in said
    assert "drawn" in said and "without its sound, saved as" in said
    assert read_metadata(tmp_path / "clip.webp")["sound"] == "left out: .webp holds none"


def test_sound_that_is_not_finite_stops_the_run_and_names_the_layer(pipeline: Any) -> None:
    bias = pipeline.vocoder.conv_in.bias
    kept = bias.detach().clone()
    torch.nn.init.constant_(bias, float("nan"))
    with pytest.raises(NonFiniteError, match=r"the sound is not finite.*'vocoder\.conv_in'"):
        generate(pipeline, asked(pipeline))
    bias.data.copy_(kept)
    assert generate(pipeline, asked(pipeline)).sounds


def test_a_pipeline_says_how_fast_its_samples_follow_each_other() -> None:
    waves = torch.zeros(1, 800)
    (sound,) = sounds(SimpleNamespace(audio_sample_rate=16_000), SimpleNamespace(audio=waves))
    assert (sound.samples.shape, sound.rate) == ((1, 800), 16_000)
    assert sounds(None, SimpleNamespace(frames=waves)) == ()
    with pytest.raises(RunError, match="does not tell the sample rate"):
        sample_rate(SimpleNamespace())
    with pytest.raises(RunError, match="6 channels"):
        sounds(None, SimpleNamespace(audio=torch.zeros(1, 6, 800)))


def _typed(key: str, value: Any) -> tuple[str, str]:
    return f"--{key.replace('_', '-')}", str(value)
