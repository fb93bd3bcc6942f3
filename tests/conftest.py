"""What every test gets: a home of its own, no network, and a skip where an accelerator is missing."""

import lzma
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Close the hub before anything imports huggingface_hub, which reads this once."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    unpack_fixtures()


def unpack_fixtures() -> None:
    """The largest true files travel compressed; each is unpacked beside itself, once, whole."""
    for packed in (ROOT / "tests" / "data").rglob("*.xz"):
        wanted = packed.with_suffix("")
        if not wanted.exists():
            partial = wanted.with_name(f"{wanted.name}.{os.getpid()}")
            partial.write_bytes(lzma.decompress(packed.read_bytes()))
            partial.replace(wanted)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip `gpu` tests, with the reason, where there is no accelerator."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no accelerator: torch.cuda.is_available() is False")


@pytest.fixture(autouse=True)
def isolated_home(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Redirect every place a library keeps user state to an empty directory."""
    home = tmp_path_factory.mktemp("home")
    for variable in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(home))
    for variable in [name for name in os.environ if name.startswith(("SGLANG_", "DIFFQUANT_"))]:
        monkeypatch.delenv(variable)
    return home


@pytest.fixture
def data() -> Path:
    """The true files of foreign tools that tests read."""
    return ROOT / "tests" / "data"
