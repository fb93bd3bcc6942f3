"""The portable CPU kernels against the weights their codecs define, and against themselves misled."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier

import pytest
import torch
from torch import Tensor

from diffquant.device import Device
from diffquant.encodings import ENCODINGS, Granularity, Recipe
from diffquant.kernels import KERNELS, Spec, _cpu, refusal
from diffquant.plan import Activation, Encoding, Role

CPU = Device(kind="cpu", arch="x86_64", name="a CPU")
#: Relative to a product in float64 of the same weights: rounding of bfloat16, twice.
LIMIT = 3.5e-3
N, K = 300, 512  # several chunks of 16 rows and more, the last one ragged


@dataclass(frozen=True)
class Case:
    kernel: str
    encoding: str
    granularity: Granularity
    group: int | None = None
    options: tuple[tuple[str, str], ...] = ()
    extra: dict[Role, Tensor] = field(default_factory=dict)

    @property
    def written(self) -> Encoding:
        return Encoding(self.encoding, self.options)

    def __str__(self) -> str:
        return f"{self.written} {self.granularity}{self.group or ''} {'+'.join(self.extra)}"


SCALED_ZERO = (("group", "64"), ("signed", "false"), ("zero", "scaled"))
INVERSE = (("tensor_scale", "divide"),)
#: As Nunchaku stores them; float32 scales take the other way through the kernel.
HALVES = (1e-3 * (1 + torch.arange(N * 8) % 13)).reshape(N, 8).bfloat16()
CASES = [
    Case("cpu_fp8", "fp8", "tensor"),
    Case("cpu_fp8", "fp8", "channel"),
    Case("cpu_fp8", "fp8", "block", 128),
    Case("cpu_int8", "int8", "channel"),
    Case("cpu_int8", "int8", "block", 128),
    Case("cpu_int8", "int8", "group", 32),
    Case("cpu_int8", "int8", "channel", extra={Role.ZERO_POINT: torch.arange(N) % 40 - 20.0}),
    Case("cpu_mxfp8", "mxfp8", "group", 32),
    Case("cpu_mxfp4", "mxfp4", "group", 32),
    Case("cpu_mxfp4", "mxfp4", "group", 512),
    Case("cpu_nvfp4", "nvfp4", "group", 16),
    Case("cpu_nvfp4", "nvfp4", "group", 16, (("outer", "none"),)),
    Case("cpu_nvfp4", "nvfp4", "group", 16, INVERSE, {Role.TENSOR_SCALE: torch.tensor(3e4)}),
    Case("cpu_nvfp4", "nvfp4", "group", 16, extra={Role.CHANNEL_SCALE: 1 + torch.arange(N) / N}),
    Case("cpu_int4", "int4", "group", 128),
    Case("cpu_int4", "int4", "group", 64, (("group", "64"),)),
    Case("cpu_int4", "int4", "group", 64, (("group", "64"),), {Role.BLOCK_SCALE: HALVES}),
    Case("cpu_int4", "int4", "group", 64, (("signed", "false"),), {Role.BLOCK_SCALE: HALVES}),
    Case("cpu_int4", "int4", "channel"),
    Case(
        "cpu_int4", "int4", "group", 64, SCALED_ZERO, {Role.ZERO_POINT: torch.full((N, 8), -0.02)}
    ),
]


def parts_of(case: Case) -> dict[Role, Tensor]:
    weight_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.02
    codec = ENCODINGS.load(case.encoding)
    assert codec.encode is not None
    recipe = Recipe(granularity=case.granularity, group=case.group)
    return {**codec.encode(weight_NK, case.written, recipe), **case.extra}


def product(case: Case, parts: dict[Role, Tensor], x_MK: Tensor) -> Tensor:
    spec = Spec(encoding=case.written, shape_NK=(N, K), roles=frozenset(parts))
    kernel = KERNELS.load(case.kernel)
    assert refusal(kernel, spec, CPU) is None
    return kernel.build(spec)(x_MK, parts)


def truth(case: Case, parts: dict[Role, Tensor], x_MK: Tensor) -> Tensor:
    decode = ENCODINGS.load(case.encoding).decode
    return x_MK.double() @ decode(parts, case.written, (N, K)).double().T


def error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.bfloat16, LIMIT), (torch.float32, 1e-5), (torch.float16, 1e-3)],
    ids=str,
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_multiplies_by_the_weight_the_codec_defines(
    case: Case, dtype: torch.dtype, limit: float
) -> None:
    x_MK = torch.randn(9, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    parts = parts_of(case)
    found = product(case, parts, x_MK)
    assert found.dtype == dtype
    assert error(found, truth(case, parts, x_MK)) < limit


@pytest.mark.parametrize("case", CASES, ids=str)
def test_wrong_codes_and_wrong_scales_are_far_off(case: Case) -> None:
    x_MK = torch.randn(9, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    parts = parts_of(case)
    true = truth(case, parts, x_MK)
    swapped = parts[Role.CODES].view(torch.uint8)
    swapped = (swapped << 4 | swapped >> 4).view(parts[Role.CODES].dtype)
    assert error(product(case, {**parts, Role.CODES: swapped}, x_MK), true) > 10 * LIMIT
    for role in (Role.BLOCK_SCALE, Role.CHANNEL_SCALE):
        if role in parts:
            moved = parts[role][torch.arange(len(parts[role])) - 1]
            assert error(product(case, {**parts, role: moved}, x_MK), true) > 2 * LIMIT


def test_a_weight_held_as_fp8_is_left_to_the_reference() -> None:
    roles = frozenset({Role.CODES, Role.BLOCK_SCALE, Role.TENSOR_SCALE})
    spec = Spec(encoding=Encoding("int4"), shape_NK=(N, K), roles=roles)
    assert refusal(KERNELS.load("cpu_int4"), spec, CPU) == "cannot apply tensor_scale"


def test_a_larger_layer_before_does_not_show_in_the_next() -> None:
    case = CASES[10]
    x_MK = torch.ones(1, K, dtype=torch.bfloat16)
    first = product(case, parts_of(case), x_MK)
    for other in CASES:
        product(other, parts_of(other), x_MK)
    assert torch.equal(product(case, parts_of(case), x_MK), first)


def test_threads_have_scratch_of_their_own_and_do_not_disturb_each_other() -> None:
    x_MK = torch.randn(65, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    parts = [parts_of(case) for case in CASES]
    alone = [product(*each, x_MK) for each in zip(CASES, parts, strict=True)]
    start = Barrier(4)

    def work(_: int) -> tuple[int, list[Tensor]]:
        start.wait()
        place = _cpu.buffer("whole", 8, torch.bfloat16).data_ptr()
        pairs = zip(CASES, parts, strict=True)
        return place, [product(case, held, x_MK) for case, held in pairs for _ in range(3)]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(work, range(4)))
    assert len({place for place, _ in found}) == 4
    for _, products in found:
        pairs = zip(products, (each for each in alone for _ in range(3)), strict=True)
        assert all(torch.equal(own, wanted) for own, wanted in pairs)


@pytest.mark.parametrize("name", sorted({case.kernel for case in CASES}))
def test_a_call_after_one_in_inference_mode_works(name: str) -> None:
    case = next(case for case in CASES if case.kernel == name)
    parts, x_MK = parts_of(case), torch.ones(1, K, dtype=torch.bfloat16)
    _cpu._scratch.__dict__.clear()
    with torch.inference_mode():
        before = product(case, parts, x_MK)
    assert torch.equal(product(case, parts, x_MK), before)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_columns_that_do_not_fill_their_groups_are_decoded_too(name: str) -> None:
    n, k = 40, 24
    encode = ENCODINGS.load(name).encode
    assert encode is not None
    parts = encode(torch.randn(n, k), Encoding(name), Recipe(granularity="group"))
    x_MK = torch.randn(3, k, generator=torch.Generator().manual_seed(2)).bfloat16()
    spec = Spec(encoding=Encoding(name), shape_NK=(n, k), roles=frozenset(parts))
    found = KERNELS.load(f"cpu_{name}").build(spec)(x_MK, parts)
    true = x_MK.double() @ ENCODINGS.load(name).decode(parts, Encoding(name), (n, k)).double().T
    assert error(found, true) < LIMIT


def test_powers_far_apart_keep_the_small_ones() -> None:
    weight_NK = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    weight_NK[::2] *= 2.0**-100
    parts = ENCODINGS.load("mxfp8").encode(
        weight_NK, Encoding("mxfp8"), Recipe(granularity="group")
    )  # type: ignore[misc]
    spec = Spec(encoding=Encoding("mxfp8"), shape_NK=(64, 64), roles=frozenset(parts))
    found = KERNELS.load("cpu_mxfp8").build(spec)(torch.eye(64).bfloat16(), parts).T
    true = ENCODINGS.load("mxfp8").decode(parts, Encoding("mxfp8"), (64, 64))
    assert torch.equal(found[::2].float(), true[::2])


def test_mapped_codes_at_an_odd_offset_are_read() -> None:
    case = next(case for case in CASES if case.kernel == "cpu_nvfp4")
    parts, x_MK = parts_of(case), torch.ones(2, K, dtype=torch.bfloat16)
    codes = parts[Role.CODES]
    moved = torch.cat([codes.new_zeros(1), codes.reshape(-1)])[1:].view(codes.shape)
    assert moved.storage_offset() == 1
    assert torch.equal(
        product(case, {**parts, Role.CODES: moved}, x_MK), product(case, parts, x_MK)
    )


def int8_spec(granularity: str, mode: str, parts: dict[Role, Tensor]) -> Spec:
    activation = Activation(number="int8", granularity=granularity, mode=mode)  # type: ignore[arg-type]
    return Spec(
        encoding=Encoding("int8"), shape_NK=(N, K), roles=frozenset(parts), activation=activation
    )


@pytest.mark.parametrize(
    ("granularity", "mode"), [("token", "dynamic"), ("tensor", "dynamic"), ("tensor", "static")]
)
def test_products_of_integers_are_what_faithful_numerics_predict(
    granularity: str, mode: str
) -> None:
    parts = parts_of(Case("cpu_int8_w8a8", "int8", "channel"))
    if mode == "static":
        parts[Role.INPUT_SCALE] = torch.tensor(0.02)
    x_MK = torch.randn(300, K, generator=torch.Generator().manual_seed(4))
    x_MK[7] = 0
    spec = int8_spec(granularity, mode, parts)
    wanted = KERNELS.load("reference").build(spec)(x_MK, parts)
    found = KERNELS.load("cpu_int8_w8a8").build(spec)(x_MK, parts)
    assert error(found, wanted.double()) < 1e-5
    other = KERNELS.load("cpu_int8_w8a8").build(int8_spec("tensor", "dynamic", parts))
    moved = other(
        x_MK * torch.arange(1, 301)[:, None], {**parts, Role.INPUT_SCALE: torch.tensor(1.0)}
    )
    assert error(moved, wanted.double()) > LIMIT


def test_int8_inputs_are_asked_for_by_name_and_by_the_file() -> None:
    parts = parts_of(Case("cpu_int8_w8a8", "int8", "channel"))
    kernel = KERNELS.load("cpu_int8_w8a8")
    assert kernel.opt_in
    assert refusal(kernel, int8_spec("token", "dynamic", parts), CPU) is None
    weight_only = Spec(encoding=Encoding("int8"), shape_NK=(N, K), roles=frozenset(parts))
    assert "weight-only is wanted" in (refusal(kernel, weight_only, CPU) or "")


def test_int8_inputs_lose_what_the_docstring_says() -> None:
    parts = parts_of(Case("cpu_int8_w8a8", "int8", "channel"))
    multiply = KERNELS.load("cpu_int8_w8a8").build(int8_spec("token", "dynamic", parts))
    x_MK = torch.randn(64, K, generator=torch.Generator().manual_seed(5))
    case = Case("cpu_int8", "int8", "channel")
    assert 0.004 < error(multiply(x_MK, parts), truth(case, parts, x_MK)) < 0.015
    x_MK[:, ::100] *= 30
    assert 0.02 < error(multiply(x_MK, parts), truth(case, parts, x_MK)) < 0.1


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_no_tokens_give_no_rows(case: Case) -> None:
    parts = parts_of(case)
    assert product(case, parts, torch.empty(0, K, dtype=torch.bfloat16)).shape == (0, N)
