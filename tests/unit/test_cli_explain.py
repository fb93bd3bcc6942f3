"""`diffquant explain`: the command it gives runs, and what it cannot know it does not say."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from diffquant import cli, sources

FP8 = "emoji_flux_modelopt_fp8"


def explained(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = cli.run(["explain", "--json", *words])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def bundled() -> Path:
    return sources.checkpoint("emoji_flux").root.parents[1]


def test_its_command_draws(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, bundled: Path
) -> None:
    code, found = explained(capsys, str(bundled / FP8))
    words = shlex.split(found["command"])
    assert code == 0 and words[:3] == ["diffquant", "generate", "--transformer-path"]
    assert cli.run([*words[1:], "--num-inference-steps", "1", "--output-path", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir())


def test_a_pipeline_needs_no_base(capsys: pytest.CaptureFixture[str], bundled: Path) -> None:
    _, found = explained(capsys, str(bundled / "emoji_flux"))
    assert f"--model-path {bundled / 'emoji_flux'}" in found["command"]
    assert "BASE" not in found["command"]


def test_where_the_base_is_not_known_it_says_so_and_names_candidates(
    capsys: pytest.CaptureFixture[str], data: Path
) -> None:
    source = str(data / "modelopt" / "wan" / "fp8")
    _, found = explained(capsys, source)
    assert "--model-path BASE --transformer-path" in found["command"]
    assert "Wan-AI/Wan2.2-T2V-A14B-Diffusers" in found["bases"]
    _, found = explained(capsys, source, "--model-path", "my/wan")
    assert "--model-path my/wan" in found["command"]


def test_a_bare_file_is_given_as_weights(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    file = data / "nunchaku" / "tiny_flux" / "svdq-int4_r32-tiny-flux.safetensors"
    _, found = explained(capsys, str(file))
    assert f"--transformer-weights-path {file}" in found["command"]
    answers = {reader["tool"]: reader["answer"] for reader in found["readers"]}
    assert answers["Nunchaku"] == "yes" and answers["diffusers"] == "no"


def test_another_machine_gets_its_own_kernels(
    capsys: pytest.CaptureFixture[str], bundled: Path
) -> None:
    _, here = explained(capsys, str(bundled / FP8), "--device", "cpu")
    _, there = explained(capsys, str(bundled / FP8), "--device", "sm89")
    assert here["here"] != there["here"]
