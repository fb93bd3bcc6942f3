"""Stored bytes as tensors: mapped, never copied, and never written back."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffquant.errors import HeaderError
from diffquant.tensors import DTYPES, Weights

FP8 = Path(__file__).resolve().parents[1] / "data" / "modelopt" / "flux" / "fp8"
STORED = FP8 / "diffusion_pytorch_model.safetensors"


def container(path: Path, dtype: str, shape: list[int], data: bytes) -> Path:
    """One tensor `t`, spelled out by the safetensors format's own rules."""
    import json
    import struct

    header = json.dumps({"t": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}})
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)
    return path


def test_every_tensor_is_what_safetensors_reads() -> None:
    weights = Weights([STORED])
    for name, wanted in load_file(STORED).items():
        found = weights.tensor(0, name)
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert torch.equal(
            found.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)
        )


def test_the_second_file_is_another_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "first.safetensors")
    save_file({"a": torch.ones(4)}, tmp_path / "second.safetensors")
    weights = Weights([tmp_path / "first.safetensors", tmp_path / "second.safetensors"])
    assert [weights.tensor(file, "a").sum().item() for file in (0, 1)] == [0, 4]


def test_writing_to_a_tensor_cannot_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    before = path.read_bytes()
    Weights([path]).tensor(0, "a").fill_(7)
    assert path.read_bytes() == before


def test_tensors_outlive_what_opened_them(tmp_path: Path) -> None:
    save_file({"a": torch.arange(1000.0)}, tmp_path / "a.safetensors")
    kept = Weights([tmp_path / "a.safetensors"]).tensor(0, "a")
    os.remove(tmp_path / "a.safetensors")
    assert torch.equal(kept, torch.arange(1000.0))


@pytest.mark.parametrize("dtype", [name for name in DTYPES if not name.startswith("F4")])
def test_every_dtype_has_its_size(dtype: str, tmp_path: Path) -> None:
    size = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    path = container(tmp_path / "a.safetensors", dtype, [2, 3], bytes(6 * size))
    assert Weights([path]).tensor(0, "t").shape == (2, 3)


def test_packed_four_bit_floats_are_bytes(tmp_path: Path) -> None:
    path = container(tmp_path / "a.safetensors", "F4", [2, 4], bytes([1, 2, 3, 4]))
    assert Weights([path]).tensor(0, "t").tolist() == [[1, 2], [3, 4]]


def test_empty_tensors_and_scalars(tmp_path: Path) -> None:
    save_file({"none": torch.zeros(0), "one": torch.tensor(3.0)}, tmp_path / "a.safetensors")
    weights = Weights([tmp_path / "a.safetensors"])
    assert weights.tensor(0, "none").numel() == 0
    assert weights.tensor(0, "one").item() == 3


def test_a_dtype_torch_lacks_is_named(tmp_path: Path) -> None:
    path = container(tmp_path / "a.safetensors", "F6_E2M3", [4], bytes(3))
    with pytest.raises(HeaderError, match="'t' is stored as F6_E2M3"):
        Weights([path]).tensor(0, "t")
