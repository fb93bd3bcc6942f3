"""SDNQ beyond what `test_owner_files` holds against its owner: the branch, zero points, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffquant import headers, planner, sources
from diffquant.errors import FormatError
from diffquant.pieces import canonical, decoded, dense
from diffquant.plan import Layout, Piece, Plan, Span
from diffquant.tensors import Weights

DATA = Path(__file__).resolve().parents[1] / "data" / "sdnq"
INT8, INT4, UINT4 = (DATA / f"{kind}.safetensors" for kind in ("int8", "int4", "uint4"))
FOLDER = DATA / "int4_svd"


def planned(path: Path) -> Plan:
    checkpoint = sources.checkpoint(str(path))
    header = headers.read(checkpoint.files)
    assert planner.identify(checkpoint, header)[0] == "sdnq"
    return planner.plan(checkpoint, header, config=checkpoint.config)


def piece(layer: str, path: Path) -> Piece:
    return planned(path).layer(f"blocks.0.{layer}").pieces[0]


def weight(piece: Piece, path: Path) -> Tensor:
    return decoded(piece, canonical(piece, Weights([path])))


def rewritten(
    folder: Path,
    source: Path,
    without: str = "",
    more: dict[str, Tensor] | None = None,
    **told: Any,
) -> Path:
    """The file with other words in its configuration, without a tensor or with further ones."""
    with safe_open(source, "pt") as stored:
        block = json.loads(stored.metadata()["quantization_config"]) | told
    tensors = {name: each for name, each in load_file(source).items() if name != without}
    path = folder / "model.safetensors"
    save_file(tensors | (more or {}), path, metadata={"quantization_config": json.dumps(block)})
    return path


@pytest.mark.parametrize("layer", ["rows", "groups"])
def test_zero_points_are_added_after_the_scale(layer: str) -> None:
    owner = load_file(UINT4.with_suffix(".owner.safetensors"))[f"blocks.0.{layer}"]
    right = piece(layer, UINT4)
    # A last bit of the larger term: the owner's processor does not round the product before the sum.
    assert (weight(right, UINT4) - owner).abs().max() <= 2.0**-23 * 16 * owner.abs().max()
    other = replace(right.encoding, options=right.encoding.options[:-1])
    wrong = weight(replace(right, encoding=other), UINT4)
    assert (wrong - owner).norm() > owner.norm() / 10


def test_the_branch_is_beside_the_weight_though_both_are_stored_as_columns() -> None:
    owner = load_file(INT8.with_suffix(".owner.safetensors"))["blocks.0.columns_branch"]
    layer = planned(INT8).layer("blocks.0.columns_branch")
    assert {part.layout.name for part in layer.pieces[0].parts} == {"transposed", "row_major"}
    folded, _ = dense(layer, Weights([INT8]))
    assert torch.allclose(folded, owner, rtol=0, atol=1e-6)
    bare = replace(layer, pieces=(replace(layer.pieces[0], lowrank_input=None),))
    assert not torch.allclose(dense(bare, Weights([INT8]))[0], owner, rtol=0, atol=1e-3)


def test_the_other_nibble_first_is_another_weight() -> None:
    right = piece("rows", INT4)
    part = replace(right.parts[0], layout=Layout("flat", (("nibbles", "high"),)))
    wrong = weight(replace(right, parts=(part, *right.parts[1:])), INT4)
    assert (wrong - weight(right, INT4)).norm() > weight(right, INT4).norm() / 2


@pytest.mark.parametrize(
    ("layer", "path"), [("groups", INT8), ("groups", UINT4), ("columns", INT8)]
)
def test_rows_are_cut_after_the_layout_is_undone(layer: str, path: Path) -> None:
    right = piece(layer, path)
    cut = replace(right, take=(Span(3, 20),), out=Span(0, 17))
    assert torch.equal(weight(cut, path), weight(right, path)[3:20])


@pytest.mark.parametrize(
    ("source", "told", "words"),
    [
        (INT8, {"use_hadamard": True}, "says use_hadamard"),
        (INT8, {"use_codebook": True}, "says use_codebook"),
        (
            INT8,
            {"modules_quant_config": {"rows": {"use_hadamard": True}}},
            "config rows says use_h",
        ),
        (INT4, {"weights_dtype": "float4_e2m1fn"}, "declares float4_e2m1fn; one of int4 and uint4"),
        (UINT4, {"modules_dtype_dict": {"uint2": ["rows"]}}, "declares uint2 and uint4"),
        (UINT4, {"weights_dtype": "int8"}, "declares none that is stored so"),
    ],
)
def test_other_numbers_and_bases_are_refused_by_name(
    tmp_path: Path, source: Path, told: dict[str, Any], words: str
) -> None:
    with pytest.raises(FormatError, match=words):
        planned(rewritten(tmp_path, source, **told))


def test_what_is_missing_stops_the_load(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"'blocks.0.rows.weight' is I8 and has no scale"):
        planned(rewritten(tmp_path, INT8, "blocks.0.rows.scale"))
    with pytest.raises(FormatError, match="one half of svd_up and svd_down"):
        planned(rewritten(tmp_path, INT8, "blocks.0.columns_branch.svd_up"))
    with pytest.raises(FormatError, match="declares none that is stored so"):
        planned(rewritten(tmp_path, UINT4, "blocks.0.rows.zero_point"))


def test_scales_that_are_quantized_again_are_refused(tmp_path: Path) -> None:
    second = {"blocks.0.rows.scale_2": torch.ones(1)}
    with pytest.raises(FormatError, match=r"'blocks.0.rows.scale_2' quantizes a scale again"):
        planned(rewritten(tmp_path, INT8, more=second))


@pytest.mark.parametrize(
    ("shape", "words"),
    [((512, 3), r"U8 of \[512, 3\]"), ((32, 64), r"U8 of \[32, 64\]"), ((1000,), "do not divide")],
)
def test_packings_of_other_widths_are_refused(
    tmp_path: Path, shape: tuple[int, ...], words: str
) -> None:
    codes = {"blocks.0.rows.weight": torch.zeros(shape, dtype=torch.uint8)}
    with pytest.raises(FormatError, match=words):
        planned(rewritten(tmp_path, INT4, more=codes))


def test_the_file_beside_the_weights_says_it_too(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(FOLDER, folder)
    config = json.loads((folder / "config.json").read_text())
    block = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantization_config.json").write_text(json.dumps(block))
    found, wanted = (planned(each).quantized for each in (folder, FOLDER))
    assert [layer.pieces for layer in found] == [layer.pieces for layer in wanted]
