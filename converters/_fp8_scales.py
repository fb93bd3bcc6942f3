"""Per-tensor FP8 scales of a transformer, wherever they are written down.

Per layer: beside stored FP8 codes, else in the `_amax` buffers of backbone.pt, else in those of a
native save; for plain weights in the weights themselves and a calibration file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 - raised by torch.load(weights_only=True)

import torch
from torch import Tensor

from diffquant.converters._component import Component
from diffquant.converters._inputs import amax
from diffquant.converters._options import Calibration
from diffquant.errors import ConvertError, UsageError

FP8 = "F8_E4M3"

#: Leaves that no per-tensor FP8 file has: their layers mean something else than codes * scale.
FOREIGN = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b", "weight_scale_2")


@dataclass(frozen=True, slots=True)
class Scales:
    """Scales of one layer, float32 (1,). `weight` is called when it is needed: it may read it."""

    weight: Callable[[], Tensor]
    input: Tensor | None


def source_and_scales(
    export: str | None,
    backbone: Path | None,
    from_bf16: str | None,
    calibration: Calibration,
    maxbound: float,
    *,
    dry_run: bool = False,
) -> tuple[Component, dict[str, Scales]]:
    """The component to convert, and the scales known for its layers."""
    if (export is None) == (from_bf16 is None):
        raise UsageError("one source is needed", hint="--modelopt-hf-dir DIR, or --from-bf16 DIR")
    if from_bf16 is not None:
        if backbone is not None:
            raise UsageError(
                "--modelopt-backbone-ckpt belongs to an export, not to --from-bf16",
                hint="--calibration FILE gives input scales to plain weights",
            )
        plain = Component.open(from_bf16, fresh=True)
        _require_unquantized(plain)
        seen = amax(calibration, from_bf16, plain.modules(), dry_run=dry_run)
        return plain, _measured(plain, seen, maxbound)
    if calibration != Calibration():
        raise UsageError("calibration goes with --from-bf16; an export has its own scales")
    component = Component.open(str(export))
    _require_fp8(component)
    buffers = {name: component.tensor for name in component.header.tensors if "_amax" in name}
    known = _from_amax({name: read(name) for name, read in buffers.items()}, maxbound)
    if backbone is not None:
        known |= _from_amax(_backbone(backbone), maxbound)
    known |= _beside_codes(component)
    if not known:
        raise ConvertError(
            f"{str(component.root)!r} holds no FP8 scales: an exporter of 0.44 or older left the "
            "weights as they were",
            hint="--modelopt-backbone-ckpt backbone.pt has them, or use --from-bf16",
        )
    return component, known


def _require_fp8(component: Component) -> None:
    block = component.declaration
    algorithm = block.get("quant_algo") or "FP8"
    native = any("_quantizer._amax" in name for name in component.header.tensors)
    if block.get("quant_method") != "modelopt" and not native:
        raise ConvertError(
            f"{str(component.root)!r} is no ModelOpt export: its config.json says quant_method "
            f"{block.get('quant_method')!r}",
            hint="--from-bf16 quantizes plain weights",
        )
    foreign = [name for name in component.header.tensors if name.endswith(FOREIGN)]
    if algorithm != "FP8" or foreign:
        raise ConvertError(
            f"per-tensor FP8 was needed, {str(component.root)!r} is "
            f"{algorithm if algorithm != 'FP8' else f'something with {foreign[0]!r}'}",
            hint="diffquant loads it as it is: --transformer-path",
        )


def _require_unquantized(component: Component) -> None:
    low = [name for name, each in component.header.tensors.items() if each.dtype == FP8]
    if low or component.declaration.get("quant_algo"):
        first = low[0] if low else "its config.json"
        raise ConvertError(
            f"--from-bf16 needs plain weights, and {first!r} says they are quantized",
            hint="--modelopt-hf-dir takes a ModelOpt export",
        )


def _from_amax(buffers: Mapping[str, Tensor], maxbound: float) -> dict[str, Scales]:
    """Scales of the layers for which both quantizers saw values. The input's may have seen zero."""
    ending = ".weight_quantizer._amax"
    layers = [name.removesuffix(ending) for name in buffers if name.endswith(ending)]
    pairs = {
        layer: (buffers[layer + ending], buffers.get(f"{layer}.input_quantizer._amax"))
        for layer in layers
    }
    return {
        layer: Scales(
            partial(_scale, layer, weight, maxbound),
            None if not inputs.any() else _scale(layer, inputs, maxbound),
        )
        for layer, (weight, inputs) in pairs.items()
        if inputs is not None
    }


def _scale(layer: str, amax: Tensor, maxbound: float) -> Tensor:
    if amax.numel() != 1:
        raise ConvertError(
            f"{layer!r} has amax values of shape {list(amax.shape)}, one per tensor was needed"
        )
    return _nonzero(amax.float().reshape(1) / maxbound)


def _nonzero(scale: Tensor) -> Tensor:
    """A layer of zeros has codes of zero, and any scale will do: one that can be divided by."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _backbone(path: Path) -> dict[str, Tensor]:
    """The `_amax` buffers of a ModelOpt state, mapped; nothing of it is executed."""
    file = path / "backbone.pt" if path.is_dir() else path
    if not file.is_file():
        raise ConvertError(f"no file {str(file)!r}", hint="mto.save writes it: backbone.pt")
    try:
        loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, UnpicklingError) as error:
        raise ConvertError(f"{str(file)!r} is no plain torch state: {error}") from error
    state = loaded.get("model_state_dict", loaded)
    return {name: value for name, value in state.items() if name.endswith("_amax")}


def _beside_codes(component: Component) -> dict[str, Scales]:
    """Scales stored beside FP8 codes: those are the ones the codes were made with."""
    known = component.header.tensors
    found: dict[str, Scales] = {}
    for module in component.modules():
        if component.weight(module).dtype != FP8:
            continue
        names = (f"{module}.weight_scale", f"{module}.weight_quantizer._scale")
        name = next((name for name in names if name in known), None)
        if name is None:
            continue
        if component.tensor(name).numel() != 1:
            raise ConvertError(
                f"{name!r} has shape {list(known[name].shape)}, one scale per tensor was needed",
                hint="diffquant loads it as it is: --transformer-path",
            )
        inputs = f"{module}.input_scale"
        seen = component.tensor(inputs).float().reshape(1) if inputs in known else None
        found[module] = Scales(
            partial(_stored_scale, component, name), seen if seen is not None and seen else None
        )
    return found


def _stored_scale(component: Component, name: str) -> Tensor:
    return _nonzero(component.tensor(name).float().reshape(1))


def _measured(
    component: Component, inputs: Mapping[str, float], maxbound: float
) -> dict[str, Scales]:
    """Scales of every matrix from its own values, and of inputs from what calibration saw."""
    return {
        module: Scales(
            cache(partial(_measure, component, module, maxbound)),
            torch.tensor([inputs[module] / maxbound]) if inputs.get(module) else None,
        )
        for module in component.modules()
        if len(component.weight(module).shape) == 2
    }


def _measure(component: Component, module: str, maxbound: float) -> Tensor:
    low, high = component.tensor(f"{module}.weight").aminmax()
    return _scale(module, torch.maximum(-low, high), maxbound)
