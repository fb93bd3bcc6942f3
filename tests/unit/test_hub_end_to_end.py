"""A picture from two hub repositories, through the command line, in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffquant
from tests.fake_hub import FakeHub, serving

MODELS = Path(diffquant.__file__).parent / "models"
GENERATE = [
    "generate",
    "--prompt",
    "red apple",
    "--model-path",
    "org/emoji",
    "--model-id",
    "emoji_flux",
]
OVERRIDE = ["--transformer-path", "org/emoji-fp8"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """The bundled models as if somebody had uploaded them."""
    root = tmp_path / "hub" / "org"
    root.mkdir(parents=True)
    (root / "emoji").symlink_to(MODELS / "emoji_flux")
    (root / "emoji-fp8").symlink_to(MODELS / "emoji_flux_modelopt_fp8")
    with serving(tmp_path / "hub") as running:
        yield running


def typed(hub: FakeHub, folder: Path, *words: str, offline: bool = False) -> tuple[int, str, str]:
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1" if offline else "0",
    }
    ran = subprocess.run(
        [sys.executable, "-m", "diffquant", *words],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    return ran.returncode, ran.stdout, ran.stderr


def test_an_override_from_the_hub_draws_and_its_base_weights_stay_there(
    hub: FakeHub, tmp_path: Path
) -> None:
    code, out, err = typed(hub, tmp_path, *GENERATE, *OVERRIDE)
    assert code == 0, err
    assert (tmp_path / out.strip()).is_file()
    assert "26/34 linears fp8" in err
    weights = [name for name in hub.downloaded if name.endswith(".safetensors")]
    assert "org/emoji-fp8/diffusion_pytorch_model.safetensors" in weights
    assert "org/emoji/transformer/diffusion_pytorch_model.safetensors" not in weights


def test_offline_without_a_download_says_which_repository_is_missing(
    hub: FakeHub, tmp_path: Path
) -> None:
    code, _, err = typed(hub, tmp_path, *GENERATE, *OVERRIDE, offline=True)
    assert code == 1
    assert "org/emoji" in err
    assert "hint: " in err
    assert hub.requests == []
