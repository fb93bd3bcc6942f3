"""Plans and device -> how much memory each stage of a run takes, from headers alone.

What is counted: weights as stored, what quantizing while loading makes of them, the largest layer
decoded, the other components' weights. What is not: activations, which depend on the size of the picture, and the interpreter with torch (about
0.4 GB of host memory).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffquant import headers, sources
from diffquant.device import Device
from diffquant.encodings import ENCODINGS
from diffquant.plan import Part, Piece, Plan, Recode, Role
from diffquant.sources import PipelineFolder

COMPUTE_BYTES = 2  # of one decoded weight: bfloat16
#: What encoding holds beside the result, in layers as stored: the layer and as much again to work on;
#: with a low-rank branch three copies in float32.
LAYERS_AT_ONCE, LAYERS_BESIDE_A_BRANCH = 2, 6


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
    through the host one layer at a time and stay on the device. Weights that are quantized while
    loading count twice on a CPU, because what they are made from stays mapped.
    """
    stored = sum(stored_bytes(plan) for plan in plans.values())
    made = sum(recoded_bytes(plan) for plan in plans.values())
    replaced = sum(_replaced_bytes(plan) for plan in plans.values())
    others = _others(pipeline, plans)
    scratch = max((_largest_decoded(plan) for plan in plans.values()), default=0)
    layer = max((_largest_stored(plan) for plan in plans.values()), default=0)
    working = max((_layers_at_once(plan) for plan in plans.values()), default=0) * layer
    if device.kind == "cpu":
        held = stored + made + others
        return Forecast(
            stages=(Stage("load", held + working, 0), Stage("draw", held + scratch, 0)),
        )
    resident = stored - replaced + made + others
    # diffusers holds one whole component in host memory while it moves it.
    passing = max(layer, _largest_component(pipeline, plans))
    return Forecast(
        stages=(Stage("load", passing, resident + working), Stage("draw", 0, resident + scratch)),
    )


def stored_bytes(plan: Plan) -> int:
    """Bytes of every stored tensor a plan uses; one tensor shared by several layers counts once."""
    sizes = _sizes(plan)
    parts = {part.ref for part in _parts(plan)}
    return sum(sizes[ref.file, ref.name] for ref in parts)


def _layers_at_once(plan: Plan) -> int:
    recodes = [piece.recode for layer in plan.layers for piece in layer.pieces if piece.recode]
    beside = LAYERS_BESIDE_A_BRANCH if any(each.rank for each in recodes) else LAYERS_AT_ONCE
    return beside if recodes else 0


def recoded_bytes(plan: Plan) -> int:
    """Bytes of everything that quantizing while loading makes; 0 for a plan that does not."""
    return sum(
        _encoded_bytes(piece, piece.recode)
        for layer in plan.layers
        for piece in layer.pieces
        if piece.recode is not None
    )


def _encoded_bytes(piece: Piece, recode: Recode) -> int:
    """Codes, scales and low-rank branch of one piece."""
    n, k = len(piece.out), len(piece.cols)
    codec = ENCODINGS.load(recode.encoding.name)
    group = codec.group or recode.group or k
    block = (-(-n // group) if recode.granularity == "block" else n) * -(-k // group)
    rank = min(recode.rank or 0, n, k)
    sizes = {
        Role.CODES: int(n * k * codec.bits) // 8,
        # Encodings of a fixed group have scales of one byte, all others of four.
        Role.BLOCK_SCALE: block if codec.group else 4 * block,
        Role.CHANNEL_SCALE: 4 * n,
        Role.TENSOR_SCALE: 4,
        Role.OUTER_SCALE: 4 * n * -(-k // (recode.group or k)),
        Role.ZERO_POINT: block * COMPUTE_BYTES,
        Role.SMOOTH: COMPUTE_BYTES * k,
        Role.BIAS: COMPUTE_BYTES * n,
        Role.LOWRANK_UP: COMPUTE_BYTES * n * rank,
        Role.LOWRANK_DOWN: COMPUTE_BYTES * k * rank,
    }
    return sum(sizes[role] for role in recode.roles)


def _replaced_bytes(plan: Plan) -> int:
    """Bytes of the stored weights that something else is made from while loading."""
    sizes = _sizes(plan)
    replaced = {
        part.ref
        for layer in plan.layers
        for piece in layer.pieces
        if piece.recode is not None
        for part in piece.parts
        if part.role is not Role.BIAS
    }
    return sum(sizes[ref.file, ref.name] for ref in replaced)


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
