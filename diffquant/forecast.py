"""Plans and device -> how much memory each stage of a run takes, from headers alone.

What is counted: weights as stored, the largest layer decoded, the other components' weights. What
is not: activations, which depend on the size of the picture, and the interpreter with torch (about
0.4 GB of host memory).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffquant import headers, sources
from diffquant.device import Device
from diffquant.plan import Part, Plan
from diffquant.sources import PipelineFolder

COMPUTE_BYTES = 2  # of one decoded weight: bfloat16


@dataclass(frozen=True, slots=True)
class Stage:
    """Peaks in bytes while a stage of the run goes on."""

    name: str
    host: int
    device: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Peaks in bytes, over all stages and of each."""

    stages: tuple[Stage, ...]

    @property
    def host_peak_bytes(self) -> int:
        return max(stage.host for stage in self.stages)

    @property
    def device_peak_bytes(self) -> int:
        return max(stage.device for stage in self.stages)


def forecast(plans: Mapping[str, Plan], pipeline: PipelineFolder, device: Device) -> Forecast:
    """Peaks of loading and of drawing when every component stays on the device.

    On a CPU weights are mapped from disk, so that the host holds them once. Elsewhere they pass
    through the host one layer at a time and stay on the device.
    """
    encoded = sum(stored_bytes(plan) for plan in plans.values())
    others = _others(pipeline, plans)
    scratch = max((_largest_decoded(plan) for plan in plans.values()), default=0)
    layer = max((_largest_stored(plan) for plan in plans.values()), default=0)
    resident = encoded + others
    if device.kind == "cpu":
        return Forecast(
            stages=(Stage("load", resident, 0), Stage("draw", resident + scratch, 0)),
        )
    # diffusers holds one whole component in host memory while it moves it.
    passing = max(layer, _largest_component(pipeline, plans))
    return Forecast(
        stages=(Stage("load", passing, resident), Stage("draw", 0, resident + scratch)),
    )


def stored_bytes(plan: Plan) -> int:
    """Bytes of every stored tensor a plan uses; one tensor shared by several layers counts once."""
    sizes = _sizes(plan)
    parts = {part.ref for part in _parts(plan)}
    return sum(sizes[ref.file, ref.name] for ref in parts)


def _parts(plan: Plan) -> Iterable[Part]:
    for layer in plan.layers:
        for piece in layer.pieces:
            yield from piece.parts
    for plain in plan.plain:
        for source in plain.sources:
            yield from source.parts


def _sizes(plan: Plan) -> dict[tuple[int, str], int]:
    return {
        (number, tensor.name): tensor.nbytes
        for number, file in enumerate(plan.files)
        for tensor in headers.read([Path(file.path)]).tensors.values()
    }


def _largest_decoded(plan: Plan) -> int:
    """Bytes of the largest layer that must be decoded to multiply."""
    shapes = (layer.shape_NK for layer in plan.quantized)
    return max((n * k * COMPUTE_BYTES for n, k in shapes), default=0)


def _largest_stored(plan: Plan) -> int:
    sizes = _sizes(plan)
    layers = ({part.ref for piece in layer.pieces for part in piece.parts} for layer in plan.layers)
    return max((sum(sizes[ref.file, ref.name] for ref in refs) for refs in layers), default=0)


def _others(pipeline: PipelineFolder, plans: Mapping[str, Plan]) -> int:
    return sum(_component_sizes(pipeline, plans))


def _largest_component(pipeline: PipelineFolder, plans: Mapping[str, Plan]) -> int:
    return max(_component_sizes(pipeline, plans), default=0)


def _component_sizes(pipeline: PipelineFolder, plans: Mapping[str, Plan]) -> list[int]:
    """Bytes of the weights of every component that no plan describes."""
    return [
        sum(path.stat().st_size for path in sources.weight_sets(pipeline.root / name)[0])
        for name in pipeline.components
        if name not in plans and any((pipeline.root / name).glob("*.safetensors"))
    ]
