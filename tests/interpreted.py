"""A child process that runs our Triton kernels on a CPU: interpreted, or compiled without a GPU.

    TRITON_INTERPRET=1 python tests/interpreted.py errors
    TRITON_INTERPRET=1 python tests/interpreted.py step
    python tests/interpreted.py compiled 90 svdq fp8

Triton decides when it is imported which of the two it does, so that neither can happen in a process
that runs other tests. `errors` prints one JSON record per product; `compiled` one per launch of the
kinds that are named, with what the code for that compute capability multiplies by; `step` how far one
step of the bundled model is from faithful numerics, with our kernels and weight-only.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffquant import kernels
from diffquant.encodings import ENCODINGS, Recipe
from diffquant.kernels import KERNELS, Numerics, Spec, spec_of
from diffquant.linear import Holding, QuantLinear
from diffquant.plan import (
    Activation,
    Encoding,
    LayerPlan,
    Part,
    Piece,
    Role,
    Span,
    TensorRef,
)

#: M, N, K: one token, tiles that are not full, a ragged group, more than one tile each way.
SHAPES = ((1, 100, 192), (9, 24, 160), (33, 7, 64), (70, 130, 128))
#: cuBLAS asks for multiples of 16.
EVEN = ((1, 112, 192), (9, 32, 160), (70, 144, 128))
#: Weights' size, and how much smaller every other row is: scales and codes reach their ends.
MAGNITUDES = ((1.0, 1.0), (3e4, 1e-4), (2e-6, 1e-3))
DTYPES = (torch.float32, torch.float16)
#: Rows of the input, weights' size and dtype of the products that are made wrong as well.
CONTROLLED = (70, 1.0, torch.float32)
SMALLEST = 1e-30
#: Few and many, which take other tiles.
TOKENS = (8, 1024)
INT4 = Activation(number="int4", granularity="group", group=64, mode="dynamic")
FP8 = Activation(number="fp8", granularity="token", mode="dynamic")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kernel, an encoding it multiplies, and how weights come to be so encoded."""

    kernel: str
    encoding: Encoding
    recipe: Recipe
    activation: Activation | None = None
    zero: str | None = None
    multiple_of_K: int = 1
    shapes: tuple[tuple[int, int, int], ...] = SHAPES


def options(name: str, **known: str) -> Encoding:
    return Encoding(name, tuple(sorted(known.items())))


GROUPED = {group: Recipe(granularity="group", group=group) for group in (16, 32, 64)}
TENSOR, CHANNEL = Recipe(granularity="tensor"), Recipe(granularity="channel")
BLOCK = Recipe(granularity="block", group=128)
KINDS = {
    "nvfp4": Kind(kernel="triton_nvfp4", encoding=options("nvfp4"), recipe=GROUPED[16]),
    "nvfp4 inverse": Kind(
        kernel="triton_nvfp4", encoding=options("nvfp4", tensor_scale="divide"), recipe=GROUPED[16]
    ),
    "nvfp4 of Nunchaku": Kind(
        kernel="triton_nvfp4", encoding=options("nvfp4", outer="none"), recipe=GROUPED[16]
    ),
    "mxfp4": Kind(kernel="triton_mxfp4", encoding=options("mxfp4"), recipe=GROUPED[32]),
    "mxfp8": Kind(kernel="triton_mxfp8", encoding=options("mxfp8"), recipe=GROUPED[32]),
    "int4": Kind(kernel="triton_int4", encoding=options("int4"), recipe=GROUPED[32]),
    "int4 per row": Kind(kernel="triton_int4", encoding=options("int4"), recipe=CHANNEL),
    "int4 less a zero": Kind(
        kernel="triton_int4",
        encoding=options("int4", signed="false"),
        recipe=replace(GROUPED[32], unsigned=True),
        zero="group",
    ),
    "int4 less a zero per row": Kind(
        kernel="triton_int4",
        encoding=options("int4", signed="offset"),
        recipe=GROUPED[32],
        zero="row",
    ),
    "int4 and a zero": Kind(
        kernel="triton_int4",
        encoding=options("int4", signed="false", zero="scaled", group="64"),
        recipe=GROUPED[64],
        multiple_of_K=64,
    ),
    "fp8": Kind(kernel="triton_fp8", encoding=options("fp8"), recipe=TENSOR),
    "fp8 in blocks": Kind(kernel="triton_fp8", encoding=options("fp8"), recipe=BLOCK),
    "int8": Kind(kernel="triton_int8", encoding=options("int8"), recipe=CHANNEL, zero="row"),
    "int8 in blocks": Kind(kernel="triton_int8", encoding=options("int8"), recipe=BLOCK),
    "fp8 w8a8": Kind(
        kernel="triton_fp8_w8a8", encoding=options("fp8"), recipe=CHANNEL, activation=FP8
    ),
    "fp8 w8a8 static": Kind(
        kernel="triton_fp8_w8a8",
        encoding=options("fp8"),
        recipe=TENSOR,
        activation=replace(FP8, granularity="tensor", mode="static"),
    ),
    "fp8 by cuBLAS": Kind(
        kernel="triton_scaled_mm",
        encoding=options("fp8"),
        recipe=CHANNEL,
        activation=FP8,
        shapes=EVEN,
    ),
    "fp8 by cuBLAS, one scale": Kind(
        kernel="triton_scaled_mm",
        encoding=options("fp8"),
        recipe=TENSOR,
        activation=replace(FP8, granularity="tensor"),
        shapes=EVEN,
    ),
    "svdq": Kind(
        kernel="triton_svdq",
        encoding=options("int4", group="64"),
        recipe=GROUPED[64],
        activation=INT4,
        multiple_of_K=64,
    ),
    "svdq behind GELU": Kind(
        kernel="triton_svdq",
        encoding=options("int4", group="64"),
        recipe=GROUPED[64],
        activation=replace(INT4, unsigned=True),
        multiple_of_K=64,
    ),
}


def weight(shape_NK: tuple[int, int], size: float, smaller: float) -> Tensor:
    """Normal numbers of that size, every other row smaller and one row all zero."""
    values = torch.randn(shape_NK, generator=torch.Generator().manual_seed(sum(shape_NK))) * size
    values[1::2] *= smaller
    values[shape_NK[0] // 2] = 0
    return values


def encoded(kind: Kind, values: Tensor, x_MK: Tensor) -> tuple[Spec, dict[Role, Tensor]]:
    """The weight, and what else the kernel reads."""
    codec = ENCODINGS.load(kind.encoding.name)
    assert codec.encode is not None
    parts = dict(codec.encode(values, kind.encoding, kind.recipe))
    if kind.zero is not None:
        shape = parts[Role.BLOCK_SCALE].shape if kind.zero == "group" else values.shape[:1]
        zero = torch.randint(0, 8, shape, generator=torch.Generator().manual_seed(0))
        parts[Role.ZERO_POINT] = zero.float()
    if kind.activation is not None and kind.activation.mode == "static":
        parts[Role.INPUT_SCALE] = x_MK.abs().max().float() / 448
    spec = Spec(
        encoding=kind.encoding,
        shape_NK=(values.shape[0], values.shape[1]),
        roles=frozenset(parts),
        activation=kind.activation,
    )
    return spec, parts


def off(role: Role, part: Tensor) -> Tensor:
    """The part as it must not be: bytes of the column before, scales 2 % and zeros half a step off."""
    if part.element_size() == 1:
        return part.view(torch.uint8).roll(1, -1).view(part.dtype)
    return part * 1.02 if role is not Role.ZERO_POINT else part + 0.5


def products(kind: Kind) -> Iterator[tuple[Spec, dict[Role, Tensor], Tensor, float]]:
    """Spec, parts, input and the size of the weight's numbers, over the grid."""
    for m, n, k in kind.shapes:
        if k % kind.multiple_of_K:
            continue
        for size, smaller in MAGNITUDES:
            for dtype in DTYPES[: 2 if size == 1 else 1]:
                x_MK = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
                yield *encoded(kind, weight((n, k), size, smaller), x_MK), x_MK, size


def records(name: str, kind: Kind) -> Iterator[dict[str, Any]]:
    """The error of every product of the kind, and of one with each part wrong."""
    for spec, parts, x_MK, size in products(kind):
        wanted = KERNELS.load("reference").build(spec)(x_MK.float(), parts).double()
        product = KERNELS.load(kind.kernel).build(spec)
        wrong = list(parts) if (len(x_MK), size, x_MK.dtype) == CONTROLLED else []
        for role in [None, *wrong]:
            held = parts if role is None else parts | {role: off(role, parts[role])}
            ours = product(x_MK, held)
            assert ours.dtype == x_MK.dtype
            lost = (ours.double() - wanted).norm() / wanted.norm().clamp_min(SMALLEST)
            told = {"kind": name, "kernel": kind.kernel, "wrong": role, "size": size}
            yield told | {"of": f"{[len(x_MK), *spec.shape_NK]}", "error": float(lost)}


def errors() -> Iterator[dict[str, Any]]:
    for name, kind in KINDS.items():
        yield from records(name, kind)
    yield from layers("svdq")
    yield from layers("svdq behind GELU")


def layers(name: str) -> Iterator[dict[str, Any]]:
    """Whole linears of SVDQuant: the shift, smoothing, raw low rank and bias around the product."""
    kind, shape = KINDS[name], (100, 192)
    assert kind.activation is not None
    x_MK = torch.randn(40, shape[1], generator=torch.Generator().manual_seed(0))
    _, parts = encoded(kind, weight(shape, 1.0, 1.0), x_MK)
    parts |= {
        Role.SMOOTH: torch.rand(shape[1]) + 0.5,
        Role.LOWRANK_DOWN: torch.randn(48, shape[1]) / 4,
        Role.LOWRANK_UP: torch.randn(shape[0], 48) / 4,
    }
    wanted = linear("reference", kind, shape, parts)(x_MK).double()
    for wrong in (None, Role.SMOOTH, Role.LOWRANK_DOWN, Role.LOWRANK_UP):
        held = parts if wrong is None else parts | {wrong: parts[wrong].roll(1, 0)}
        lost = (linear(kind.kernel, kind, shape, held)(x_MK).double() - wanted).norm()
        told = {"kind": f"{name}, linear", "kernel": kind.kernel, "wrong": wrong}
        yield told | {"of": f"{shape}", "error": float(lost / wanted.norm())}


def linear(
    name: str,
    kind: Kind,
    shape_NK: tuple[int, int],
    parts: dict[Role, Tensor],
    dtype: torch.dtype = torch.float32,
) -> QuantLinear:
    """The layer as a kernel multiplies it, in a model of that dtype."""
    assert kind.activation is not None
    piece = Piece(
        encoding=kind.encoding,
        stored_NK=shape_NK,
        parts=tuple(Part(role, TensorRef(0, role)) for role in parts),
        out=Span(0, shape_NK[0]),
        cols=Span(0, shape_NK[1]),
        activation=kind.activation,
        smooth="divide",
        shift=0.171875 if kind.activation.unsigned else 0.0,
        lowrank_input="raw",
    )
    layer = LayerPlan(path="it", shape_NK=shape_NK, pieces=(piece,), dtype="float32", why="a test")
    kernel = KERNELS.load(name)
    return QuantLinear(
        layer,
        [parts],
        [kernel.build(spec_of(piece, kind.activation, kernel.fuses))],
        bias=torch.arange(shape_NK[0], device=parts[Role.CODES].device) / shape_NK[0],
        dtype=dtype,
        float32=kernel.float32,
        holdings=[Holding(kernel.fuses)],
    )


def step() -> Iterator[dict[str, Any]]:
    """SVDQuant INT4 as Hopper would run it, modulations included."""
    wanted = drawn("faithful")
    ways: tuple[Numerics, ...] = ("weight-only", "auto")
    for way in ways:
        if way == "auto":
            for name in ("triton_svdq", "triton_int4"):
                module = sys.modules[f"{KERNELS.package}.{name}"]
                needs = replace(module.KERNEL.needs, devices=frozenset({"cpu"}), sm=None)
                module.KERNEL = replace(module.KERNEL, needs=needs)  # type: ignore[attr-defined]
            kernels._everybody.cache_clear()
        lost = (drawn(way) - wanted).norm() / wanted.norm()
        yield {"numerics": way, "error": float(lost)}


def drawn(numerics: Numerics) -> Tensor:
    """One step of the bundled model, its weights quantized while loading."""
    import diffquant
    from diffquant import run

    pipeline = diffquant.load(
        model_path="emoji_flux",
        quantization="svdq_int4",
        numerics=numerics,
        dtype="float32",
        device="cpu",
    )
    sizes = {"num_inference_steps": 1, "height": 64, "width": 64, "max_sequence_length": 16}
    asked = run.fill(run.Request(prompt="red apple"), pipeline, sizes)
    return run.draw(pipeline, asked, lambda *_: {}).double()


def compiled(sm: int, *names: str) -> Iterator[dict[str, Any]]:
    """Each launch of these kinds for few and for many tokens of bf16."""
    launches = for_hardware(sm)
    for name, kind in ((name, KINDS[name]) for name in names):
        for m in TOKENS:
            x_MK = torch.randn(m, 128).bfloat16()
            spec, parts = encoded(kind, torch.randn(96, 128), x_MK)
            KERNELS.load(kind.kernel).build(spec)(x_MK, parts)
            for made in launches:
                yield {"kind": name, "kernel": kind.kernel, "tokens": m, **made}
            launches.clear()


def for_hardware(sm: int) -> list[dict[str, Any]]:
    """Makes every launch a compilation for that capability, told in the list, that runs nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", sm, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

    told: list[dict[str, Any]] = []

    def launch(function: Any, grid: Any) -> Any:
        def compile(*arguments: Any, **constants: Any) -> None:
            made = function.warmup(*arguments, grid=grid, **constants)
            words = ("wgmma.mma_async", "mma.sync", "bf16", "e4m3", ".s8")
            found = {word: made.asm["ptx"].count(word) for word in words}
            told.append({"launch": function.__name__, "shared": made.metadata.shared, **found})

        return compile

    driver.set_active(Driver())
    JITFunction.__getitem__ = launch
    return told


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    tasks: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "errors": errors,
        "step": step,
        "compiled": lambda: compiled(int(sys.argv[2]), *sys.argv[3:]),
    }
    for found in tasks[sys.argv[1]]():
        sys.stdout.write(json.dumps(found) + "\n")
