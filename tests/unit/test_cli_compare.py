"""`diffquant compare`: words, exit codes, files."""

import json
from pathlib import Path

import pytest

from diffquant.cli import run

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves

WORDS = ["compare", "--device", "cpu", "--num-inference-steps", "2", "--prompt", "red apple"]


def test_fp8_keeps_smoke_and_the_files_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, data = tmp_path / "out.html", tmp_path / "out.json"
    files = ["--report", str(report), "--output-json", str(data)]
    assert run([*WORDS, "--seeds", "1,2", *files]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("emoji_flux_modelopt_fp8 keeps smoke, 2 drawings, PSNR between")
    assert "26/34 linears fp8 via cpu_fp8" in err
    assert report.read_text(encoding="utf-8").startswith("<!doctype html>")
    told = json.loads(data.read_text())
    assert [pair["seed"] for pair in told["candidates"][0]["pairs"]] == [1, 2]
    assert told["command"].startswith("diffquant compare --device cpu")


def test_a_missed_threshold_exits_with_1_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*WORDS, "--threshold", "psnr=99", "--markdown"]) == 1
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith("smoke is missed: emoji_flux_modelopt_fp8: PSNR ")
    assert last.endswith(" dB < 99.00 dB")
    assert out.startswith("|  | verdict | PSNR |")


def test_commands_draw_what_was_compared_and_time_has_an_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "new" / "out.json"
    words = ["--seed", "0", "--repeat", "2", "--output-json", str(data)]
    assert run([*WORDS, *words]) == 0
    assert "before: " in capsys.readouterr().out
    told = json.loads(data.read_text())
    drawn = "--prompt 'red apple' --num-inference-steps 2 --seed 0"
    assert told["candidates"][0]["command"].endswith(drawn)
    assert told["reference"]["command"].endswith(drawn)
    assert len(told["candidates"][0]["cost"]["step_seconds"]["rounds"]) == 2


def test_a_saved_reference_needs_no_words_about_the_drawings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = str(tmp_path / "reference.safetensors")
    assert run([*WORDS, "--seeds", "3,4", "--save-reference", saved]) == 0
    words = ["compare", "--device", "cpu", "--reference", saved]
    assert run(words) == 0
    assert "time and memory of the reference are those of its capture" in capsys.readouterr().err
    assert run([*words, "--seed", "3"]) == 2
    assert "drawn with seeds [3, 4], not [3]" in capsys.readouterr().err


def test_sides_are_spelled_as_the_peers_spell_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("car\n\nfox face\n")
    two = ["--candidate-transformer-path", "emoji_flux_modelopt_fp8"] * 2
    peers = ["--reference-component-path", "vae=emoji_flux", "--candidate-numerics", "faithful"]
    words = ["compare", "--device", "cpu", "--num-inference-steps", "1", "--prompts", str(prompts)]
    assert (
        run([*words, *two, *peers, "--candidate-component-path", "vae=emoji_flux", "--json"]) == 0
    )
    told = json.loads(capsys.readouterr().out)
    names = [candidate["name"] for candidate in told["candidates"]]
    assert names == ["emoji_flux_modelopt_fp8 (1)", "emoji_flux_modelopt_fp8 (2)"]
    assert "--numerics faithful" in told["candidates"][0]["command"]
    assert [pair["prompt"] for pair in told["candidates"][0]["pairs"]] == ["car", "fox face"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--threshold", "psnr"], "--threshold 'psnr' is not of the form NAME=VALUE"),
        (["--threshold", "psnr=high"], "psnr=high: no number"),
        (["--threshold", "pnsr=3"], "there is no figure 'pnsr'"),
        (["--level", "harsh"], "there is no level 'harsh'"),
        (["--seeds", "a"], "--seeds 'a' is no list of numbers"),
        (["--seeds", "1", "--seed", "2"], "--seeds and --seed exclude each other"),
        (["--seeds", "1", "--num-images-per-prompt", "2"], "--num-images-per-prompt exclude"),
        (["--json", "--markdown"], "--json and --markdown exclude each other"),
        (["--prompts", "nothing.txt"], "--prompts 'nothing.txt': there is no such file"),
        (["--report", "/"], "--report '/': no file can be written there"),
        (["--report", "/dev/null/out.html"], "no file can be written there"),
        (["--repeat", "0"], "0 is not in the range x>=1"),
        (["--threshold", "lpips=0.1"], "lpips cannot be measured: torchvision is not installed"),
        (["--threshold", "image_reward=0"], "image_reward cannot be measured"),
        (["--reference", "a", "--save-reference", "b"], "a saved reference is not saved again"),
        (["--reference-component-path", "vae"], "'vae' is not of the form NAME=VALUE"),
        (["--candidate-quantization", "fp7"], "no quantization is called 'fp7'"),
        (["--reference", "nothing.safetensors"], "there is no file 'nothing.safetensors'"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_model_is_loaded(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*WORDS, *words]) == 2
    assert said in capsys.readouterr().err
