"""`diffquant client` against a real server on loopback."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffquant import loading
from diffquant.cli import run
from diffquant.run import read_metadata
from tests.serving import Served, serving

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    pipeline = loading.load(run=loading.RunFlags(device="cpu"))
    with serving(lambda: pipeline) as running:
        yield running


@pytest.fixture
def words(served: Served, tmp_path: Path) -> list[str]:
    few = ["--num-inference-steps", "2", "--output-path", str(tmp_path)]
    return ["client", "--url", served.url, *few]


def test_pictures_of_a_server_are_saved_with_their_record(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--prompt", "Red apple!", "--num-images-per-prompt", "2"]
    assert run([*words, *asked]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(tmp_path / f"red-apple-{seed}.png") for seed in (42, 43)]
    assert "26/34 linears fp8 via cpu_fp8" in err
    assert read_metadata(tmp_path / "red-apple-43.png")["image_seed"] == 43


def test_nothing_is_overwritten(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for _ in range(2):
        assert run([*words, "--prompt", "pear", "--json"]) == 0
        told: dict[str, Any] = json.loads(capsys.readouterr().out)
        paths += told["paths"]
    assert [Path(path).name for path in paths] == ["pear-42.png", "pear-42-2.png"]


def test_a_refusal_of_the_server_is_told(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--prompt", "pear", "--guidance-scale", "3"]) == 1
    assert "guidance_scale would be ignored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "told", "code"),
    [
        ("http://127.0.0.1:9", "nobody answers at", 1),
        ("ftp://127.0.0.1", "is no address of a server", 2),
    ],
)
def test_an_address_without_a_server_is_told(
    url: str, told: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["client", "--prompt", "pear", "--url", url]) == code
    assert told in capsys.readouterr().err
