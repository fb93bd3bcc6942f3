"""`torch._scaled_mm` runs on a CPU too, so the product is held against faithful numerics here."""

import pytest
import torch
from torch import Tensor

from diffquant.encodings import ENCODINGS, Granularity, Recipe
from diffquant.kernels import KERNELS, Spec
from diffquant.plan import Activation, Encoding, Role

FP8 = Encoding("fp8")
SCHEMES: dict[str, tuple[Granularity, Activation]] = {
    "static": ("tensor", Activation(number="fp8", granularity="tensor", mode="static")),
    "dynamic": ("tensor", Activation(number="fp8", granularity="tensor", mode="dynamic")),
    "token": ("channel", Activation(number="fp8", granularity="token", mode="dynamic")),
}


def layer(scheme: str) -> tuple[Spec, dict[Role, Tensor], Tensor]:
    """Spec, parts [48, 96] and an input [5, 96] of one FP8 linear."""
    grain, activation = SCHEMES[scheme]
    generator = torch.Generator().manual_seed(0)
    codec, weight = ENCODINGS.load("fp8"), torch.randn(48, 96, generator=generator)
    assert codec.encode is not None
    parts = codec.encode(weight, FP8, Recipe(granularity=grain))
    x_MK = torch.randn(5, 96, generator=generator).bfloat16()
    if scheme == "static":
        parts[Role.INPUT_SCALE] = x_MK.abs().max().float() / 448
    spec = Spec(encoding=FP8, shape_NK=(48, 96), roles=frozenset(parts), activation=activation)
    return spec, parts, x_MK


def product(kernel: str, spec: Spec, parts: dict[Role, Tensor], x_MK: Tensor) -> Tensor:
    return KERNELS.load(kernel).build(spec)(x_MK, parts).float()


def error(ours: Tensor, wanted: Tensor) -> float:
    return float((ours - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_what_faithful_numerics_predict(scheme: str) -> None:
    spec, parts, x_MK = layer(scheme)
    ours = product("torch_scaled_mm", spec, parts, x_MK)
    assert error(ours, product("reference", spec, parts, x_MK.float())) <= 3.5e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_its_activations_are_truly_quantized(scheme: str) -> None:
    spec, parts, x_MK = layer(scheme)
    weight = ENCODINGS.load("fp8").decode(parts, FP8, (48, 96))
    assert error(product("torch_scaled_mm", spec, parts, x_MK), x_MK.float() @ weight.T) > 5e-3


@pytest.mark.parametrize(("scheme", "role"), [("static", Role.INPUT_SCALE), ("token", None)])
def test_an_input_scale_of_another_layer_would_be_seen(scheme: str, role: Role | None) -> None:
    spec, parts, x_MK = layer(scheme)
    wanted = product("reference", spec, parts, x_MK.float())
    other = role or Role.CHANNEL_SCALE
    off = parts | {other: parts[other] / 3}
    assert error(product("torch_scaled_mm", spec, off, x_MK), wanted) > 3.5e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_of_zeros_stays_zero(scheme: str) -> None:
    spec, parts, x_MK = layer(scheme)
    x_MK[2] = 0
    assert not product("torch_scaled_mm", spec, parts, x_MK)[2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_product_has_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    spec, parts, x_MK = layer("dynamic")
    ours = KERNELS.load("torch_scaled_mm").build(spec)(x_MK.to(dtype), parts)
    assert ours.dtype == dtype
    assert bool(torch.isfinite(ours).all())
