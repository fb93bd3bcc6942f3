"""What every kernel promises. A new file in `kernels/` is tested on arrival.

Products are judged against `reference`, the definition of correct, on every ragged shape and extreme
scale that a kernel's own needs admit on a CPU. Kernels for other devices promise only their words here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffquant import device
from diffquant.encodings import ENCODINGS, Granularity, Recipe
from diffquant.errors import PlanError
from diffquant.kernels import KERNEL_ROLES, KERNELS, WEIGHT_ONLY, Kernel, Spec, refusal
from diffquant.plan import Activation, Encoding, Options, Role

NAMES = KERNELS.names()
CPU = device.parse("cpu")
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "channel", "group", "block")
#: M, N, K: one token and more than one decoded chunk, tiles, ragged groups, nothing even, many tokens.
SHAPES = ((1, 1100, 1536), (16, 32, 128), (9, 24, 160), (33, 7, 96), (130, 272, 64))
#: Weights' size, and how much smaller every other row is, so that scales and codes reach their ends.
MAGNITUDES = ((1.0, 1.0), (3e4, 1e-4), (2e-6, 1e-3))
LIMIT = 3.5e-3


@dataclass(frozen=True, slots=True)
class Case:
    """One encoded weight, the spec a kernel is built for, and an input [M, K]."""

    spec: Spec
    parts: dict[Role, Tensor]
    x_MK: Tensor


def weight(shape_NK: tuple[int, int], size: float, smaller: float) -> Tensor:
    """Normal numbers of that size, every other row smaller and one row all zero."""
    n, k = shape_NK
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) * size
    values[1::2] *= smaller
    values[n // 2] = 0
    return values


def encoded(
    name: str, grain: Granularity, values: Tensor, columns: int = 32
) -> dict[Role, Tensor] | None:
    """The values in that encoding, or None where it has no scales of that granularity."""
    codec, sizes = ENCODINGS.load(name), {"group": columns, "block": 128}
    scale = {"tensor": Role.TENSOR_SCALE, "channel": Role.CHANNEL_SCALE}.get(
        grain, Role.BLOCK_SCALE
    )
    if codec.encode is None or (codec.group is not None and grain != "group"):
        return None
    group = codec.group or sizes.get(grain)
    parts = codec.encode(values, Encoding(name), Recipe(granularity=grain, group=group))
    dense = codec.scales == (frozenset(),) and grain == "tensor"
    return parts if dense or (scale in parts and decodes(name, parts, values)) else None


def decodes(name: str, parts: dict[Role, Tensor], values: Tensor) -> bool:
    """Whether the encoding reads what it wrote: int4 has groups and no two-dimensional blocks."""
    try:
        ENCODINGS.load(name).decode(parts, Encoding(name), (values.shape[0], values.shape[1]))
    except PlanError:
        return False
    return True


def cases(kernel_name: str, dtype: torch.dtype) -> Iterator[Case]:
    """Everything the kernel's needs admit on a CPU: weight-only, or with the inputs it quantizes."""
    kernel = KERNELS.load(kernel_name)
    for activation in activations(kernel):
        yield from cases_with(kernel, activation, dtype)


def activations(kernel: Kernel) -> list[Activation | None]:
    """None, or each dynamic one of a kernel that only multiplies quantized inputs."""
    if WEIGHT_ONLY in kernel.needs.activations:
        return [None]
    return [
        spoken(text) for text in sorted(kernel.needs.activations) if "dynamic" in text.split(":")
    ]


def spoken(text: str) -> Activation:
    """The activation that `str` spells so: int4:group64:dynamic:unsigned."""
    number, grain, mode, *marks = text.split(":")
    granularity = grain.rstrip("0123456789")
    return Activation(
        number=number,
        granularity=granularity,  # type: ignore[arg-type]
        group=int(grain.removeprefix("group")) if granularity != grain else None,
        mode=mode,  # type: ignore[arg-type]
        unsigned="unsigned" in marks,
    )


def spelled(kernel: Kernel) -> Options:
    """The options without which the kernel runs nothing."""
    pairs = (option.partition("=") for option in sorted(kernel.needs.requires))
    return tuple((key, value) for key, _, value in pairs)


def cases_with(kernel: Kernel, activation: Activation | None, dtype: torch.dtype) -> Iterator[Case]:
    for encoding in sorted(kernel.needs.encodings or ENCODINGS.names()):
        for grain in GRANULARITIES:
            for m, n, k in SHAPES:
                for size, smaller in MAGNITUDES:
                    group = activation.group if activation and activation.group else 32
                    parts = encoded(encoding, grain, weight((n, k), size, smaller), group)
                    if parts is None:
                        continue
                    roles = frozenset(parts) & KERNEL_ROLES
                    spec = Spec(
                        encoding=Encoding(encoding, spelled(kernel)),
                        shape_NK=(n, k),
                        roles=roles,
                        activation=activation,
                    )
                    if refusal(kernel, spec, CPU) is None:
                        x_MK = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
                        yield Case(spec, parts, x_MK.to(dtype))


def error(kernel: str, case: Case, parts: dict[Role, Tensor]) -> float:
    """Relative distance of the kernel's product with `parts` from the reference with the case's."""
    ours = KERNELS.load(kernel).build(case.spec)(case.x_MK, parts)
    wanted = KERNELS.load("reference").build(case.spec)(case.x_MK.float(), case.parts)
    assert ours.dtype == case.x_MK.dtype or KERNELS.load(kernel).float32
    assert ours.shape == wanted.shape
    return float((ours.double() - wanted.double()).norm() / wanted.double().norm())


def on_cpu(name: str) -> bool:
    needs = KERNELS.load(name).needs
    return not needs.devices or "cpu" in needs.devices


RUNNABLE = [name for name in NAMES if on_cpu(name) and name != "reference"]
QUANTIZED = [name for name in RUNNABLE if name != "dense"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", RUNNABLE)
def test_it_agrees_with_the_reference_on_ragged_shapes_and_extreme_scales(
    name: str, dtype: torch.dtype
) -> None:
    errors = {f"{case.spec}": error(name, case, case.parts) for case in cases(name, dtype)}
    assert errors, "its needs admit nothing on a CPU"
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= LIMIT, worst


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_scale_that_is_off_by_a_percent_would_be_seen(name: str) -> None:
    seen = 0
    for case in cases(name, torch.float32):
        for role in (Role.TENSOR_SCALE, Role.CHANNEL_SCALE):
            if role in case.parts:
                off = case.parts | {role: case.parts[role].float() * 1.01}
                assert error(name, case, off) > LIMIT
                seen += 1
    # ggml's blocks hold their scales among the codes.
    block_only = {Role.BLOCK_SCALE} >= {
        role for case in cases(name, torch.float32) for role in case.spec.roles if "scale" in role
    }
    assert seen or block_only


@pytest.mark.parametrize("name", QUANTIZED)
def test_codes_of_neighbouring_columns_exchanged_would_be_seen(name: str) -> None:
    for case in cases(name, torch.float32):
        codes = case.parts[Role.CODES]
        moved = codes.view(torch.uint8).roll(1, 1).view(codes.dtype)
        # Not a number where bytes of a code became those of a scale: seen as well.
        assert not error(name, case, case.parts | {Role.CODES: moved}) <= LIMIT


@pytest.mark.parametrize("name", RUNNABLE)
def test_its_inputs_are_left_as_they_were(name: str) -> None:
    case = next(cases(name, torch.float32))
    before = {role: part.clone() for role, part in case.parts.items()}, case.x_MK.clone()
    KERNELS.load(name).build(case.spec)(case.x_MK, case.parts)
    assert torch.equal(case.x_MK, before[1])
    for role, part in case.parts.items():
        assert torch.equal(part.float(), before[0][role].float())


@pytest.mark.parametrize("place", ["cpu", "sm80", "sm89", "sm90", "sm100", "sm120"])
@pytest.mark.parametrize("name", NAMES)
def test_every_refusal_is_a_sentence_that_names_what_is_there(name: str, place: str) -> None:
    kernel = KERNELS.load(name)
    told = []
    for encoding in ENCODINGS.names():
        for activation in (None, Activation(number="int8", granularity="token", mode="dynamic")):
            spec = Spec(
                encoding=Encoding(encoding, (("kind", "e5m2"),)),
                shape_NK=(17, 33),
                roles=frozenset({Role.CODES, Role.NESTED_SCALE}),
                activation=activation,
            )
            told.append(refusal(kernel, spec, device.parse(place)))
    for reason in filter(None, told):
        assert re.match(r"[a-z]+ .+[^.]$", reason), reason
    assert any(told) or name in ("reference", "dense")


@pytest.mark.parametrize("name", NAMES)
def test_its_docstring_tells_how_it_multiplies(name: str) -> None:
    module = __import__(f"{KERNELS.package}.{name}", fromlist=["KERNEL"])
    assert len(module.__doc__ or "") > 40


def test_the_reference_is_tried_last_and_never_refuses() -> None:
    ranks = {name: KERNELS.load(name).rank for name in NAMES}
    assert max(ranks, key=ranks.__getitem__) == "reference"
    needs = KERNELS.load("reference").needs
    assert not needs.encodings and not needs.devices and not needs.packages
