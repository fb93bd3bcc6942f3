"""What every component of a pipeline holds while it runs, from headers alone."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from diffquant import headers, sources
from diffquant.encodings import ENCODINGS
from diffquant.families import FAMILIES
from diffquant.patterns import matches
from diffquant.plan import DENSE, LayerPlan, Part, Plain, Plan, Recode, Role
from diffquant.sources import PipelineFolder

#: Bytes of a value of each dtype that weights, scales and activations come in.
WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}
#: Of one value computed with, unless told otherwise.
COMPUTE_BYTES = WIDTHS["bfloat16"]
#: What encoding holds beside the result, in layers as stored: the layer and as much again to work on;
#: with a low-rank branch three copies in float32.
LAYERS_AT_ONCE, LAYERS_BESIDE_A_BRANCH = 2, 6
#: Tables of which only the rows that are asked for are read.
LOOKED_UP = re.compile(r"(^|\.)(shared|embed_tokens|token_embedding)\.weight$")
#: The first number in a name: what is before it and itself name one block of a list.
BLOCK = re.compile(r"^(.*?\.\d+)\.")

Sizes = Mapping[tuple[int, str], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """Bytes of one component, as it runs.

    blocks     of every repeated block, in order
    rest       of everything else
    looked_up  of the rest, of tables that are only looked up
    made       of all, what loading makes and no file holds
    working    beside the result, while weights are quantized
    passing    of the largest layer as stored
    largest    of the largest tensor
    decoded    values of the largest encoded layer
    widest     outputs of the widest linear that sees every token
    """

    blocks: tuple[int, ...]
    rest: int
    looked_up: int = 0
    made: int = 0
    working: int = 0
    passing: int = 0
    largest: int = 0
    decoded: int = 0
    widest: int = 0

    @property
    def total(self) -> int:
        return self.rest + sum(self.blocks)

    @property
    def block(self) -> int:
        return max(self.blocks, default=0)


def of_plan(plan: Plan, compute: int = COMPUTE_BYTES) -> Holding:
    """A component that a plan describes; one tensor shared by several layers counts once."""
    sizes, seen = _sizes(plan), set[tuple[int, str]]()
    held: dict[str, int] = {}
    made = 0
    for layer in plan.layers:
        stored, built = _layer(layer, sizes, seen, compute)
        held[layer.path] = stored + built
        made += built
    for plain in plan.plain:
        stored, built = _plain(plain, sizes, seen, compute)
        held[plain.name] = held.get(plain.name, 0) + stored + built
        made += built
    blocks, rest = _blocked(held)
    passing = _largest_stored(plan, sizes)
    return Holding(
        blocks=blocks,
        rest=rest,
        made=made,
        working=_layers_at_once(plan) * passing,
        passing=passing,
        largest=max(held.values(), default=0),
        decoded=max((n * k for n, k in (each.shape_NK for each in plan.quantized)), default=0),
        widest=_widest(plan),
    )


def of_files(folder: Path, compute: int = COMPUTE_BYTES) -> Holding | None:
    """A component that diffusers loads and casts; None for one without weights."""
    if not any(folder.glob("*.safetensors")):
        return None
    stored = headers.read(sources.weight_sets(folder)[0]).tensors
    held = {name: _cast(tensor, compute) for name, tensor in stored.items()}
    blocks, rest = _blocked(held)
    return Holding(
        blocks=blocks,
        rest=rest,
        looked_up=sum(size for name, size in held.items() if LOOKED_UP.search(name)),
        made=sum(size for name, size in held.items() if size != stored[name].nbytes),
        passing=sum(tensor.nbytes for tensor in stored.values()),
        largest=max(held.values(), default=0),
    )


def holdings(
    plans: Mapping[str, Plan], pipeline: PipelineFolder, compute: int = COMPUTE_BYTES
) -> dict[str, Holding]:
    """Every component with weights, by name."""
    others = {
        name: of_files(pipeline.root / name, compute)
        for name in pipeline.components
        if name not in plans
    }
    described = {name: of_plan(plan, compute) for name, plan in plans.items()}
    return {**{name: held for name, held in others.items() if held is not None}, **described}


def stored_bytes(plan: Plan) -> int:
    """Bytes of every stored tensor a plan uses; one tensor shared by several layers counts once."""
    sizes = _sizes(plan)
    return sum(sizes[key] for key in {(part.ref.file, part.ref.name) for part in _parts(plan)})


def recoded_bytes(plan: Plan) -> int:
    """Bytes of everything that quantizing while loading makes; 0 for a plan that does not."""
    return sum(
        encoded_bytes((len(piece.out), len(piece.cols)), piece.recode)
        for layer in plan.layers
        for piece in layer.pieces
        if piece.recode is not None
    )


def _layer(
    layer: LayerPlan, sizes: Sizes, seen: set[tuple[int, str]], compute: int
) -> tuple[int, int]:
    """Bytes of a layer that stay in its file, and bytes that loading makes."""
    stored = made = 0
    for piece in layer.pieces:
        kept = piece.parts
        if piece.recode is not None:
            made += encoded_bytes((len(piece.out), len(piece.cols)), piece.recode)
            kept = tuple(part for part in kept if part.role is Role.BIAS)
        stored += _once(kept, sizes, seen)
    n, k = layer.shape_NK
    # A plain weight of another width is cast, and a cast one is no file's.
    if layer.is_ordinary and stored >= 2 * n * k * compute:
        return 0, stored * compute // (stored // (n * k))
    return stored, made


def _plain(plain: Plain, sizes: Sizes, seen: set[tuple[int, str]], compute: int) -> tuple[int, int]:
    stored = sum(_once(source.parts, sizes, seen) for source in plain.sources)
    encoded = any(source.encoding != DENSE for source in plain.sources)
    return (0, prod(plain.shape) * compute) if encoded else (stored, 0)


def _once(parts: Iterable[Part], sizes: Sizes, seen: set[tuple[int, str]]) -> int:
    keys = {(part.ref.file, part.ref.name) for part in parts} - seen
    seen |= keys
    return sum(sizes[key] for key in keys)


def _cast(tensor: headers.Tensor, compute: int) -> int:
    """Bytes after diffusers brought a floating-point tensor to the dtype of the run."""
    is_wide = tensor.dtype in ("F32", "F16", "BF16")
    return prod(tensor.shape) * compute if is_wide else tensor.nbytes


def _blocked(held: Mapping[str, int]) -> tuple[tuple[int, ...], int]:
    """Sizes of the blocks that names tell, and of all else."""
    blocks: dict[str, int] = {}
    rest = 0
    for name, size in held.items():
        if found := BLOCK.match(f"{name}."):
            blocks[found[1]] = blocks.get(found[1], 0) + size
        else:
            rest += size
    return tuple(blocks.values()), rest


def _widest(plan: Plan) -> int:
    """Modulation layers see one row per picture, and do not count."""
    chunked = FAMILIES.load(plan.family).chunked
    wide = (
        layer.shape_NK[0]
        for layer in plan.layers
        if BLOCK.match(f"{layer.path}.") and not any(matches(each, layer.path) for each in chunked)
    )
    return max(wide, default=0)


def _layers_at_once(plan: Plan) -> int:
    recodes = [piece.recode for layer in plan.layers for piece in layer.pieces if piece.recode]
    beside = LAYERS_BESIDE_A_BRANCH if any(each.rank for each in recodes) else LAYERS_AT_ONCE
    return beside if recodes else 0


def encoded_bytes(shape_NK: tuple[int, int], recode: Recode) -> int:
    """Codes, scales and low-rank branch of a weight; its bias is counted where it lies."""
    n, k = shape_NK
    scale = WIDTHS[recode.scale_dtype or "float32"]
    codec = ENCODINGS.load(recode.encoding.name)
    group = codec.group or recode.group or k
    block = (-(-n // group) if recode.granularity == "block" else n) * -(-k // group)
    rank = min(recode.rank or 0, n, k)
    sizes = {
        Role.CODES: int(n * k * codec.bits) // 8,
        # Encodings of a fixed group have scales of one byte.
        Role.BLOCK_SCALE: block if codec.group else scale * block,
        Role.CHANNEL_SCALE: scale * n,
        Role.TENSOR_SCALE: scale,
        Role.OUTER_SCALE: scale * n * -(-k // (recode.group or k)),
        Role.ZERO_POINT: block * COMPUTE_BYTES,
        Role.SMOOTH: COMPUTE_BYTES * k,
        Role.LOWRANK_UP: COMPUTE_BYTES * n * rank,
        Role.LOWRANK_DOWN: COMPUTE_BYTES * k * rank,
    }
    return sum(sizes[role] for role in recode.roles - {Role.BIAS})


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


def _largest_stored(plan: Plan, sizes: Sizes) -> int:
    layers = (_once(_all(layer), sizes, set()) for layer in plan.layers)
    return max(layers, default=0)


def _all(layer: LayerPlan) -> Iterable[Part]:
    return (part for piece in layer.pieces for part in piece.parts)
