"""Linears of one model in several encodings: the same random weights, made anew for each."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffquant import device as places
from diffquant.device import Device
from diffquant.encodings import ENCODINGS, Recipe
from diffquant.kernels import KERNELS, choose
from diffquant.kernels._operator import multiplier
from diffquant.linear import Holding, QuantLinear
from diffquant.plan import DENSE, LayerPlan, Part, Piece, Role, Span, TensorRef
from diffquant.schemes import SCHEMES, Scheme


@dataclass(frozen=True, slots=True)
class Method:
    """How linears are stored and multiplied.

    scheme  of ours, by name; None: bf16
    kernel  that is demanded on a GPU; None: the best one
    theirs  bf16 linear -> another library's
    """

    scheme: str | None = None
    kernel: str | None = None
    theirs: Callable[[nn.Linear], nn.Module] | None = None


def torchao_fp8(linear: nn.Linear) -> nn.Module:
    """torchao's FP8 with one scale per row of weight and input."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    model = nn.Sequential(linear)
    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return model[0]


def here() -> Device:
    """The first GPU, as torch sees it: a container need not show its driver's library. Else the CPU."""
    if not torch.cuda.is_available():
        return places.parse("cpu")
    major, minor = torch.cuda.get_device_capability()
    return Device(
        kind="cuda",
        arch=f"sm{major}{minor}",
        name=torch.cuda.get_device_name(),
        sm=10 * major + minor,
        memory=torch.cuda.get_device_properties(0).total_memory,
        packages=places.installed_packages(),
    )


def dense(path: str, n: int, k: int, device: torch.device) -> Tensor:
    """The bf16 weight [N, K] of that path."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(path.encode()))
    weight = torch.empty(n, k, device=device, dtype=torch.bfloat16)
    return weight.normal_(std=k**-0.5, generator=generator)


def made(method: Method, path: str, n: int, k: int, place: Device) -> nn.Module:
    """The linear of that path without bias, on the device."""
    weight = dense(path, n, k, torch.device(place.kind))
    if method.scheme is not None:
        demanded = method.kernel if place.kind == "cuda" else None
        return encoded(SCHEMES.load(method.scheme), demanded, path, weight, place)
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear if method.theirs is None else method.theirs(linear)


def encoded(
    scheme: Scheme, demanded: str | None, path: str, weight: Tensor, place: Device
) -> QuantLinear:
    """The weight as the scheme encodes it, behind the kernel that multiplies it on the device."""
    parts = _parts(scheme, weight.float())
    n, k = weight.shape
    piece = Piece(
        encoding=scheme.encoding,
        stored_NK=(n, k),
        parts=tuple(Part(role, TensorRef(0, role)) for role in parts),
        out=Span(0, n),
        cols=Span(0, k),
        activation=scheme.activation,
        lowrank_input="raw" if scheme.rank else None,
    )
    layer = LayerPlan(path=path, shape_NK=(n, k), pieces=(piece,), dtype="bfloat16", why="random")
    choice = choose(layer, place, kernel=demanded)
    fuses = KERNELS.load(choice.kernel).fuses
    return QuantLinear(
        layer,
        [parts],
        [multiplier(choice.kernel, choice.specs[0])],
        bias=None,
        dtype=torch.bfloat16,
        float32=KERNELS.load(choice.kernel).float32,
        holdings=[Holding(fuses)],
    )


def _parts(scheme: Scheme, weight_NK: Tensor) -> dict[Role, Tensor]:
    """Codes and scales, and a low-rank branch where the scheme has one."""
    low: dict[Role, Tensor] = {}
    if scheme.rank:
        u, s, v = torch.svd_lowrank(weight_NK, q=scheme.rank)
        low = {Role.LOWRANK_UP: (u * s).bfloat16(), Role.LOWRANK_DOWN: v.T.bfloat16().contiguous()}
        weight_NK = weight_NK - low[Role.LOWRANK_UP].float() @ low[Role.LOWRANK_DOWN].float()
    codec = ENCODINGS.load(scheme.encoding.name)
    assert codec.encode is not None and scheme.encoding != DENSE
    recipe = Recipe(granularity=scheme.granularity, group=scheme.group)
    parts = codec.encode(weight_NK, scheme.encoding, recipe)
    if scheme.scale_dtype == "bfloat16" and parts[Role.BLOCK_SCALE].element_size() == 4:
        parts[Role.BLOCK_SCALE] = parts[Role.BLOCK_SCALE].bfloat16()
    return {**parts, **low}
