"""torchao beyond what `test_owner_files` holds against its owner: orders, inputs, shards, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffquant import headers, planner, sources
from diffquant.errors import FormatError, PlanError, SourceError
from diffquant.pieces import canonical, decoded
from diffquant.plan import ROW_MAJOR, Layout, Piece, Plan, Role
from diffquant.sources import Checkpoint
from diffquant.tensors import Weights

DATA = Path(__file__).resolve().parents[1] / "data" / "torchao"
CASES = DATA / "cases.safetensors"
HIGH_FIRST = Layout("row_major", (("nibbles", "high"),))


def told() -> dict[str, str]:
    with safe_open(CASES, "pt") as stored:
        return dict(stored.metadata())


def planned(path: Path) -> Plan:
    checkpoint = sources.checkpoint(str(path))
    header = headers.read(checkpoint.files)
    assert planner.identify(checkpoint, header)[0] == "torchao"
    return planner.plan(checkpoint, header, config=checkpoint.config)


def piece(layer: str) -> Piece:
    return planned(CASES).layer(f"blocks.0.{layer}").pieces[0]


def weight(piece: Piece) -> Tensor:
    return decoded(piece, canonical(piece, Weights([CASES])))


def changed(folder: Path, layer: str, without: str = "", **data: Any) -> Path:
    """The cases with other words about one layer, or without one of its tensors."""
    metadata = told()
    block = json.loads(metadata[f"blocks.0.{layer}.weight"])
    block["_type"] = data.pop("kind", block["_type"])
    block["_data"] |= data
    metadata[f"blocks.0.{layer}.weight"] = json.dumps(block)
    left_out = f"blocks.0.{layer}._weight_{without}"
    tensors = {name: each for name, each in load_file(CASES).items() if name != left_out}
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    return folder / "model.safetensors"


def with_layout(piece: Piece, role: Role, layout: Layout) -> Piece:
    parts = (replace(part, layout=layout) if part.role is role else part for part in piece.parts)
    return replace(piece, parts=tuple(parts))


@pytest.mark.parametrize("layer", ["nvfp4", "mxfp4"])
def test_the_other_nibble_first_is_another_weight(layer: str) -> None:
    right = piece(layer)
    wrong = with_layout(right, Role.CODES, HIGH_FIRST)
    assert (weight(wrong) - weight(right)).norm() > weight(right).norm() / 2


@pytest.mark.parametrize("layer", ["nvfp4_swizzled", "mxfp8_swizzled"])
def test_scales_in_tiles_are_not_taken_for_rows(layer: str) -> None:
    assert weight(piece(layer)).isfinite().all()
    with pytest.raises(PlanError, match="is stored as"):
        weight(with_layout(piece(layer), Role.BLOCK_SCALE, ROW_MAJOR))


def test_zero_points_count_where_they_are_not_zero() -> None:
    right = piece("int4_group")
    without = tuple(part for part in right.parts if part.role is not Role.ZERO_POINT)
    assert len(without) == len(right.parts) - 1
    assert not torch.allclose(weight(replace(right, parts=without)), weight(right), atol=0.01)
    assert Role.ZERO_POINT not in piece("int8_group").roles


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        ("float8_row", "None"),
        ("float8_row_inputs", "fp8:token:dynamic"),
        ("float8_tensor", "fp8:tensor:dynamic"),
        ("int8_row_inputs", "int8:token:dynamic"),
        ("int4_group", "int8:token:dynamic:asymmetric"),
        ("nvfp4_swizzled", "nvfp4:group16:dynamic"),
        ("mxfp8", "mxfp8;exponent=floor:group32:dynamic"),
    ],
)
def test_inputs_become_what_the_header_says(layer: str, inputs: str) -> None:
    assert str(piece(layer).activation) == inputs


@pytest.mark.parametrize(
    ("layer", "data", "words"),
    [
        ("int8_group", {"kind": "Int4TilePackedTo4dTensor"}, "in the order of a kernel"),
        ("int8_group", {"kind": "Int4Tensor"}, "is a Int4Tensor"),
        ("nvfp4", {"block_size": 32}, "has blocks of 32, nvfp4 has 16"),
        ("int8_group", {"block_size": 32}, r"\[rows, columns\] was needed"),
        ("int8_group", {"activation_quantization": "int4"}, "quantizes inputs int4"),
    ],
)
def test_what_is_not_read_is_refused_by_name(
    tmp_path: Path, layer: str, data: dict[str, Any], words: str
) -> None:
    with pytest.raises(FormatError, match=words):
        planned(changed(tmp_path, layer, **data))


@pytest.mark.parametrize("layer", ["float8_row", "int8_tensor", "nvfp4", "mxfp8"])
def test_a_missing_scale_stops_the_load(tmp_path: Path, layer: str) -> None:
    with pytest.raises(PlanError, match=rf"'blocks.0.{layer}._weight_qdata' is .* without its"):
        planned(changed(tmp_path, layer, "scale"))


def test_a_missing_outer_scale_stops_the_load(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="has per_tensor_scale, and .* is not stored"):
        planned(changed(tmp_path, "nvfp4", "per_tensor_scale"))


def test_codes_of_which_the_header_says_nothing_are_refused(tmp_path: Path) -> None:
    metadata = told()
    del metadata["blocks.0.nvfp4.weight"]
    save_file(load_file(CASES), tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(FormatError, match="of which the header says nothing"):
        planned(tmp_path / "model.safetensors")


def test_pickles_beside_a_configuration_are_no_empty_model(tmp_path: Path) -> None:
    config = {
        "_class_name": "FluxTransformer2DModel",
        "quantization_config": {"quant_method": "torchao"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"a": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(SourceError, match="has pickled weights only"):
        sources.checkpoint(str(tmp_path))


def test_shards_each_list_their_own_tensors(tmp_path: Path) -> None:
    metadata, tensors = told(), load_file(CASES)
    paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for path, kind in zip(paths, ("int8", ""), strict=True):
        mine = {k: v for k, v in tensors.items() if ("int8" in k) == bool(kind)}
        words = {k: v for k, v in metadata.items() if ("int8" in k) == bool(kind)}
        save_file(mine, path, metadata={**words, "tensor_names": json.dumps(sorted(words))})
    source = Checkpoint(origin="shards", root=tmp_path, files=tuple(paths))
    plan = planner.plan(source, headers.read(paths), config={})
    assert len(plan.quantized) == len(planned(CASES).quantized)
    assert all(part.layout == ROW_MAJOR for part in plan.layer("blocks.0.nvfp4").pieces[0].parts)
