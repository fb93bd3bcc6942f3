"""Plan and choices -> the transformer itself, from meta, layer by layer.

Weights are mapped from disk and assigned, not copied, as long as nothing about them has to change.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from diffquant.classes import kept_float32, skeleton, tie
from diffquant.errors import PlanError, UsageError
from diffquant.kernels import KERNELS, Choice, Kernel, Spec
from diffquant.kernels._operator import multiplier
from diffquant.linear import Holding, Multiply, QuantLinear
from diffquant.paging import Keep, Pages, rehome
from diffquant.pieces import bias_of, canonical, plain_value
from diffquant.plan import LayerPlan, Piece, Plan, Role
from diffquant.recode import Encoder
from diffquant.tensors import Passing

Progress = Callable[[int, int], None]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector of cycles, which would look through thousands of new modules again and
    again, and through all there was before, for garbage that loading does not make."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_uncollected()
def materialize(
    plan: Plan,
    choices: Sequence[Choice],
    *,
    device: torch.device,
    dtype: torch.dtype,
    workshop: torch.device | None = None,
    keep: Keep | None = None,
    on_layer: Progress | None = None,
) -> nn.Module:
    """The module of the plan's class on `device`: encoded layers are QuantLinear, the rest is plain.

    dtype     what the model computes in; modules the class keeps in float32 stay there
    workshop  where weights are quantized that are quantized while loading, `device` unless given
    keep      what becomes of every finished tensor, one layer at a time
    on_layer  called with (layers done, layers in all)

    Raises PlanError when a parameter is left without a value.
    """
    model = skeleton(plan.config, dtype)
    weights = Passing([Path(file.path) for file in plan.files])
    wide = kept_float32(model, dtype)
    for plain in plan.plain:
        wanted = torch.float32 if is_kept(plain.name, wide) else dtype
        stored = plain_value(plain, weights)
        value = stored.to(device, wanted if stored.is_floating_point() else stored.dtype)
        _assign(model, plain.name, value if keep is None else keep(value))
    encoder = Encoder(plan, weights)
    by_path = {choice.path: choice for choice in choices}
    for done, layer in enumerate(plan.layers, start=1):
        wanted = torch.float32 if is_kept(layer.path, wide) else dtype
        held = [canonical(piece, weights) for piece in layer.pieces]
        coded = [
            _coded(piece, parts, encoder, workshop or device)
            for piece, parts in zip(layer.pieces, held, strict=True)
        ]
        _place(model, layer, by_path[layer.path], coded, device, wanted)
        if keep is not None:
            rehome(model.get_submodule(layer.path), keep)
        if on_layer is not None:
            on_layer(done, len(plan.layers))
    tie(model)
    _require_filled(model, plan)
    model.save_pretrained = _unsaveable  # type: ignore[assignment]
    return model.requires_grad_(False).eval()


def _coded(
    piece: Piece, parts: dict[Role, Tensor], encoder: Encoder, workshop: torch.device
) -> dict[Role, Tensor]:
    """The parts the piece multiplies with. What they were quantized from leaves host memory."""
    if piece.recode is None:
        return parts
    coded = encoder.parts(piece, {role: part.to(workshop) for role, part in parts.items()})
    Pages(list(parts.values())).release()
    return coded


def _place(
    model: nn.Module,
    layer: LayerPlan,
    choice: Choice,
    parts: Sequence[dict[Role, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Puts one layer into the model: a QuantLinear, or plain weight and bias."""
    bias = bias_of(layer, parts)
    if layer.is_ordinary:
        _assign(model, f"{layer.path}.weight", _whole(layer, parts).to(device, dtype))
        if bias is not None:
            _assign(model, f"{layer.path}.bias", bias.to(device, dtype))
        return
    kernels = [KERNELS.load(name) for name in choice.kernels]
    moved = [
        {role: part.to(device) for role, part in prepared(kernel, spec, held).items()}
        for kernel, spec, held in zip(kernels, choice.specs, parts, strict=True)
    ]
    model.set_submodule(
        layer.path,
        QuantLinear(
            layer,
            moved,
            [_product(choice, index) for index in range(len(layer.pieces))],
            bias=None if bias is None else bias.to(device),
            dtype=dtype,
            float32=any(kernel.float32 for kernel in kernels),
            holdings=[holding(*each) for each in zip(kernels, choice.specs, strict=True)],
        ),
        strict=True,
    )


def prepared(kernel: Kernel, spec: Spec, parts: Mapping[Role, Tensor]) -> Mapping[Role, Tensor]:
    """The parts as the kernel holds them."""
    return parts if kernel.prepare is None else kernel.prepare(parts, spec)


def holding(kernel: Kernel, spec: Spec) -> Holding:
    """What the kernel does beyond its product."""
    restore = kernel.restore
    if restore is None:
        return Holding(kernel.fuses)
    return Holding(kernel.fuses, lambda parts: restore(parts, spec))


def _product(choice: Choice, index: int) -> Multiply:
    """The chosen kernel of one piece, which sees only what kernels see."""
    spec = choice.specs[index]
    return multiplier(choice.kernels[index], spec)


def _whole(layer: LayerPlan, held: Sequence[Mapping[Role, Tensor]]) -> Tensor:
    """The weight of an ordinary layer [N, K]; a single untouched piece is not copied."""
    first = held[0][Role.CODES]
    if len(held) == 1 and first.shape == layer.shape_NK:
        return first
    weight = torch.empty(layer.shape_NK, dtype=first.dtype)
    for piece, parts in zip(layer.pieces, held, strict=True):
        weight[piece.out.as_slice(), piece.cols.as_slice()] = parts[Role.CODES]
    return weight


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def is_kept(name: str, kept: tuple[str, ...]) -> bool:
    """diffusers' own reading of its list: a name is kept when a listed word is one of its segments."""
    return any(word in name.split(".") for word in kept)


def _require_filled(model: nn.Module, plan: Plan) -> None:
    empty = [name for name, value in model.named_parameters() if value.is_meta]
    if empty:
        raise PlanError(
            f"{len(empty)} parameters of {plan.config.get('_class_name')} got no value, first {empty[0]!r}",
            hint="the checkpoint's config.json may describe another model",
        )


def _unsaveable(*_: object, **__: object) -> NoReturn:
    raise UsageError(
        "a loaded quantized transformer cannot be saved: diffusers would write a file that reloads "
        "as random weights",
        hint="keep the original file, or `diffquant convert dequantize SOURCE OUT` for a plain copy",
    )
