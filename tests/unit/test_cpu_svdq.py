"""SVDQuant INT4 by products of integers on a CPU, against float64 and the reference."""

import pytest
import torch
from torch import Tensor

from diffquant import device
from diffquant.activations import quantized
from diffquant.encodings import ENCODINGS, Recipe
from diffquant.kernels import KERNELS, Spec, choose
from diffquant.plan import DENSE, Activation, Encoding, LayerPlan, Piece, Role, Span
from diffquant.schemes import SCHEMES

N, K = 200, 320
ENCODING = Encoding("int4", (("group", "64"),))


def layer(unsigned: bool, m: int, dtype: torch.dtype) -> tuple[Spec, dict[Role, Tensor], Tensor]:
    """Spec, parts [200, 320] and an input [m, 320] with groups of zeros and outliers."""
    noise = torch.Generator().manual_seed(0)
    codec = ENCODINGS.load("int4")
    assert codec.encode is not None
    recipe = Recipe(granularity="group", group=64)
    parts = codec.encode(torch.randn(N, K, generator=noise), ENCODING, recipe)
    parts[Role.BLOCK_SCALE] = parts[Role.BLOCK_SCALE].bfloat16()
    activation = Activation(
        number="int4", granularity="group", group=64, mode="dynamic", unsigned=unsigned
    )
    roles = frozenset(parts)
    spec = Spec(encoding=ENCODING, shape_NK=(N, K), roles=roles, activation=activation)
    x_MK = torch.randn(m, K, generator=noise)
    x_MK[0, :64], x_MK[-1, 3] = 0, 40
    return spec, parts, (x_MK.abs() if unsigned else x_MK).to(dtype)


def exact(spec: Spec, parts: dict[Role, Tensor], x_MK: Tensor) -> Tensor:
    """The plan's equation in float64, with no rounding but those of the codes and scales."""
    assert spec.activation is not None
    weight = ENCODINGS.load("int4").decode(parts, ENCODING, (N, K))
    return quantized(x_MK, spec.activation, parts).double() @ weight.double().T


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def product(kernel: str, spec: Spec, parts: dict[Role, Tensor], x_MK: Tensor) -> Tensor:
    return KERNELS.load(kernel).build(spec)(x_MK, parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [1, 37, 2100])
@pytest.mark.parametrize("unsigned", [False, True])
def test_it_is_exact_but_for_float32_sums(unsigned: bool, m: int, dtype: torch.dtype) -> None:
    given = layer(unsigned, m, dtype)
    found = product("cpu_svdq", *given)
    assert found.dtype == torch.float32
    assert error(found, exact(*given)) < 1e-6


@pytest.mark.parametrize("unsigned", [False, True])
def test_the_reference_rounds_more_and_agrees(unsigned: bool) -> None:
    given = layer(unsigned, 37, torch.bfloat16)
    ours = product("cpu_svdq", *given)
    assert error(product("reference", *given), ours) <= 3.5e-3
    assert error(ours, exact(*given)) < error(product("reference", *given), exact(*given))


def test_signs_and_exchanged_half_bytes_would_be_seen() -> None:
    spec, parts, x_MK = layer(False, 37, torch.bfloat16)
    codes = parts[Role.CODES].view(torch.uint8)
    truth = exact(spec, parts, x_MK)
    for wrong in ((codes >> 4) | (codes << 4), codes ^ 0x08):
        assert error(product("cpu_svdq", spec, parts | {Role.CODES: wrong}, x_MK), truth) > 0.1


def test_its_inputs_are_left_as_they_were() -> None:
    spec, parts, x_MK = layer(False, 9, torch.bfloat16)
    before = x_MK.clone(), {role: part.clone() for role, part in parts.items()}
    product("cpu_svdq", spec, parts, x_MK)
    assert torch.equal(x_MK, before[0])
    assert all(torch.equal(part, before[1][role]) for role, part in parts.items())


@pytest.mark.parametrize(
    ("numerics", "kernel"),
    [("auto", "cpu_int4"), ("weight-only", "cpu_int4"), ("faithful", "cpu_svdq")],
)
def test_it_runs_to_predict_and_leaves_speed_to_others(numerics: str, kernel: str) -> None:
    piece = Piece(
        encoding=DENSE,
        stored_NK=(N, K),
        parts=(),
        out=Span(0, N),
        cols=Span(0, K),
        recode=SCHEMES.load("svdq_int4").recode(),
    )
    plan = LayerPlan(path="proj", shape_NK=(N, K), pieces=(piece,), dtype="bfloat16", why="a test")
    choice = choose(plan, device.parse("cpu"), numerics=numerics)  # type: ignore[arg-type]
    assert choice.kernel == kernel
    told = {item.kernel: item.reason for item in choice.refusals}
    wanted = "predicts quantized inputs: --numerics faithful"
    assert told.get("cpu_svdq") == (wanted if numerics != "faithful" else None)
