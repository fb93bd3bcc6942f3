"""Before anything is served: one layer per encoding through the real kernel, beside `reference`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffquant.errors import KernelError
from diffquant.kernels import KERNELS, spec_of
from diffquant.linear import QuantLinear
from diffquant.loading import Report

ROWS = 16
#: Relative error (Frobenius). Kernels are held to 3.5e-3; a wrong one is off by a good part of 1.
TOLERANCE = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One layer, and how far its kernel is from the definition of correct."""

    component: str
    path: str
    encoding: str
    kernel: str
    relative_error: float

    @property
    def ok(self) -> bool:
        # A NaN is not smaller than anything.
        return self.relative_error <= TOLERANCE


def checks(pipeline: Any, report: Report) -> tuple[Check, ...]:
    """One per encoding and kernel, on the smallest layer that has them."""
    return tuple(
        Check(
            component=component,
            path=path,
            encoding=_encoding(layer),
            kernel=kernel,
            relative_error=relative_error(layer, activations),
        )
        for component in report.plans
        for path, layer, kernel, activations in _samples(
            pipeline.components[component], report, component
        )
    )


def require_agreement(found: tuple[Check, ...]) -> None:
    """Raise KernelError for a kernel that does not do what `reference` does."""
    for check in found:
        if not check.ok:
            raise KernelError(
                f"{check.kernel} multiplies {check.component}.{check.path} ({check.encoding}) "
                f"{check.relative_error:.3g} away from reference, at most {TOLERANCE:g} is right",
                hint="--kernel reference is slow and right",
            )


def relative_error(layer: QuantLinear, activations: tuple[Any, ...]) -> float:
    """Of the layer as it runs, against the same layer through `reference`.

    activations  the quantization of the input that was chosen for each piece
    """
    example = next(layer.buffers())
    noise = torch.Generator("cpu").manual_seed(0)
    x_MK = torch.randn(ROWS, layer.in_features, generator=noise)
    x_MK = x_MK.to(example.device, layer.weight.dtype)
    with torch.inference_mode():
        wanted = _referenced(layer, activations)(x_MK).double()
        return float((layer(x_MK).double() - wanted).norm() / wanted.norm())


def _referenced(layer: QuantLinear, activations: tuple[Any, ...]) -> QuantLinear:
    """The layer with the same parts and the reference kernel."""
    build = KERNELS.load("reference").build
    pieces = layer.layer.pieces
    return QuantLinear(
        layer.layer,
        [layer.parts(index) for index in range(len(pieces))],
        [build(spec_of(*each)) for each in zip(pieces, activations, strict=True)],
        bias=layer.bias,
        dtype=layer.weight.dtype,
        float32=True,
    )


def _samples(
    module: nn.Module, report: Report, component: str
) -> Iterator[tuple[str, QuantLinear, str, tuple[Any, ...]]]:
    choices = {choice.path: choice for choice in report.choices[component]}
    smallest: dict[tuple[str, str], tuple[str, QuantLinear]] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, QuantLinear) and path in choices:
            key = _encoding(layer), choices[path].kernel
            held = smallest.get(key)
            if held is None or _size(layer) < _size(held[1]):
                smallest[key] = path, layer
    for (_, kernel), (path, layer) in smallest.items():
        yield path, layer, kernel, tuple(spec.activation for spec in choices[path].specs)


def _encoding(layer: QuantLinear) -> str:
    return " + ".join(dict.fromkeys(str(term.piece.runs_as) for term in layer.terms))


def _size(layer: QuantLinear) -> int:
    return layer.in_features * layer.out_features
