"""bitsandbytes beyond what `test_owner_files` holds against its owner: orders, cuts, and what is refused."""

import json
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

DATA = Path(__file__).resolve().parents[1] / "data" / "bitsandbytes"
CASES = DATA / "cases.safetensors"
DOUBLE = "blocks.0.nf4_double.weight"


def planned(path: Path) -> Plan:
    checkpoint = sources.checkpoint(str(path))
    header = headers.read(checkpoint.files)
    assert planner.identify(checkpoint, header)[0] == "bitsandbytes"
    return planner.plan(checkpoint, header, config={})


def piece(layer: str) -> Piece:
    return planned(CASES).layer(f"blocks.0.{layer}").pieces[0]


def weight(piece: Piece) -> Tensor:
    return decoded(piece, canonical(piece, Weights([CASES])))


def rewritten(folder: Path, **changes: Tensor | None) -> Path:
    """The cases with some tensors of the double quantized layer replaced, or left out for None."""
    tensors = load_file(CASES)
    for ending, tensor in changes.items():
        name = DOUBLE + ending
        assert name in tensors
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def text(**state: object) -> Tensor:
    told = {"quant_type": "nf4", "blocksize": 64, "shape": [160, 112], "nested_blocksize": 256}
    return torch.tensor(list(json.dumps({**told, **state}).encode()), dtype=torch.uint8)


def test_the_other_nibble_first_is_another_weight() -> None:
    right = piece("nf4")
    low = replace(right.parts[0], layout=Layout("flat"))
    wrong = replace(right, parts=(low, *right.parts[1:]))
    assert (weight(wrong) - weight(right)).norm() > weight(right).norm() / 2


def test_a_scale_of_every_row_instead_of_the_run_is_another_weight() -> None:
    right = piece("nf4_double")
    parts = tuple(
        replace(part, layout=Layout("flat", (("repeat", "4"),)))
        if part.role is Role.NESTED_SCALE
        else part
        for part in right.parts
    )
    with pytest.raises(PlanError, match="is stored as"):
        weight(replace(right, parts=parts))


def test_rows_are_cut_after_the_run_is_laid_out() -> None:
    right = piece("nf4_double")
    cut = replace(right, take=(Span(90, 150),), out=Span(0, 60))
    assert torch.equal(weight(cut), weight(right)[90:150])
    assert not torch.equal(weight(cut), weight(right)[:60])


def test_a_missing_absmax_stops_the_load(tmp_path: Path) -> None:
    stored = rewritten(tmp_path, **{".absmax": None})
    with pytest.raises(PlanError, match=rf"'{DOUBLE}' is nf4.* without its scale"):
        planned(stored)


def test_a_missing_row_scale_stops_the_load(tmp_path: Path) -> None:
    tensors = load_file(CASES)
    del tensors["blocks.0.int8.SCB"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PlanError, match=r"'blocks.0.int8.weight' is int8_amax without its scale"):
        planned(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({".quant_map": None}, "has no quant_map"),
        ({".nested_absmax": None}, r"is coded, and .*nested_absmax' is not stored"),
        ({".nested_quant_map": None}, r"is coded, and .*nested_quant_map' is not stored"),
        ({".quant_state.bitsandbytes__nf4": None}, "is U8 without its quant_state"),
        ({".quant_state.bitsandbytes__nf4": text()}, "has no nested_offset"),
        ({".quant_state.bitsandbytes__nf4": text(shape=[80, 112])}, "holds 17920 numbers"),
        ({".quant_state.bitsandbytes__nf4": text(shape=[512, 35])}, "rows of 35 numbers"),
        ({".quant_state.bitsandbytes__nf4": text(blocksize="64")}, "blocksize is '64'"),
        ({".quant_state.bitsandbytes__nf4": text(quant_type="int4")}, "quant_type 'int4'"),
    ],
)
def test_what_is_not_whole_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Tensor | None], told: str
) -> None:
    with pytest.raises(FormatError, match=told):
        planned(rewritten(tmp_path, **changes))


def test_codes_tiled_for_an_old_kernel_are_refused(tmp_path: Path) -> None:
    tensors = load_file(CASES)
    tensors["blocks.0.int8.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="tiled for a kernel of old"):
        planned(tmp_path / "model.safetensors")
