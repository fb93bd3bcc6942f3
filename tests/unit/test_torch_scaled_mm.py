"""Products by torch's scaled_mm against a stand-in that keeps its contract on a CPU.

The stand-in holds shapes, strides, dtypes, recipes and swizzles to what ATen checks, and multiplies
decoded operands in float32; these tests say nothing of the hardware.
"""

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import ScalingType, SwizzleType

from diffquant import device
from diffquant.encodings import ENCODINGS, Recipe
from diffquant.errors import KernelError
from diffquant.kernels import KERNELS, Spec, refusal
from diffquant.layouts import tiles_128x4
from diffquant.materialize import prepared
from diffquant.plan import Activation, Encoding, Role
from tests.unit.test_nunchaku import error

LIMIT = 3.5e-3
N, K, M = 256, 640, 37
TILED, FLAT = SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE
REAL = functional.scaled_mm


def scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Any,
    scale_recipe_a: Any,
    scale_b: Any,
    scale_recipe_b: Any,
    swizzle_a: Any = None,
    swizzle_b: Any = None,
    bias: Tensor | None = None,
    output_dtype: torch.dtype | None = torch.bfloat16,
) -> Tensor:
    """mat_a [M, K] times column-major mat_b [K, N] and all scales."""
    assert mat_a.is_contiguous() and mat_b.stride(0) == 1 and bias is None
    assert output_dtype in (torch.bfloat16, torch.float16)
    left = operand(mat_a, scale_a, scale_recipe_a, swizzle_a)
    right = operand(mat_b.t(), scale_b, scale_recipe_b, swizzle_b)
    return (left @ right.t()).to(output_dtype)


def operand(codes: Tensor, scale: Any, recipe: Any, swizzle: Any) -> Any:
    """The decoded rows [R, K]."""
    rows, k = codes.shape
    if recipe is ScalingType.BlockWise1x128:
        assert swizzle is None and scale.dtype == torch.float32
        assert scale.shape == (rows, k // 128) and scale.stride() == (1, rows)
        return codes.float() * scale.repeat_interleave(128, 1)
    if recipe is ScalingType.BlockWise128x128:
        padded = (k // 128 + 3) // 4 * 4
        assert swizzle is None and scale.dtype == torch.float32
        assert scale.shape == (padded, rows // 128) and scale.stride() == (1, padded)
        blocks = scale.t().repeat_interleave(128, 0).repeat_interleave(128, 1)
        return codes.float() * blocks[:, :k]
    if recipe is ScalingType.BlockWise1x32:
        assert swizzle is TILED and codes.dtype == torch.float8_e4m3fn
        assert scale.dtype == torch.float8_e8m0fnu
        return codes.float() * untiled(scale, rows, k // 32).float().repeat_interleave(32, 1)
    assert recipe == [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    assert swizzle == [TILED, FLAT] and codes.dtype == torch.float4_e2m1fn_x2
    block, outer = scale
    assert block.dtype == torch.float8_e4m3fn and outer.shape == (1,)
    parts = {
        Role.CODES: codes.contiguous().view(torch.uint8),
        Role.BLOCK_SCALE: untiled(block, rows, k // 8),
        Role.TENSOR_SCALE: outer[0],
    }
    return ENCODINGS.load("nvfp4").decode(parts, Encoding("nvfp4"), (rows, 2 * k))


def untiled(scale: Tensor, rows: int, groups: int) -> Tensor:
    assert scale.ndim == 1 and scale.numel() == -(-rows // 128) * 128 * (-(-groups // 4) * 4)
    whole = tiles_128x4.undo(scale.view(torch.uint8), Role.BLOCK_SCALE, (rows, groups), ())
    return whole.contiguous().view(scale.dtype)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "scaled_mm", scaled_mm)


#: kernel, encoding, number, granularity of the weight, group of the input, mode, home
CASES = [
    ("torch_scaled_mm_block", "fp8", "fp8", "block", 128, "dynamic", "sm90"),
    ("torch_scaled_mm_mx", "mxfp8", "mxfp8", "group", 32, "dynamic", "sm100"),
    ("torch_scaled_mm_mx", "mxfp8", "mxfp8;exponent=floor", "group", 32, "dynamic", "sm120"),
    ("torch_scaled_mm_nv", "nvfp4", "nvfp4", "group", 16, "dynamic", "sm100"),
    ("torch_scaled_mm_nv", "nvfp4", "nvfp4", "group", 16, "static", "sm120"),
]
Case = tuple[str, str, str, str, int, str, str]


def layer(case: Case) -> tuple[Spec, dict[Role, Tensor], Tensor]:
    """Spec, parts [256, 640] and an input [37, 640]."""
    _, name, number, grain, group, mode, _ = case
    noise = torch.Generator().manual_seed(0)
    codec = ENCODINGS.load(name)
    assert codec.encode is not None
    recipe = Recipe(granularity=grain, group=group)  # type: ignore[arg-type]
    parts = codec.encode(torch.randn(N, K, generator=noise), Encoding(name), recipe)
    x_MK = torch.randn(M, K, generator=noise).bfloat16()
    if mode == "static":
        parts[Role.INPUT_SCALE] = x_MK.abs().max().float() / 2688
    activation = Activation(number=number, granularity="group", group=group, mode=mode)  # type: ignore[arg-type]
    roles = frozenset(parts)
    spec = Spec(encoding=Encoding(name), shape_NK=(N, K), roles=roles, activation=activation)
    return spec, parts, x_MK


def product(case: Case, spec: Spec, parts: dict[Role, Tensor], x_MK: Tensor) -> Tensor:
    kernel = KERNELS.load(case[0])
    found = kernel.build(spec)(x_MK, prepared(kernel, spec, parts))
    assert found.dtype == x_MK.dtype
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_what_faithful_numerics_predict(case: Case) -> None:
    spec, parts, x_MK = layer(case)
    predicted = KERNELS.load("reference").build(spec)(x_MK.float(), parts)
    weight_only = KERNELS.load("reference").build(replace(spec, activation=None))(x_MK, parts)
    assert error(product(case, spec, parts, x_MK), predicted) <= LIMIT
    assert error(weight_only, predicted) > 5e-3


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_scale_in_the_wrong_place_would_be_seen(case: Case, axis: int) -> None:
    spec, parts, x_MK = layer(case)
    truth = product(case, spec, parts, x_MK)
    scale = parts[Role.BLOCK_SCALE]
    turned = (
        scale.view(torch.uint8).roll(1, axis) if scale.element_size() == 1 else scale.roll(1, axis)
    )
    wrong = parts | {Role.BLOCK_SCALE: turned.view(scale.dtype)}
    assert error(product(case, spec, wrong, x_MK), truth.float()) > 1e-2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_runs_at_home_and_not_on_ada(case: Case) -> None:
    spec, _, _ = layer(case)
    kernel = KERNELS.load(case[0])
    assert refusal(kernel, spec, device.parse(case[-1])) is None
    assert (refusal(kernel, spec, device.parse("sm89")) or "").endswith("this is sm89")


def test_rows_taken_in_whole_blocks_are_blocks_again() -> None:
    spec, parts, x_MK = layer(CASES[0])
    rows = parts | {Role.BLOCK_SCALE: parts[Role.BLOCK_SCALE].repeat_interleave(128, 0)}
    whole = product(CASES[0], spec, parts, x_MK)
    assert torch.equal(product(CASES[0], spec, rows, x_MK), whole)
    ragged = rows | {Role.BLOCK_SCALE: rows[Role.BLOCK_SCALE].roll(1, 0)}
    with pytest.raises(KernelError, match="do not fall on blocks of 128"):
        product(CASES[0], spec, ragged, x_MK)


def test_the_real_function_takes_what_the_stand_in_takes() -> None:
    theirs, ours = (list(inspect.signature(each).parameters) for each in (REAL, scaled_mm))
    assert theirs[: len(ours)] == ours
