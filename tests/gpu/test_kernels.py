"""Every kernel for NVIDIA hardware on the GPU that is here: real shapes, 16-bit inputs, the reference.

    pytest -m gpu tests/gpu

What a kernel's own needs refuse here is skipped with its words.
"""

from functools import cache, lru_cache

import pytest
import torch
from torch import Tensor

from diffquant import device
from diffquant.kernels import KERNELS, Spec, refusal
from diffquant.kernels._operator import multiplier
from diffquant.plan import Role
from tests.interpreted import KINDS, encoded, linear

#: Vendors' packages have their own contracts and are not among these.
NAMES = [name for name in KERNELS.names() if name.startswith(("triton_", "torch_"))]
LIMIT = 3.5e-3
#: M, N, K: FLUX's attention and both halves of its MLP, few tokens, and what no tile divides.
SHAPES = ((4608, 3072, 3072), (4608, 12288, 3072), (512, 3072, 12288), (1, 3072, 3072))
RAGGED, SMALL = (77, 200, 448), (64, 256, 512)

pytestmark = pytest.mark.gpu


def cases() -> list[tuple[str, str]]:
    """Kernels, each with every kind of weight that its needs may admit somewhere."""
    found = []
    for name in NAMES:
        needs = KERNELS.load(name).needs
        for kind, how in KINDS.items():
            asked = "none" if how.activation is None else str(how.activation)
            if how.encoding.name in needs.encodings and asked in needs.activations:
                found.append((name, kind))
    return found


def given(
    name: str, kind: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Spec, dict[Role, Tensor], Tensor]:
    """Spec, parts and input on the GPU; skips where the kernel refuses, before it encodes 38 million
    weights where it refuses a few as well."""
    for each in (SMALL, shape):
        spec, parts, x_MK = made(kind, each)
        reason = refusal(KERNELS.load(name), spec, place())
        if reason is not None:
            pytest.skip(f"{name} {reason}")
    return spec, {role: part.cuda() for role, part in parts.items()}, x_MK.to("cuda", dtype)


@lru_cache(maxsize=2)
def made(kind: str, shape: tuple[int, int, int]) -> tuple[Spec, dict[Role, Tensor], Tensor]:
    """Encoded on the host; neighbouring tests share a weight."""
    m, n, k = shape
    generator = torch.Generator().manual_seed(m + n + k)
    x_MK = torch.randn(m, k, generator=generator)
    return *encoded(KINDS[kind], torch.randn(n, k, generator=generator) / k**0.5, x_MK), x_MK


@cache
def place() -> device.Device:
    return device.probe()


def error(name: str, spec: Spec, parts: dict[Role, Tensor], x_MK: Tensor) -> float:
    ours = KERNELS.load(name).build(spec)(x_MK, parts).float()
    wanted = KERNELS.load("reference").build(spec)(x_MK.float(), parts)
    return float((ours - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, RAGGED], ids=str)
@pytest.mark.parametrize(("name", "kind"), cases())
def test_it_agrees_with_the_reference(
    name: str, kind: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    assert error(name, *given(name, kind, shape, dtype)) <= LIMIT


@pytest.mark.parametrize(("name", "kind"), cases())
def test_codes_of_another_column_would_be_seen(name: str, kind: str) -> None:
    spec, parts, x_MK = given(name, kind, SHAPES[0], torch.bfloat16)
    codes = parts[Role.CODES]
    moved = codes.view(torch.uint8).roll(1, 1).view(codes.dtype)
    wanted = KERNELS.load("reference").build(spec)(x_MK.float(), parts)
    ours = KERNELS.load(name).build(spec)(x_MK, parts | {Role.CODES: moved}).float()
    assert float((ours - wanted).norm() / wanted.norm()) > LIMIT


@pytest.mark.parametrize(("name", "kind"), cases())
def test_it_is_one_graph_and_gives_the_same_compiled(name: str, kind: str) -> None:
    spec, parts, x_MK = given(name, kind, SMALL, torch.bfloat16)
    product = multiplier(name, spec)
    compiled = torch.compile(product, fullgraph=True)
    assert torch.equal(compiled(x_MK, parts), product(x_MK, parts))


@pytest.mark.parametrize("kind", ["svdq", "svdq behind GELU"])
def test_svdq_with_its_low_rank_branch_agrees_with_the_reference(kind: str) -> None:
    shape = SHAPES[0]
    _, parts, x_MK = given("triton_svdq", kind, shape, torch.bfloat16)
    n, k = shape[1:]
    generator = torch.Generator("cuda").manual_seed(0)
    branch = {
        Role.SMOOTH: torch.rand(k, generator=generator, device="cuda") + 0.5,
        Role.LOWRANK_DOWN: torch.randn(32, k, generator=generator, device="cuda") / k**0.5,
        Role.LOWRANK_UP: torch.randn(n, 32, generator=generator, device="cuda"),
    }
    # What is stored in 16 bits is the same number for both.
    held = parts | {role: part.bfloat16().float() for role, part in branch.items()}
    ours = linear("triton_svdq", KINDS[kind], (n, k), held, torch.bfloat16)(x_MK).float()
    wanted = linear("reference", KINDS[kind], (n, k), held, torch.float32)(x_MK.float())
    assert float((ours - wanted).norm() / wanted.norm()) <= 2 * LIMIT
