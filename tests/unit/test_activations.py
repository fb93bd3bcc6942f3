"""A(h) against formulas written out by hand."""

import pytest
import torch
from torch import Tensor

from diffquant.activations import quantized
from diffquant.errors import PlanError
from diffquant.plan import Activation, Role


def activation(number: str, granularity: str, mode: str = "dynamic", **more: object) -> Activation:
    return Activation(number=number, granularity=granularity, mode=mode, **more)  # type: ignore[arg-type]


@pytest.fixture
def x() -> Tensor:
    """Eight tokens whose channels differ in size, as in a transformer."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 1024, generator=generator) * torch.randn(1024, generator=generator).exp()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


BOUNDS = [
    (activation("fp8", "tensor"), 0.03),
    (activation("fp8", "token"), 0.03),
    (activation("fp8", "group", group=128), 0.025),
    (activation("int8", "token"), 0.04),
    (activation("int8", "token", symmetric=False), 0.04),
    (activation("int8", "group", group=128), 0.025),
    (activation("int4", "token"), 0.5),
    (activation("int4", "group", group=64), 0.25),
    (activation("nvfp4", "group", group=16), 0.1),
    (activation("nvfp4;outer=none", "group", group=16), 0.1),
    (activation("mxfp8", "group", group=32), 0.03),
    (activation("mxfp8;exponent=floor", "group", group=32), 0.05),
    (activation("mxfp4", "group", group=32), 0.17),
    (activation("mxfp4", "group", group=512), 0.15),
]


@pytest.mark.parametrize(("asked", "bound"), BOUNDS, ids=str)
def test_error_is_what_the_number_allows_and_a_second_rounding_changes_nothing(
    asked: Activation, bound: float, x: Tensor
) -> None:
    once = quantized(x, asked, {})
    assert 0 < error(once, x) < bound
    assert error(quantized(once, asked, {}), once) < 1e-6
    assert once.dtype == torch.float32


@pytest.mark.parametrize(("asked", "bound"), BOUNDS, ids=str)
def test_zeros_stay_zeros(asked: Activation, bound: float) -> None:
    assert torch.equal(quantized(torch.zeros(2, 512), asked, {}), torch.zeros(2, 512))


def test_static_fp8_uses_the_files_scale_and_saturates(x: Tensor) -> None:
    asked, scale = activation("fp8", "tensor", "static"), x.abs().max() / 896
    found = quantized(x, asked, {Role.INPUT_SCALE: scale})
    inverse = 448.0 / (scale * 448)
    wanted = (x * inverse).clamp(-448, 448).to(torch.float8_e4m3fn).float() * (1 / inverse)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, quantized(x, activation("fp8", "tensor"), {}))


def test_static_activations_refuse_to_guess_a_scale(x: Tensor) -> None:
    with pytest.raises(PlanError, match="needs input_scale"):
        quantized(x, activation("fp8", "tensor", "static"), {})


def test_static_nvfp4_takes_input_scale_as_its_outer_scale(x: Tensor) -> None:
    parts = {Role.INPUT_SCALE: x.abs().max() / 2688}
    found = quantized(x, activation("nvfp4", "group", "static", group=16), parts)
    assert torch.equal(found, quantized(x, activation("nvfp4", "group", group=16), {}))
    wrong = {Role.INPUT_SCALE: x.abs().max() / 2688 / 448}
    assert error(quantized(x, activation("nvfp4", "group", "static", group=16), wrong), x) > 0.1


def test_static_int8_with_an_offset_follows_the_ascend_formula() -> None:
    x = torch.tensor([[0.0, 1.0, 2.04, 30.0]])
    parts = {Role.INPUT_SCALE: torch.tensor(0.1), Role.INPUT_ZERO_POINT: torch.tensor(-128.0)}
    found = quantized(x, activation("int8", "tensor", "static", symmetric=False), parts)
    assert torch.allclose(found, torch.tensor([[0.0, 1.0, 2.0, 25.5]]))


def test_asymmetric_int8_wastes_no_codes_on_the_side_nobody_is_on(x: Tensor) -> None:
    positive = x.abs()
    lopsided = quantized(positive, activation("int8", "token", symmetric=False), {})
    assert error(lopsided, positive) < 0.7 * error(
        quantized(positive, activation("int8", "token"), {}), positive
    )


def test_nunchakus_int4_makes_codes_with_the_exact_scale_and_multiplies_by_the_rounded_one() -> (
    None
):
    x = torch.linspace(-1.003, 0.9, 64)[None]
    scale = x.abs().max() / 7
    codes = (x * (1 / scale)).round().clamp(-8, 7)
    found = quantized(x, activation("int4", "group", group=64), {})
    assert torch.equal(found, codes * scale.bfloat16().float())
    assert not torch.equal(found, codes * scale)


def test_unsigned_int4_has_sixteen_levels_and_no_negative_numbers(x: Tensor) -> None:
    asked = activation("int4", "group", group=64, unsigned=True)
    positive = x.abs()
    signed = quantized(positive, activation("int4", "group", group=64), {})
    assert error(quantized(positive, asked, {}), positive) < 0.7 * error(signed, positive)
    assert quantized(x, asked, {}).min() >= 0


def test_nvfp4_without_outer_scale_makes_codes_with_the_exact_block_scale() -> None:
    x = torch.tensor([[4.3, 2.0, 1.1, -0.2] * 4])
    exact = x.abs().max() / 6
    stored = exact.to(torch.float8_e4m3fn).float()
    found = quantized(x, activation("nvfp4;outer=none", "group", group=16), {})
    assert found[0, 0] == 6 * stored
    assert found[0, 1] == 3 * stored
    assert stored != exact


def test_tokens_have_scales_of_their_own() -> None:
    x = torch.stack((torch.full((64,), 1e-3), torch.full((64,), 1e3)))
    assert error(quantized(x, activation("fp8", "token"), {})[:1], x[:1]) < 1e-6
    assert error(quantized(x, activation("int8", "tensor"), {})[:1], x[:1]) == 1


def test_groups_must_divide_the_columns(x: Tensor) -> None:
    with pytest.raises(PlanError, match="does not divide"):
        quantized(x[:, :100], activation("int4", "group", group=64), {})
