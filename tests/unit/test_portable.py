"""Devices without float8, played on a CPU: whatever touches a float8 tensor while it computes fails."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffquant import device, loading
from diffquant.device import Device
from diffquant.encodings import ENCODINGS, Recipe
from diffquant.errors import KernelError
from diffquant.kernels import KERNELS, Spec, choose, refusal
from diffquant.linear import QuantLinear
from diffquant.loading import RunFlags
from diffquant.materialize import prepared
from diffquant.plan import Activation, Encoding, Role
from diffquant.resolve import ModelFlags

FLOAT8 = {
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
}
MPS = Device(kind="mps", arch="arm64", name="Apple GPU", packages={}, present=False)
GFX942 = device.parse("gfx942")
N, K, M = 96, 256, 7
E4M3 = Encoding("fp8")
CASES = [
    (E4M3, Recipe(granularity="tensor")),
    (E4M3, Recipe(granularity="channel")),
    (E4M3, Recipe(granularity="block", group=128)),
    (Encoding("fp8", (("kind", "e5m2"),)), Recipe(granularity="tensor")),
    (Encoding("fp8", (("kind", "e4m3fnuz"),)), Recipe(granularity="tensor")),
    (Encoding("mxfp8"), Recipe(granularity="group", group=32)),
    (Encoding("mxfp4"), Recipe(granularity="group", group=32)),
    (Encoding("mxfp4", (("exponent", "floor"),)), Recipe(granularity="group", group=512)),
    (Encoding("nvfp4"), Recipe(granularity="group", group=16)),
    (Encoding("nvfp4", (("outer", "none"),)), Recipe(granularity="group", group=16)),
]


class NoFloat8(TorchDispatchMode):
    """As on Apple's GPUs: an operation that reads or makes a float8 tensor is an error."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if leaf in FLOAT8 or (isinstance(leaf, Tensor) and leaf.dtype in FLOAT8):
                raise TypeError(f"{func} on float8")
        return out


def without_float8() -> NoFloat8:
    return NoFloat8()  # type: ignore[no-untyped-call]


def layer(encoding: Encoding, recipe: Recipe) -> tuple[Spec, dict[Role, Tensor], Tensor]:
    noise = torch.Generator().manual_seed(0)
    codec = ENCODINGS.load(encoding.name)
    assert codec.encode is not None
    parts = codec.encode(torch.randn(N, K, generator=noise), encoding, recipe)
    spec = Spec(encoding=encoding, shape_NK=(N, K), roles=frozenset(parts))
    return spec, parts, torch.randn(M, K, generator=noise)


@pytest.mark.parametrize(("encoding", "recipe"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_reference_without_any_float8(
    encoding: Encoding, recipe: Recipe, dtype: torch.dtype
) -> None:
    spec, parts, x_MK = layer(encoding, recipe)
    kernel = KERNELS.load("portable")
    held, multiply = prepared(kernel, spec, parts), kernel.build(spec)
    with without_float8():
        found = multiply(x_MK.to(dtype), held)
    wanted = KERNELS.load("reference").build(spec)(x_MK.to(dtype).float(), parts)
    assert found.dtype == dtype
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error <= (1e-6 if dtype == torch.float32 else 3.5e-3)


def test_the_reference_would_be_caught() -> None:
    spec, parts, x_MK = layer(*CASES[0])
    with without_float8(), pytest.raises(TypeError, match="on float8"):
        KERNELS.load("reference").build(spec)(x_MK, parts)


def test_another_float8_would_be_seen() -> None:
    """gfx942's own e4m3fnuz reads the same bytes as half the number, and one as NaN."""
    spec, parts, x_MK = layer(*CASES[0])
    wrong = replace(spec, encoding=Encoding("fp8", (("kind", "e4m3fnuz"),)))
    kernel = KERNELS.load("portable")
    held = prepared(kernel, spec, parts)
    right = kernel.build(spec)(x_MK, held)
    assert torch.allclose(kernel.build(wrong)(x_MK, held) * 2, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", [MPS, GFX942, device.parse("ascend-a2")], ids=lambda at: at.kind)
@pytest.mark.parametrize(("encoding", "recipe"), CASES, ids=str)
def test_it_is_what_such_a_device_runs(place: Device, encoding: Encoding, recipe: Recipe) -> None:
    spec, _, _ = layer(encoding, recipe)
    assert refusal(KERNELS.load("portable"), spec, place) is None


def test_apple_refuses_what_would_need_float8() -> None:
    spec, _, _ = layer(*CASES[0])
    asked = replace(spec, activation=Activation(number="fp8", granularity="tensor", mode="dynamic"))
    reference = KERNELS.load("reference")
    assert refusal(reference, spec, MPS) == "reads fp8 as float8, which mps does not have"
    assert refusal(reference, asked, MPS) == "cannot round inputs to fp8: mps has no float8"
    assert refusal(reference, spec, GFX942) is refusal(reference, asked, GFX942) is None


def test_a_prediction_of_float8_inputs_is_refused_there_with_every_reason() -> None:
    dry = loading.dry_run(ModelFlags(quantization="fp8"), RunFlags(device="cpu"))
    (plan,) = dry.plans.values()
    with pytest.raises(KernelError, match="no kernel runs") as caught:
        choose(plan.quantized[0], MPS, numerics="faithful")
    assert "mps has no float8" in (caught.value.hint or "")


@pytest.mark.parametrize("scheme", ["fp8", "nvfp4", "mxfp8"])
def test_a_whole_transformer_computes_without_float8(scheme: str) -> None:
    dry = loading.dry_run(ModelFlags(quantization=scheme), RunFlags(device="cpu", dtype="fp32"))
    cpu = torch.device("cpu")
    choices = {
        name: tuple(choose(layer, MPS) for layer in plan.layers) for name, plan in dry.plans.items()
    }
    ours = loading.build(replace(dry, choices=choices), "transformer", cpu, torch.float32)
    plain = loading.build(dry, "transformer", cpu, torch.float32)
    assert not [name for name, held in ours.state_dict().items() if held.dtype in FLOAT8]
    path, linear = next(
        (path, each) for path, each in ours.named_modules() if isinstance(each, QuantLinear)
    )
    x_MK = torch.randn(9, linear.in_features)
    with torch.no_grad(), without_float8():
        found = linear(x_MK)
    with torch.no_grad():
        wanted = plain.get_submodule(path)(x_MK)
    assert (found - wanted).norm() / wanted.norm() < 1e-2
