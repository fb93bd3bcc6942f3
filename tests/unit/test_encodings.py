"""Encodings against true exports of ModelOpt, and against their own byte tables."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from diffquant.encodings import ENCODINGS, Recipe
from diffquant.encodings import _e2m1 as e2m1
from diffquant.encodings import _e8m0 as e8m0
from diffquant.encodings._float8 import wide
from diffquant.encodings._scales import Cell, amax
from diffquant.errors import PlanError
from diffquant.layouts import LAYOUTS
from diffquant.plan import Encoding, Role

PER_TENSOR = Recipe(granularity="tensor")
PER_CHANNEL = Recipe(granularity="channel")
PER_GROUP = Recipe(granularity="group")
PER_BLOCK = Recipe(granularity="block")


@pytest.fixture(scope="module")
def layer() -> dict[str, Tensor]:
    """One linear of ModelOpt's own exports, in every scheme, with the weight it came from."""
    path = Path(__file__).resolve().parents[1] / "data" / "modelopt_layer.safetensors"
    return load_file(path)


def decode(
    encoding: str, parts: dict[Role, Tensor], shape: tuple[int, int], **options: str
) -> Tensor:
    return ENCODINGS.load(encoding).decode(parts, spelled(encoding, **options), shape)


def encode(encoding: str, values: Tensor, recipe: Recipe, **options: str) -> dict[Role, Tensor]:
    encoder = ENCODINGS.load(encoding).encode
    assert encoder is not None
    return encoder(values, spelled(encoding, **options), recipe)


def spelled(name: str, **options: str) -> Encoding:
    return Encoding(name, tuple(sorted(options.items())))


def same_bytes(one: Tensor, other: Tensor) -> bool:
    flat = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)


def error(weight: Tensor, truth: Tensor) -> float:
    return float((weight - truth.float()).norm() / truth.float().norm())


# ModelOpt, bit for bit ------------------------------------------------------------------------

EXPORTS = [
    ("fp8", "fp8", PER_TENSOR, Role.TENSOR_SCALE, 0.03),
    ("fp8_pc_pt", "fp8", PER_CHANNEL, Role.CHANNEL_SCALE, 0.03),
    ("fp8_2d_blockwise", "fp8", PER_BLOCK, Role.BLOCK_SCALE, 0.03),
    ("int8_wo", "int8", PER_CHANNEL, Role.CHANNEL_SCALE, 0.015),
    ("mxfp8", "mxfp8", PER_GROUP, Role.BLOCK_SCALE, 0.03),
]


@pytest.mark.parametrize(("scheme", "name", "recipe", "role", "bound"), EXPORTS)
def test_one_scale_schemes_encode_to_modelopts_bytes(
    layer: dict[str, Tensor], scheme: str, name: str, recipe: Recipe, role: Role, bound: float
) -> None:
    truth = layer["wan.bf16.weight"].float()
    parts = encode(name, truth, recipe)
    assert same_bytes(parts[Role.CODES], layer[f"wan.{scheme}.weight"])
    assert same_bytes(parts[role], layer[f"wan.{scheme}.weight_scale"])
    assert error(decode(name, parts, (352, 128)), truth) < bound


def test_nvfp4_encodes_to_modelopts_bytes(layer: dict[str, Tensor]) -> None:
    truth = layer["wan.bf16.weight"]
    parts = encode("nvfp4", truth, PER_GROUP)
    assert same_bytes(parts[Role.CODES], layer["wan.nvfp4.weight"])
    assert same_bytes(parts[Role.BLOCK_SCALE], layer["wan.nvfp4.weight_scale"])
    assert torch.equal(parts[Role.TENSOR_SCALE], layer["wan.nvfp4.weight_scale_2"])
    assert error(decode("nvfp4", parts, (352, 128)), truth) < 0.1


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_padded"])
def test_comfys_arithmetic_gives_the_bytes_of_comfy_kitchen(name: str) -> None:
    folder = Path(__file__).resolve().parents[1] / "data" / "comfy"
    held, owner = (load_file(folder / f"{name}{part}.safetensors") for part in ("", ".owner"))
    ((stem, truth),) = [
        (key.removesuffix(".original"), value) for key, value in owner.items() if "original" in key
    ]
    stored = f"model.diffusion_model.{stem}"
    codes = held[f"{stored}.weight"]
    truth = pad(truth, (0, 2 * codes.shape[1] - truth.shape[1], 0, len(codes) - len(truth)))
    made = encode("nvfp4", truth, replace(PER_GROUP, arithmetic="comfy"))
    block = LAYOUTS.load("tiles_128x4").undo(
        held[f"{stored}.weight_scale"], Role.BLOCK_SCALE, (len(truth), truth.shape[1] // 16), ()
    )
    assert same_bytes(made[Role.CODES] << 4 | made[Role.CODES] >> 4, codes)
    assert same_bytes(made[Role.BLOCK_SCALE], block)
    assert torch.equal(made[Role.TENSOR_SCALE], held[f"{stored}.weight_scale_2"])


@pytest.mark.parametrize("name", ["comfy", "torchao"])
def test_another_order_of_rounding_moves_few_bytes_and_no_weight_far(name: str) -> None:
    truth = torch.randn(512, 1024, generator=torch.Generator().manual_seed(2)) / 50
    truth = truth.to(torch.bfloat16)
    ours = encode("nvfp4", truth, PER_GROUP)
    made = encode("nvfp4", truth, replace(PER_GROUP, arithmetic=name))
    moved = sum(int((made[role].float() != ours[role].float()).sum()) for role in made)
    assert 0 < moved < 0.01 * truth.numel()
    assert error(decode("nvfp4", made, (512, 1024)), truth) < 0.1


def test_a_scalar_scale_divides_in_the_dtype_of_the_weight(layer: dict[str, Tensor]) -> None:
    truth, codes = layer["flux.bf16.weight"], layer["flux.fp8.weight"]
    assert same_bytes(encode("fp8", truth, PER_TENSOR)[Role.CODES], codes)
    in_float32 = encode("fp8", truth.float(), PER_TENSOR)[Role.CODES]
    assert 0.005 < (in_float32.float() != codes.float()).float().mean() < 0.1


def test_a_given_scale_is_used_instead_of_the_values_own(layer: dict[str, Tensor]) -> None:
    truth, scale = layer["wan.bf16.weight"], layer["wan.nvfp4.weight_scale_2"] * 2
    parts = encode("nvfp4", truth, Recipe(granularity="group", scale=scale))
    assert torch.equal(parts[Role.TENSOR_SCALE], scale)
    assert not same_bytes(parts[Role.BLOCK_SCALE], layer["wan.nvfp4.weight_scale"])
    assert error(decode("nvfp4", parts, (352, 128)), truth) < 0.11


@pytest.mark.parametrize("scheme", ["int4_awq", "w4a8_awq"])
def test_modelopts_int4_decodes_to_the_base(layer: dict[str, Tensor], scheme: str) -> None:
    truth, smooth = layer["wan.bf16.weight"], layer[f"wan.{scheme}.pre_quant_scale"].float()
    stored = layer[f"wan.{scheme}.weight"]
    codes = LAYOUTS.load("rows_paired").undo(stored, Role.CODES, (352, 128), ())
    parts = {Role.CODES: codes, Role.BLOCK_SCALE: layer[f"wan.{scheme}.weight_scale"]}
    if scheme == "w4a8_awq":
        parts[Role.TENSOR_SCALE] = layer[f"wan.{scheme}.weight_scale_2"]
    assert error(decode("int4", parts, (352, 128)) * smooth, truth) < 0.125
    swapped = parts | {Role.CODES: codes << 4 | codes >> 4}
    assert error(decode("int4", swapped, (352, 128)) * smooth, truth) > 1


def test_w4a8_is_held_in_fp8_and_not_multiplied_twice(layer: dict[str, Tensor]) -> None:
    codes = torch.randint(0, 256, (8, 64), dtype=torch.uint8)
    parts = {Role.CODES: codes, Role.BLOCK_SCALE: torch.rand(8, 1) + 0.5}
    plain = decode("int4", parts, (8, 128))
    held = decode("int4", parts | {Role.TENSOR_SCALE: plain.abs().max() / 448}, (8, 128))
    assert 0.01 < error(held, plain) < 0.05


# Negative controls ----------------------------------------------------------------------------


def test_swapped_nibbles_do_not_decode_to_the_same_weight(layer: dict[str, Tensor]) -> None:
    parts = nvfp4_parts(layer)
    codes = parts[Role.CODES]
    wrong = decode("nvfp4", parts | {Role.CODES: codes << 4 | codes >> 4}, (352, 128))
    assert error(wrong, layer["wan.bf16.weight"]) > 1


def test_swizzled_scales_read_row_major_are_wrong(layer: dict[str, Tensor]) -> None:
    tiles = layer["wan.nvfp4_swizzle.weight_scale"]
    wrong = decode("nvfp4", nvfp4_parts(layer) | {Role.BLOCK_SCALE: tiles[:352]}, (352, 128))
    right = LAYOUTS.load("tiles_128x4").undo(tiles, Role.BLOCK_SCALE, (352, 8), ())
    unswizzled = nvfp4_parts(layer) | {Role.BLOCK_SCALE: right}
    assert error(wrong, layer["wan.bf16.weight"]) > 0.12
    assert error(decode("nvfp4", unswizzled, (352, 128)), layer["wan.bf16.weight"]) < 0.1


def test_an_inverse_outer_scale_is_another_encoding(layer: dict[str, Tensor]) -> None:
    parts = nvfp4_parts(layer)
    inverse = parts | {Role.TENSOR_SCALE: 1 / parts[Role.TENSOR_SCALE]}
    divided = decode("nvfp4", inverse, (352, 128), tensor_scale="divide")
    assert error(divided, decode("nvfp4", parts, (352, 128))) < 1e-6
    assert error(decode("nvfp4", inverse, (352, 128)), layer["wan.bf16.weight"]) > 100


def nvfp4_parts(layer: dict[str, Tensor]) -> dict[Role, Tensor]:
    return {
        Role.CODES: layer["wan.nvfp4.weight"],
        Role.BLOCK_SCALE: layer["wan.nvfp4.weight_scale"],
        Role.TENSOR_SCALE: layer["wan.nvfp4.weight_scale_2"],
    }


# Scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "nvfp4"])
def test_codes_without_a_scale_are_refused(name: str) -> None:
    codes = torch.zeros(4, 32 if name in ("fp8", "int8") else 16, dtype=torch.uint8)
    parts = {Role.CODES: codes}
    if name == "nvfp4":
        parts[Role.BLOCK_SCALE] = torch.ones(4, 2)
    with pytest.raises(PlanError, match="scale"):
        decode(name, parts, (4, 32))


def test_raw_fp8_has_no_scale_only_where_the_encoding_says_so() -> None:
    codes = torch.tensor([[1.5, -448.0]]).to(torch.float8_e4m3fn)
    parts = {Role.CODES: codes}
    assert torch.equal(decode("fp8", parts, (1, 2), scale="none"), codes.float())
    codec = ENCODINGS.load("fp8")
    assert codec.is_complete(spelled("fp8", scale="none"), frozenset({Role.CODES}))
    assert not codec.is_complete(spelled("fp8"), frozenset({Role.CODES}))


def test_a_zero_scale_with_nan_codes_is_a_zero_weight() -> None:
    codes = torch.full((2, 8), 0x7F, dtype=torch.uint8)
    parts = {Role.CODES: codes, Role.TENSOR_SCALE: torch.zeros(())}
    assert torch.equal(decode("fp8", parts, (2, 8)), torch.zeros(2, 8))
    finite = parts | {Role.TENSOR_SCALE: torch.ones(())}
    assert decode("fp8", finite, (2, 8)).isnan().all()


@pytest.mark.parametrize("kind", ["e4m3", "e5m2", "e4m3fnuz"])
def test_fp8_saturates_at_the_largest_number_of_its_kind(kind: str) -> None:
    values = torch.tensor([[1.0, -100.0, 1e9, -torch.inf]])
    given = Recipe(granularity="tensor", scale=torch.ones(()))
    weight = decode("fp8", encode("fp8", values, given, kind=kind), (1, 4), kind=kind)
    largest = {"e4m3": 448.0, "e5m2": 57344.0, "e4m3fnuz": 240.0}[kind]
    assert weight[0, 2:].tolist() == [largest, -largest]


def test_ragged_blocks_scale_their_own_rows_and_columns() -> None:
    codes = torch.ones(5, 7).to(torch.float8_e4m3fn)
    scale = torch.arange(1.0, 7.0).view(3, 2)
    weight = decode("fp8", {Role.CODES: codes, Role.BLOCK_SCALE: scale}, (5, 7), block="2x4")
    wanted = scale.repeat_interleave(2, 0)[:5].repeat_interleave(4, 1)[:, :7]
    assert torch.equal(weight, wanted)


def test_rows_taken_from_ragged_blocks_keep_their_columns() -> None:
    codes, scale = torch.ones(6, 192).to(torch.float8_e4m3fn), torch.rand(6, 2) + 1
    weight = decode("fp8", {Role.CODES: codes, Role.BLOCK_SCALE: scale}, (6, 192))
    assert torch.equal(weight, scale.repeat_interleave(128, 1)[:, :192])


def test_scales_that_do_not_cover_the_weight_are_refused() -> None:
    codes = torch.zeros(4, 64, dtype=torch.int8)
    with pytest.raises(PlanError, match="groups of"):
        decode("int8", {Role.CODES: codes, Role.BLOCK_SCALE: torch.ones(3, 4)}, (4, 64))


def test_chunks_of_rows_do_not_show() -> None:
    values = torch.randn(300, 1024)
    for name, recipe in [("fp8", PER_BLOCK), ("int8", PER_CHANNEL), ("nvfp4", PER_GROUP)]:
        parts = encode(name, values, recipe)
        rows = torch.cat([decode_row(name, parts, row) for row in (0, 128, 299)])
        assert torch.equal(decode(name, parts, (300, 1024))[[0, 128, 299]], rows)


def decode_row(name: str, parts: dict[Role, Tensor], row: int) -> Tensor:
    mine = dict(parts)
    for role in (Role.CODES, Role.CHANNEL_SCALE, Role.BLOCK_SCALE):
        if role in parts:
            at = row // 128 if name == "fp8" and role is Role.BLOCK_SCALE else row
            mine[role] = parts[role][at : at + 1]
    return decode(name, mine, (1, 1024))


# Numbers --------------------------------------------------------------------------------------


def test_e2m1_rounds_to_the_nearest_and_ties_to_even() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 1e9])
    assert e2m1.codes(ties).tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 7]
    values = torch.randn(4096) * 4
    near = (values[:, None] - torch.tensor(e2m1.VALUES)).abs().amin(1)
    found = torch.tensor(e2m1.VALUES)[e2m1.codes(values).int()]
    assert torch.allclose((found - values).abs(), near)


def test_small_negative_numbers_become_negative_zero_like_modelopts() -> None:
    assert e2m1.codes(torch.tensor([-0.1, 0.1, -0.0, 0.0])).tolist() == [8, 0, 0, 0]


def test_every_float8_byte_is_what_torch_makes_of_it() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz):
        made, meant = wide(every.view(kind)), every.view(kind).float()
        assert torch.equal(made.isnan(), meant.isnan())
        assert torch.equal(
            made.nan_to_num(7).view(torch.int32), meant.nan_to_num(7).view(torch.int32)
        )
    finite = every[(every & 0x7F) != 0x7F].view(torch.float8_e4m3fn).view(2, 127)
    assert torch.equal(wide(finite.t()), finite.float().t()), "columns may come before rows"


def test_every_e8m0_byte_is_its_power_of_two() -> None:
    values = e8m0.values(torch.arange(256, dtype=torch.uint8))
    wanted = torch.tensor([2.0 ** (byte - 127) for byte in range(255)], dtype=torch.float64)
    assert torch.equal(values[:255].double(), wanted)
    assert values[255].isnan()


def test_exponent_rules_differ_where_the_top_would_clip() -> None:
    amax = torch.tensor([6.0, 6.1, 4.0, 7.9, 0.0, torch.inf])
    ceil = e8m0.scales(amax, 6.0, spelled("mxfp4")).tolist()
    floor = e8m0.scales(amax, 6.0, spelled("mxfp4", exponent="floor")).tolist()
    assert ceil == [127, 128, 127, 128, 0, 255]
    assert floor == [127, 127, 127, 127, 0, 255]


def test_dual_scale_is_the_ascend_operators_known_answer() -> None:
    values = torch.full((1, 512), 8.0)
    parts = encode("mxfp4", values, Recipe(granularity="group", group=512))
    assert set(parts[Role.CODES].flatten().tolist()) == {0x77}
    assert set(parts[Role.BLOCK_SCALE].flatten().tolist()) == {127}
    assert parts[Role.OUTER_SCALE].item() == pytest.approx(4 / 3)
    assert torch.equal(decode("mxfp4", parts, (1, 512)), values)


def test_int4_zero_points_come_in_two_meanings() -> None:
    codes = torch.tensor([[0x20]], dtype=torch.uint8)
    parts = {
        Role.CODES: codes,
        Role.BLOCK_SCALE: torch.tensor([[0.5]]),
        Role.ZERO_POINT: torch.tensor([[3.0]]),
    }
    assert decode("int4", parts, (1, 2), signed="false").tolist() == [[-1.5, -0.5]]
    assert decode("int4", parts, (1, 2), signed="false", zero="scaled").tolist() == [[3.0, 4.0]]


def test_int4_low_nibble_is_the_even_column_in_twos_complement() -> None:
    parts = {Role.CODES: torch.tensor([[0x8F]], dtype=torch.uint8)}
    parts[Role.CHANNEL_SCALE] = torch.ones(1)
    assert decode("int4", parts, (1, 2)).tolist() == [[-1.0, -8.0]]
    assert decode("int4", parts, (1, 2), signed="false").tolist() == [[15.0, 8.0]]


def test_int8_subtracts_its_zero_point_before_scaling() -> None:
    parts = {
        Role.CODES: torch.tensor([[10, -10]], dtype=torch.int8),
        Role.CHANNEL_SCALE: torch.tensor([0.5]),
        Role.ZERO_POINT: torch.tensor([[2.0]]),
    }
    assert decode("int8", parts, (1, 2)).tolist() == [[4.0, -6.0]]


def test_nunchakus_outer_scales_of_rows_and_tensor_both_multiply() -> None:
    parts = encode("nvfp4", torch.randn(4, 32), PER_GROUP)
    rows = torch.tensor([1.0, 2.0, 4.0, 8.0])
    both = decode("nvfp4", parts | {Role.CHANNEL_SCALE: rows}, (4, 32))
    assert torch.equal(both, decode("nvfp4", parts, (4, 32)) * rows[:, None])


def test_e2m1_codes_are_the_nearest_magnitudes_for_every_bfloat16() -> None:
    """Held against the definition: nearest of eight magnitudes, ties to the even code, -0 is 0."""
    bits = torch.arange(1 << 16, dtype=torch.int32) << 16
    values = bits.view(torch.float32)
    values = torch.cat([values[values.isfinite()], torch.tensor([0.7500001, 2.4999998, -1e-42])])
    size = values.abs().double().clamp(max=6)[:, None]
    distance = (size - torch.tensor(e2m1.MAGNITUDES, dtype=torch.float64)).abs()
    odd = torch.arange(8) % 2 * 1e-12
    wanted = (distance + odd).argmin(1) + 8 * (values < 0)
    assert torch.equal(e2m1.codes(values).long(), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_largest_magnitude_is_found_with_zeros_infinities_and_nan(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randn(5, 64).to(dtype)
    values[1], values[2, 3], values[3, 40] = 0.0, -torch.inf, torch.nan
    found = amax(values, Cell(1, 32))
    assert torch.equal(found.nan_to_num(-1.0), values.abs().view(5, 2, 32).amax(2).nan_to_num(-1.0))
