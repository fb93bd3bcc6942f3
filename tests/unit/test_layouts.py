"""Layouts against files packed by Nunchaku's own packers and swizzled by ModelOpt."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffquant.encodings import ENCODINGS
from diffquant.errors import PlanError
from diffquant.layouts import LAYOUTS
from diffquant.plan import Encoding, Options, Role

DATA = Path(__file__).resolve().parents[1] / "data"
SVDQUANT = sorted(
    path for path in (DATA / "nunchaku").glob("*.safetensors") if "awq" not in path.name
)
LINEARS = [path for path in SVDQUANT if path.name.startswith("linear")]
# Role -> names in the cases: what a file stores, what it means.
NAMES = {
    Role.CODES: ("qweight", "code"),
    Role.BLOCK_SCALE: ("wscales", "scale"),
    Role.SMOOTH: ("smooth", "smooth"),
    Role.BIAS: ("bias", "bias"),
    Role.LOWRANK_DOWN: ("lora_down", "lora_down"),
    Role.LOWRANK_UP: ("lora_up", "lora_up"),
}


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, json.loads(file.metadata()["case"])


def stored_and_logical(tensors: dict[str, Tensor], role: Role) -> tuple[Tensor, Tensor]:
    packed, meaning = NAMES[role]
    return tensors[f"packed.{packed}"], tensors[f"logical.{meaning}"]


def undo(layout: str, stored: Tensor, role: Role, shape: tuple[int, ...], **options: str) -> Tensor:
    return LAYOUTS.load(layout).undo(stored, role, shape, _options(options))


def redo(layout: str, tensor: Tensor, role: Role, shape: tuple[int, ...], **options: str) -> Tensor:
    again = LAYOUTS.load(layout).redo
    assert again is not None
    return again(tensor, role, shape, _options(options))


def _options(options: dict[str, str]) -> Options:
    return tuple(sorted(options.items()))


def canonical(logical: Tensor, role: Role) -> Tensor:
    """The case's known values as a part: one code per element becomes two per byte."""
    if role is not Role.CODES:
        return logical
    codes = (logical & 15).to(torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4


def same(one: Tensor, other: Tensor) -> bool:
    alike = one.shape == other.shape and one.dtype == other.dtype
    views = (tensor.contiguous().view(torch.uint8) for tensor in (one, other))
    return alike and torch.equal(*views)


# Nunchaku -------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", NAMES)
@pytest.mark.parametrize("path", SVDQUANT, ids=lambda path: path.stem)
def test_nunchakus_own_files_unpack_and_pack_bit_for_bit(path: Path, role: Role) -> None:
    tensors, _ = read(path)
    stored, logical = stored_and_logical(tensors, role)
    part = canonical(logical, role)
    assert same(undo("nunchaku_mma", stored, role, tuple(logical.shape)), part)
    assert same(redo("nunchaku_mma", part, role, tuple(logical.shape)), stored)


@pytest.mark.parametrize("role", NAMES)
def test_nunchakus_nominal_shapes_are_not_its_order(role: Role) -> None:
    tensors, _ = read(SVDQUANT[-1])
    stored, logical = stored_and_logical(tensors, role)
    transposed = role in (Role.BLOCK_SCALE, Role.LOWRANK_DOWN)
    naive = undo("transposed" if transposed else "row_major", stored, role, tuple(logical.shape))
    assert naive.shape == canonical(logical, role).shape
    assert not same(naive, canonical(logical, role))


@pytest.mark.parametrize("path", LINEARS, ids=lambda path: path.stem)
def test_a_whole_nunchaku_linear_sums_to_its_known_rows(path: Path) -> None:
    tensors, case = read(path)
    parts = {
        role: undo("nunchaku_mma", tensors[f"packed.{name}"], role, tuple(shape.shape))
        for role, (name, meaning) in NAMES.items()
        for shape in [tensors[f"logical.{meaning}"]]
    }
    if "packed.wtscale" in tensors:
        parts[Role.TENSOR_SCALE] = undo(
            "nunchaku_mma", tensors["packed.wtscale"], Role.TENSOR_SCALE, ()
        )
    encoding = Encoding(case["precision"])
    weight = ENCODINGS.load(encoding.name).decode(parts, encoding, (case["n"], case["k"]))
    low = parts[Role.LOWRANK_UP].float() @ parts[Role.LOWRANK_DOWN].float()
    dense = weight / parts[Role.SMOOTH].float() + low
    assert torch.allclose(dense.sum(1), tensors["expect.weight_row_sum"], atol=2e-6)


@pytest.fixture
def awq() -> tuple[dict[str, Tensor], Tensor]:
    """The AWQ case, and which logical row each stored row is: three chunks are interleaved."""
    tensors, case = read(DATA / "nunchaku" / "awq_splits3_k256.safetensors")
    rows = torch.arange(case["n"]).view(case["splits"], -1).t().reshape(-1)
    return tensors, rows


def test_nunchakus_awq_codes_unpack_and_pack_bit_for_bit(
    awq: tuple[dict[str, Tensor], Tensor],
) -> None:
    tensors, rows = awq
    part = canonical(tensors["logical.code"][rows], Role.CODES)
    assert same(undo("nunchaku_awq", tensors["packed.qweight"], Role.CODES, (96, 256)), part)
    assert same(redo("nunchaku_awq", part, Role.CODES, (96, 256)), tensors["packed.qweight"])
    as_t5 = tensors["packed.qweight"].view(torch.int16)
    assert same(undo("nunchaku_awq", as_t5, Role.CODES, (96, 256)), part)
    assert not same(tensors["packed.qweight"].view(torch.uint8).reshape(96, 128), part)


@pytest.mark.parametrize(
    ("role", "names"), [(Role.BLOCK_SCALE, "scale"), (Role.ZERO_POINT, "zero")]
)
def test_nunchakus_awq_scales_lose_their_padded_groups(
    awq: tuple[dict[str, Tensor], Tensor], role: Role, names: str
) -> None:
    tensors, rows = awq
    stored, part = tensors[f"packed.w{names}s"], tensors[f"logical.{names}"][rows]
    assert same(undo("nunchaku_awq", stored, role, (96, 4)), part)
    assert same(redo("nunchaku_awq", part, role, (96, 4)), stored[:4])


def test_a_whole_nunchaku_awq_linear_sums_to_its_known_rows(
    awq: tuple[dict[str, Tensor], Tensor],
) -> None:
    tensors, rows = awq
    parts = {Role.CODES: undo("nunchaku_awq", tensors["packed.qweight"], Role.CODES, (96, 256))}
    for role, name in ((Role.BLOCK_SCALE, "wscales"), (Role.ZERO_POINT, "wzeros")):
        parts[role] = undo("nunchaku_awq", tensors[f"packed.{name}"], role, (96, 16))
    options = (("group", "64"), ("signed", "false"), ("zero", "scaled"))
    weight = ENCODINGS.load("int4").decode(parts, Encoding("int4", options), (96, 256))
    assert torch.allclose(weight.sum(1), tensors["expect.weight_row_sum"][rows], atol=2e-6)


def test_nunchakus_padding_grows_and_is_cut_again() -> None:
    codes = torch.randint(0, 256, (200, 96), dtype=torch.uint8)
    stored = redo("nunchaku_mma", codes, Role.CODES, (200, 192))
    assert stored.shape == (256, 128)
    assert same(undo("nunchaku_mma", stored, Role.CODES, (200, 192)), codes)
    smooth = redo("nunchaku_mma", torch.full((200,), 2.0), Role.SMOOTH, (200,))
    assert sorted(smooth.tolist()) == [1.0] * 56 + [2.0] * 200


# The others -----------------------------------------------------------------------------------


def test_modelopts_swizzled_scales_unpack_and_pack_bit_for_bit() -> None:
    layer = load_file(DATA / "modelopt_layer.safetensors")
    tiles, linear = layer["wan.nvfp4_swizzle.weight_scale"], layer["wan.nvfp4.weight_scale"]
    assert same(undo("tiles_128x4", tiles, Role.BLOCK_SCALE, (352, 8)), linear)
    assert same(undo("tiles_128x4", tiles.reshape(-1), Role.BLOCK_SCALE, (352, 8)), linear)
    assert same(redo("tiles_128x4", linear, Role.BLOCK_SCALE, (352, 8)), tiles)
    assert not same(tiles[:352], linear)


def test_tiles_follow_the_formula_of_their_docstring() -> None:
    rows, columns = 256, 8
    stored = torch.arange(rows * columns, dtype=torch.int32)
    whole = undo("tiles_128x4", stored, Role.BLOCK_SCALE, (rows, columns))
    for m, k in ((0, 0), (1, 0), (37, 3), (127, 7), (200, 5), (255, 4)):
        position = (m // 128 * 2 + k // 4) * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4
        assert whole[m, k] == position


def test_tiles_with_columns_padded_to_sixteen_are_cut() -> None:
    linear = torch.rand(100, 10)
    wide = torch.nn.functional.pad(linear, (0, 6))
    stored = redo("tiles_128x4", wide, Role.BLOCK_SCALE, (100, 16))
    assert stored.shape == (128, 16)
    assert torch.equal(undo("tiles_128x4", stored, Role.BLOCK_SCALE, (100, 10)), linear)


def test_scales_too_few_for_the_weight_are_no_tiles() -> None:
    with pytest.raises(PlanError, match="128 x 4 tiles"):
        undo("tiles_128x4", torch.zeros(128, 4), Role.BLOCK_SCALE, (128, 8))


def test_paired_rows_become_paired_columns() -> None:
    stored = torch.tensor([[0x21, 0x43]], dtype=torch.uint8)
    part = undo("rows_paired", stored, Role.CODES, (2, 2))
    assert part.tolist() == [[0x31], [0x42]]
    assert same(redo("rows_paired", part, Role.CODES, (2, 2)), stored)


def test_high_nibbles_first_are_swapped() -> None:
    stored = torch.tensor([[0x12, 0x34]], dtype=torch.uint8)
    part = undo("row_major", stored, Role.CODES, (1, 4), nibbles="high")
    assert part.tolist() == [[0x21, 0x43]]
    assert undo("row_major", stored, Role.CODES, (1, 4)).tolist() == [[0x12, 0x34]]
    assert same(redo("row_major", part, Role.CODES, (1, 4), nibbles="high"), stored)


def test_signed_bytes_are_packed_codes_too() -> None:
    part = undo("row_major", torch.tensor([[-1]], dtype=torch.int8), Role.CODES, (1, 2))
    assert part.dtype == torch.uint8
    assert part.tolist() == [[255]]
    whole = torch.zeros(1, 2, dtype=torch.int8)
    assert undo("row_major", whole, Role.CODES, (1, 2)).dtype == torch.int8


def test_padding_is_cut_only_where_the_layout_says_so() -> None:
    stored = torch.arange(12.0).view(3, 4)
    assert undo("row_major", stored, Role.CODES, (2, 3), pad="crop").tolist() == [
        [0, 1, 2],
        [4, 5, 6],
    ]
    with pytest.raises(PlanError, match="the layer needs"):
        undo("row_major", stored, Role.CODES, (2, 3))


def test_axes_of_length_one_do_not_count() -> None:
    assert undo("row_major", torch.ones(1), Role.TENSOR_SCALE, ()).shape == ()
    assert undo("row_major", torch.ones(5, 1), Role.CHANNEL_SCALE, (5,)).shape == (5,)


def test_transposed_exchanges_the_axes() -> None:
    stored = torch.arange(6.0).view(3, 2)
    part = undo("transposed", stored, Role.LOWRANK_DOWN, (2, 3))
    assert part.tolist() == [[0, 2, 4], [1, 3, 5]]
    assert torch.equal(redo("transposed", part, Role.LOWRANK_DOWN, (2, 3)), stored)
    assert not torch.equal(undo("row_major", stored, Role.LOWRANK_DOWN, (2, 3)), part)
