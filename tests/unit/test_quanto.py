"""optimum-quanto beyond what `test_owner_files` holds against its owner: orders, inputs, and what is refused."""

import json
import shutil
from base64 import b64encode
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffquant import headers, planner, sources
from diffquant.errors import FormatError, PlanError
from diffquant.pieces import canonical, decoded
from diffquant.plan import Layout, Piece, Plan, Role, Span
from diffquant.tensors import Weights

DATA = Path(__file__).resolve().parents[1] / "data" / "quanto"
CASES = DATA / "cases.safetensors"
INT4 = "blocks.0.int4.weight"


def planned(path: Path) -> Plan:
    checkpoint = sources.checkpoint(str(path))
    header = headers.read(checkpoint.files)
    assert planner.identify(checkpoint, header)[0] == "quanto"
    return planner.plan(checkpoint, header, config=checkpoint.config)


def piece(layer: str) -> Piece:
    return planned(CASES).layer(f"blocks.0.{layer}").pieces[0]


def weight(piece: Piece) -> Tensor:
    return decoded(piece, canonical(piece, Weights([CASES])))


def rewritten(folder: Path, metadata: dict[str, str] | None = None, **left_out: bool) -> Path:
    tensors = {name: each for name, each in load_file(CASES).items() if name not in left_out}
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    return folder / "model.safetensors"


def with_layout(piece: Piece, role: Role, layout: Layout) -> Piece:
    parts = (replace(part, layout=layout) if part.role is role else part for part in piece.parts)
    return replace(piece, parts=tuple(parts))


@pytest.mark.parametrize("layer", ["int4", "int4_narrower"])
def test_neighbouring_columns_in_a_byte_would_be_another_weight(layer: str) -> None:
    right = piece(layer)
    wrong = with_layout(right, Role.CODES, Layout("flat"))
    assert (weight(wrong) - weight(right)).norm() > weight(right).norm() / 2


def test_a_shift_that_is_added_is_another_weight() -> None:
    right = piece("int4")
    wrong = with_layout(right, Role.ZERO_POINT, Layout("halves"))
    assert (weight(wrong) - weight(right)).norm() > weight(right).norm()


def test_rows_are_cut_after_groups_are_laid_out() -> None:
    right = piece("int4_narrower")
    cut = replace(right, take=(Span(3, 7),), out=Span(0, 4))
    assert torch.equal(weight(cut), weight(right)[3:7])


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (f"{INT4}._scale", "has no scale"),
        (f"{INT4}._shift", "has no shift"),
        ("blocks.0.int4.bias", "without a bias nothing tells"),
    ],
)
def test_four_bits_without_what_they_need_are_refused(
    tmp_path: Path, tensor: str, told: str
) -> None:
    with pytest.raises(FormatError, match=told):
        planned(rewritten(tmp_path, **{tensor: True}))


def test_eight_bits_without_their_scale_stop_the_load(tmp_path: Path) -> None:
    stored = rewritten(tmp_path, **{"blocks.0.float8_e5m2.weight._scale": True})
    with pytest.raises(PlanError, match=r"'blocks.0.float8_e5m2.weight._data' is fp8.* without"):
        planned(stored)


def mapped(activations: str) -> str:
    return json.dumps({"blocks.0.float8_e5m2": {"weights": "qfloat8", "activations": activations}})


@pytest.mark.parametrize(
    ("told", "inputs"),
    [("none", "None"), ("qint8", "int8:tensor:static"), ("qfloat8_e4m3fn", "fp8:tensor:static")],
)
def test_the_map_in_the_header_says_what_inputs_become(
    tmp_path: Path, told: str, inputs: str
) -> None:
    encoded = b64encode(mapped(told).encode()).decode()
    plan = planned(rewritten(tmp_path, {"quantization_map_base64": encoded}))
    assert str(plan.layer("blocks.0.float8_e5m2").pieces[0].activation) == inputs
    assert plan.layer("blocks.0.int4").pieces[0].activation is None


def test_the_map_beside_a_folder_says_so_too(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(DATA / "int8", folder)
    path = folder / "quantization_map.json"
    path.write_text(path.read_text().replace('"none"', '"qint8"'))
    assert all(
        str(x.pieces[0].activation) == "int8:tensor:static" for x in planned(folder).quantized
    )
    path.write_text(path.read_text().replace('"qint8"', '"qint16"'))
    with pytest.raises(FormatError, match="to qint16, which is not read"):
        planned(folder)


def test_a_map_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is no base64"):
        planned(rewritten(tmp_path, {"quantization_map_base64": "{not base64"}))
