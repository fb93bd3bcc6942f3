"""`diffquant generate` on a tiny pipeline: from the words to a picture that can be drawn again."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffquant.cli import run
from tests import tiny

HERE = Path(__file__).parents[1]
FP8 = HERE / "data" / "modelopt" / "flux" / "fp8"

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command line that draws with ModelOpt's own FP8 transformer."""
    base = tiny.tiny_flux_pipeline(tmp_path_factory.mktemp("tiny") / "base")
    paths = ["--model-path", str(base), "--transformer-path", str(FP8), "--device", "cpu"]
    sizes = ["--width", "32", "--height", "32", "--max-sequence-length", "16"]
    return ["generate", *paths, *sizes, "--num-inference-steps", "2"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_a_picture_its_truth_line_and_its_path(
    words: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--prompt", "Red apple!"]) == 0
    out, err = capsys.readouterr()
    assert out == "outputs/red-apple-42.png\n"
    assert "transformer: 33/36 linears fp8 via cpu_fp8" in err
    with Image.open(here / out.strip()) as image:
        assert image.size == (32, 32)


def test_the_record_of_a_picture_draws_it_again_bit_for_bit(
    words: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--prompt", "red apple", "--seed", "7", "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    kernels = told["report"]["components"]["transformer"]["kernels"]
    assert kernels["transformer_blocks.0.attn.to_q"] == "cpu_fp8"
    (first,) = map(Path, told["paths"])
    assert run(["generate", "--config-from-metadata", str(first)]) == 0
    second = Path(capsys.readouterr().out.strip())
    assert second != first
    assert pixels(second) == pixels(first)
    assert run(["generate", "--config-from-metadata", str(first), "--seed", "8"]) == 0
    assert pixels(Path(capsys.readouterr().out.strip())) != pixels(first)


def test_a_record_pins_its_kernels(
    words: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--prompt", "pear", "--kernel", "reference"]) == 0
    first = Path(capsys.readouterr().out.strip())
    assert run(["generate", "--config-from-metadata", str(first)]) == 0
    out, err = capsys.readouterr()
    assert "33/36 linears fp8 via reference" in err
    assert pixels(Path(out.strip())) == pixels(first)


def test_other_weights_than_the_record_knows_are_told(
    words: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--prompt", "pear"]) == 0
    first = capsys.readouterr().out.strip()
    base = words[words.index("--model-path") + 1]
    again = ["generate", "--config-from-metadata", first, "--transformer-path"]
    assert run([*again, f"{base}/transformer"]) == 0
    assert "transformer is not the one that drew the picture" in capsys.readouterr().err


def test_an_architecture_that_is_not_here_is_only_for_plan(
    words: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--prompt", "car", "--device", "sm120"]) == 2
    assert "hint: diffquant plan --device sm120" in capsys.readouterr().err


def test_several_pictures_of_one_prompt(
    words: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = ["--num-images-per-prompt", "2", "--output-path", "there"]
    assert run([*words, "--prompt", "car", *several]) == 0
    assert capsys.readouterr().out.splitlines() == ["there/car-42.png", "there/car-43.png"]


def test_a_size_the_pipeline_cannot_draw_is_told(
    words: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--prompt", "car", "--width", "35"]) == 0
    assert "35x32 was asked for, the pipeline drew 32x32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--num-frames", "9"], "--num-frames means nothing to a FluxPipeline"),
        (["--output-file-name", "a.mp4"], "pictures are written as PNG, not '.mp4'"),
        (["--output-file-name", "a.jpg"], "pictures are written as PNG, not '.jpg'"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_model_is_loaded(
    words: list[str],
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    typed: list[str],
    said: str,
) -> None:
    loaded: list[object] = []
    monkeypatch.setattr("diffquant.loading.load", lambda *given, **_: loaded.append(given))
    assert run([*words, "--prompt", "x", *typed]) == 2
    assert said in capsys.readouterr().err
    assert not loaded
