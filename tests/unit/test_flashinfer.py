"""The adapters of FlashInfer against a stand-in that keeps its documented contract on a CPU.

The stand-in checks argument order, shapes, strides and dtypes and computes with our own codecs, so
these tests hold the packing and the scales; they say nothing of the hardware.
"""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from diffquant import device
from diffquant.encodings import ENCODINGS, Recipe
from diffquant.kernels import KERNELS, Spec, refusal
from diffquant.layouts import tiles_128x4
from diffquant.plan import Activation, Encoding, Role

NVFP4 = Encoding("nvfp4")
TILES = "128x4"
LIMIT = 3.5e-3
N, K, M = 160, 192, 37
ONE = torch.ones(())
#: 2688 / 1024: the scale of an NVFP4 input with this amax is a power of two, which survives being
#: passed as its reciprocal. Another is an ulp off, and block scales in the middle round elsewhere.
AMAX = 2.625


def nvfp4_quantize(
    a: Tensor, a_global_sf: Tensor, *, sfLayout: str, do_shuffle: bool
) -> tuple[Tensor, Tensor]:
    """Codes [M, K / 2] and e4m3 scales in padded tiles; the global scale multiplies the input."""
    assert a.dtype in (torch.bfloat16, torch.float16) and a.stride(-1) == 1
    assert a_global_sf.shape == (1,) and a_global_sf.dtype == torch.float32
    assert (sfLayout, do_shuffle) == (TILES, False)
    codec = ENCODINGS.load("nvfp4")
    assert codec.encode is not None
    parts = codec.encode(a.float(), NVFP4, Recipe(granularity="group", scale=1 / a_global_sf[0]))
    scale = parts[Role.BLOCK_SCALE].view(torch.uint8)
    return parts[Role.CODES], tiles_128x4.redo(scale, Role.BLOCK_SCALE, tuple(scale.shape), ())


def mm_fp4(
    a: Tensor,
    b: Tensor,
    a_descale: Tensor,
    b_descale: Tensor,
    alpha: Tensor,
    out_dtype: torch.dtype,
    *,
    backend: str,
) -> Tensor:
    """a [m, k / 2] times column-major b [k / 2, n], times alpha."""
    assert backend == "cutlass" and b.stride(0) == 1 and a.shape[1] == b.shape[0]
    assert a_descale.dtype == b_descale.dtype == torch.uint8
    assert alpha.shape == (1,) and alpha.dtype == torch.float32
    assert b_descale.t().is_contiguous() and b_descale.shape[1] % 128 == 0
    y_MN = decoded(a, a_descale) @ decoded(b.t(), b_descale.t()).t()
    return (y_MN * alpha).to(out_dtype)


def decoded(codes: Tensor, tiles: Tensor) -> Tensor:
    shape = (codes.shape[0], 2 * codes.shape[1])
    scale = tiles_128x4.undo(tiles, Role.BLOCK_SCALE, (shape[0], shape[1] // 16), ())
    parts = {
        Role.CODES: codes,
        Role.BLOCK_SCALE: scale.view(torch.float8_e4m3fn),
        Role.TENSOR_SCALE: ONE,
    }
    return ENCODINGS.load("nvfp4").decode(parts, NVFP4, shape)


def bmm_fp8(
    A: Tensor, B: Tensor, A_scale: Tensor, B_scale: Tensor, dtype: torch.dtype, *, backend: str
) -> Tensor:
    """A [b, m, k] times column-major B [b, k, n], times both scales."""
    assert backend == "auto" and A.ndim == B.ndim == 3 and B.stride(1) == 1
    assert A.dtype == B.dtype == torch.float8_e4m3fn
    assert A_scale.numel() == B_scale.numel() == 1
    assert dtype in (torch.bfloat16, torch.float16)
    return (A.float() @ B.float() * A_scale * B_scale).to(dtype)


@pytest.fixture(autouse=True)
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flashinfer")
    vars(module).update(
        nvfp4_quantize=nvfp4_quantize,
        mm_fp4=mm_fp4,
        bmm_fp8=bmm_fp8,
        SfLayout=SimpleNamespace(layout_128x4=TILES),
    )
    monkeypatch.setitem(sys.modules, "flashinfer", module)


def layer(kernel: str, mode: str) -> tuple[Spec, dict[Role, Tensor], Tensor]:
    """Spec, parts [160, 192] and an input [37, 192] of one linear."""
    generator = torch.Generator().manual_seed(0)
    name = "nvfp4" if kernel == "flashinfer_fp4" else "fp8"
    grain, group, largest = ("group", 16, 2688) if name == "nvfp4" else ("tensor", None, 448)
    codec = ENCODINGS.load(name)
    assert codec.encode is not None
    recipe = Recipe(granularity=grain, group=group)  # type: ignore[arg-type]
    parts = codec.encode(torch.randn(N, K, generator=generator), Encoding(name), recipe)
    x_MK = torch.randn(M, K, generator=generator)
    x_MK = (x_MK * (AMAX / x_MK.abs().max())).bfloat16()
    if mode == "static":
        parts[Role.INPUT_SCALE] = x_MK.abs().max().float() / largest
    activation = Activation(number=name, granularity=grain, group=group, mode=mode)  # type: ignore[arg-type]
    return spec_of(name, parts, activation), parts, x_MK


def spec_of(name: str, parts: dict[Role, Tensor], activation: Activation) -> Spec:
    roles = frozenset(parts)
    return Spec(encoding=Encoding(name), shape_NK=(N, K), roles=roles, activation=activation)


def error(
    kernel: str, spec: Spec, parts: dict[Role, Tensor], x_MK: Tensor, wanted: Tensor
) -> float:
    ours = KERNELS.load(kernel).build(spec)(x_MK, parts)
    assert ours.dtype == x_MK.dtype
    return float((ours.float() - wanted).norm() / wanted.norm())


def faithful(spec: Spec, parts: dict[Role, Tensor], x_MK: Tensor) -> Tensor:
    return KERNELS.load("reference").build(spec)(x_MK.float(), parts)


CASES = [
    (kernel, mode)
    for kernel in ("flashinfer_fp4", "flashinfer_fp8")
    for mode in ("static", "dynamic")
]


@pytest.mark.parametrize(("kernel", "mode"), CASES)
def test_it_is_what_faithful_numerics_predict(kernel: str, mode: str) -> None:
    spec, parts, x_MK = layer(kernel, mode)
    assert error(kernel, spec, parts, x_MK, faithful(spec, parts, x_MK)) <= LIMIT


@pytest.mark.parametrize(("kernel", "mode"), CASES)
def test_its_activations_are_truly_quantized(kernel: str, mode: str) -> None:
    spec, parts, x_MK = layer(kernel, mode)
    weight_only = faithful(replace(spec, activation=None), parts, x_MK)
    assert error(kernel, spec, parts, x_MK, weight_only) > 5e-3


@pytest.mark.parametrize(("kernel", "mode"), CASES)
@pytest.mark.parametrize("role", [Role.TENSOR_SCALE, Role.INPUT_SCALE, Role.BLOCK_SCALE])
def test_a_wrong_scale_would_be_seen(kernel: str, mode: str, role: Role) -> None:
    spec, parts, x_MK = layer(kernel, mode)
    if role in parts:
        old = parts[role]
        wrong = old.view(torch.uint8).roll(1, 0).view(old.dtype) if old.ndim else old / 3
        off = error(kernel, spec, parts | {role: wrong}, x_MK, faithful(spec, parts, x_MK))
        assert off > LIMIT


@pytest.mark.parametrize(("kernel", "mode"), CASES)
def test_an_input_of_zeros_gives_zeros(kernel: str, mode: str) -> None:
    spec, parts, x_MK = layer(kernel, mode)
    assert not KERNELS.load(kernel).build(spec)(torch.zeros_like(x_MK), parts).any()


@pytest.mark.parametrize("place", ["sm100", "sm103", "sm120", "sm121"])
def test_fp4_runs_on_blackwell_where_the_package_is_installed(place: str) -> None:
    spec, _, _ = layer("flashinfer_fp4", "dynamic")
    bare = replace(device.parse(place), packages={})
    there = replace(bare, packages={"flashinfer-python": "0.6"})
    kernel = KERNELS.load("flashinfer_fp4")
    assert refusal(kernel, spec, there) is None
    assert refusal(kernel, spec, bare) == "needs flashinfer-python installed"


@pytest.mark.parametrize("place", ["sm80", "sm89", "sm90", "gfx950", "cpu"])
def test_fp4_refuses_everything_older(place: str) -> None:
    spec, _, _ = layer("flashinfer_fp4", "dynamic")
    there = replace(device.parse(place), packages={"flashinfer-python": "0.6"})
    assert refusal(KERNELS.load("flashinfer_fp4"), spec, there) is not None
