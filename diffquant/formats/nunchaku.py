"""Nunchaku's SVDQuant files (DeepCompressor's exporter and its descendants), one file or the older
folder of `transformer_blocks.safetensors` and `unquantized_layers.safetensors`.

The tensors of a layer are those of `_svdquant.py`, packed as Nunchaku's kernels read them whatever
their shapes suggest. Beyond the byte order the dialect has three habits:

    modulation layers (AWQ)  rows stored as channel * S + chunk, and 1 added to the bias of the scale
                             chunks, in bfloat16: the bias comes back to within 2^-7
    int4 layers behind GELU  their input is shifted by 0.171875 and quantized unsigned; the stored bias
                             already makes up for it. Nothing in the file marks these layers
    smoothing of out_proj    may have been moved into V; what divides the input is then all ones

Proof is the metadata: `model_class` Nunchaku…, or `method: svdquant` in `quantization_config`. Without
it AWQ modulation layers prove the writer, since nobody else stores them; without either, other tools
write the same names and shapes in row-major order, and the order is left open.

Sources: the packers, run; the readers, read. No published file was at hand.
"""

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from diffquant import headers
from diffquant.errors import FormatError
from diffquant.families import FAMILIES
from diffquant.formats import Export, Format, Hints, OpenPart, Outgoing, Reading, StoredLayer
from diffquant.formats._json import json_object
from diffquant.formats._outgoing import (
    BIAS,
    DENSE_SPELLING,
    Joined,
    Spelling,
    exported,
    joined,
    naming_of,
    spelled_layer,
)
from diffquant.formats._svdquant import (
    AWQ,
    ENDINGS,
    GELU_SHIFT,
    INT4,
    NVFP4,
    PACKED,
    ROWS,
    awq_layer,
    awq_names,
    ranks,
    require_precision,
    require_rank,
    svdquant_layer,
    svdquant_names,
    unused,
)
from diffquant.formats._svdquant_units import AWQ_ENCODING, units
from diffquant.headers import Header
from diffquant.plan import ROW_MAJOR, Encoding, Piece, Plan, Recode, Role
from diffquant.sources import Checkpoint

TEXT_ENCODER = "NunchakuT5EncoderModel"

#: `weight.dtype` of the metadata -> what layers must then be.
DECLARED: Mapping[str, str] = {"int4": "int4", "fp4_e2m1_all": "nvfp4"}


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    if any(name.endswith(".comfy_quant") for name in header.tensors):
        return None
    told = _told(header)
    if told is not None:
        return told
    if _declares_another(checkpoint):
        return None
    for name in awq_names(header):
        return f"{name}.qweight (I32) with wzeros is Nunchaku's own packing of modulation layers"
    for name in svdquant_names(header):
        return f"{name}.qweight with wscales is SVDQuant, by an unknown writer"
    return None


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    told = _told(header)
    where = told or "tensors named as Nunchaku names them"
    declared = _quantization(header)
    quantized = tuple(
        svdquant_layer(name, header, PACKED, where, gelu_shift=GELU_SHIFT)
        for name in svdquant_names(header)
    )
    modulation = tuple(
        awq_layer(name, header, where, modulation=True) for name in awq_names(header)
    )
    if not quantized + modulation:
        raise FormatError(
            "the header says Nunchaku, and no layer has qweight and wscales",
            hint="is a shard missing? the older form has two files in one folder",
        )
    _confirm(quantized, header, declared, hints)
    proved = told is not None or bool(modulation)
    return Reading(
        layers=quantized + modulation,
        unused=unused(header),
        open=() if proved else tuple(_open(quantized)),
        notes=tuple(_notes(quantized, header, declared)),
        config=_config(header),
    )


def _told(header: Header) -> str | None:
    """What the header's metadata says, when it says Nunchaku and speaks of a transformer."""
    model_class = header.metadata.get("model_class", "")
    if model_class == TEXT_ENCODER:
        return None
    if model_class.startswith("Nunchaku"):
        return f"header metadata model_class {model_class}"
    if _quantization(header).get("method") == "svdquant":
        return "header metadata quantization_config, method svdquant"
    return None


def _quantization(header: Header) -> Mapping[str, Any]:
    text = header.metadata.get("quantization_config")
    return {} if text is None else json_object(text, "header metadata quantization_config")


def _declares_another(checkpoint: Checkpoint) -> bool:
    """Whether config.json beside the weights names a method, which then has a format of its own."""
    block = checkpoint.config.get("quantization_config")
    return isinstance(block, Mapping) and "quant_method" in block


def _confirm(
    layers: tuple[StoredLayer, ...], header: Header, declared: Mapping[str, Any], hints: Hints
) -> None:
    """Holds what the metadata, the file's name and a person say against the tensors."""
    weight = declared.get("weight")
    dtype = weight.get("dtype") if isinstance(weight, Mapping) else None
    if dtype is not None and str(dtype) not in DECLARED:
        raise FormatError(f"quantization_config declares {dtype!r} weights, known are int4 and fp4")
    require_precision(DECLARED.get(str(dtype)), layers, "the header's quantization_config")
    require_precision(hints.precision, layers, "the name, or --quantization-precision,")
    found = ranks(layers, header)
    require_rank(hints.rank, found, "the name, or --quantization-rank,")
    if hints.rank is None:
        require_rank(declared.get("rank"), found, "the header's quantization_config")


def _open(layers: tuple[StoredLayer, ...]) -> Iterator[OpenPart]:
    """One question in as many parts as there are roles, answered together."""
    for role, packed in PACKED.items():
        names = tuple(
            layer.name for layer in layers if any(part.role is role for part in layer.parts)
        )
        if names:
            yield OpenPart(
                topic="nunchaku packing",
                role=role,
                layouts=(packed, ROWS[role]),
                layers=names,
                why="no metadata names the writer, and row-major tools store the same shapes",
            )


def _config(header: Header) -> Mapping[str, object]:
    """The module config of the metadata, under the name of the diffusers class."""
    text = header.metadata.get("config")
    config = {} if text is None else dict(json_object(text, "header metadata config"))
    name = str(config.get("_class_name") or header.metadata.get("model_class", ""))
    if config and name.startswith("Nunchaku"):
        config["_class_name"] = _diffusers_class(name)
    return config


def _diffusers_class(name: str) -> str:
    """Nunchaku's class names are those of diffusers with a prefix, a small d, sometimes a version."""
    plain = name.removeprefix("Nunchaku").removesuffix("V2")
    return plain.removeprefix("SDXL").replace("2dModel", "2DModel")


def _notes(
    layers: tuple[StoredLayer, ...], header: Header, declared: Mapping[str, Any]
) -> Iterator[str]:
    found = ranks(layers, header)
    if len(found) > 1:
        listed = ", ".join(f"{count} of rank {rank}" for rank, count in sorted(found.items()))
        yield f"low-rank branches differ: {listed}"
    bare = [layer.name for layer in layers if layer.lowrank_input is None]
    if bare:
        yield f"{len(bare)} layers have no low-rank branch, first {bare[0]!r}"
    if declared.get("skip_refiners"):
        yield "attention of the refiners is kept dense (skip_refiners)"


# the way out -------------------------------------------------------------------------------------

WHO = "nunchaku"
#: What the kernels want where the plan has no such part. A module without bias stores none.
FILLS = {Role.SMOOTH: 1.0}
DTYPES = {Role.CODES: "I8"}
AWQ_SPELLING = Spelling(
    parts=(
        Outgoing(role=Role.CODES, tensor="qweight", dtype="I32", layout=AWQ),
        Outgoing(role=Role.BLOCK_SCALE, tensor="wscales", layout=AWQ),
        Outgoing(role=Role.ZERO_POINT, tensor="wzeros", layout=AWQ),
        BIAS,
    )
)
BARE_NVFP4 = Encoding("nvfp4", (("outer", "none"),))
#: Names that are not upstream's rule of a prefix.
MODEL_CLASSES = {"FluxTransformer2DModel": "NunchakuFluxTransformer2dModel"}


def _quantize(plan: Plan, paths: frozenset[str], recode: Recode) -> Mapping[str, tuple[Piece, ...]]:
    """The layers of a dense plan in the weights this dialect stores."""
    return units(plan, paths, recode, WHO)


def _write(plan: Plan) -> Export:
    """One file: SVDQuant layers packed, modulation in AWQ order, everything else as it is."""
    naming = naming_of(plan, (WHO,), WHO)
    weights = joined(plan, naming, WHO)
    spellings = _spellings(_endings(plan.family))
    layers = tuple(
        spelled_layer(each, spellings.get(str(each.piece.encoding)), WHO) for each in weights
    )
    precision = _one_precision(weights)
    return exported(
        plan,
        layers,
        naming,
        config=None,
        metadata={
            "model_class": _model_class(str(plan.config.get("_class_name", ""))),
            "config": json.dumps(dict(plan.config)),
            "quantization_config": json.dumps(_declaration(precision, _most_rank(plan))),
        },
    )


def _endings(family: str) -> Mapping[Role, str]:
    """Files in FLUX.1's first naming spell the parts in the second way."""
    namings = FAMILIES.load(family).namings
    first = namings[WHO] == namings.get(f"{WHO}_v2", namings[WHO])
    return {role: names[0] if first else names[-1] for role, names in ENDINGS.items()}


def _spellings(endings: Mapping[Role, str]) -> Mapping[str, Spelling]:
    # Nobody computes with the record of the smoothing, but upstream's modules miss it.
    named = [*endings.items(), (Role.SMOOTH, f"{endings[Role.SMOOTH]}_orig")]
    packed = Spelling(
        parts=tuple(
            Outgoing(
                role=role,
                tensor=ending,
                dtype=DTYPES.get(role),
                layout=PACKED.get(role, ROW_MAJOR),
                axes="one" if role is Role.TENSOR_SCALE else None,
                filled=FILLS.get(role),
            )
            for role, ending in named
        ),
        smooth="divide",
        lowrank_input="raw",
        pad=128,
    )
    return {
        "dense": DENSE_SPELLING,
        str(INT4.encoding): packed,
        str(NVFP4.encoding): packed,
        str(BARE_NVFP4): packed,
        str(AWQ_ENCODING): AWQ_SPELLING,
    }


def _one_precision(weights: tuple[Joined, ...]) -> str:
    """Raises FormatError for a plan of both precisions, or of none: the metadata names one."""
    svdquant = {str(INT4.encoding): "int4", str(NVFP4.encoding): "nvfp4", str(BARE_NVFP4): "nvfp4"}
    kinds = (svdquant.get(str(each.piece.encoding)) for each in weights)
    found = sorted({kind for kind in kinds if kind is not None})
    if len(found) != 1:
        raise FormatError(f"{WHO} stores int4 or nvfp4 layers, the plan has {found or 'neither'}")
    return found[0]


def _declaration(precision: str, rank: int) -> dict[str, object]:
    dtype = next(name for name, meant in DECLARED.items() if meant == precision)
    kind = INT4 if precision == "int4" else NVFP4
    scale = None if precision == "int4" else [None, "fp8_e4m3_nan"]
    number = {"dtype": dtype, "scale_dtype": scale, "group_size": kind.group}
    return {"method": "svdquant", "weight": number, "activation": number, "rank": rank}


def _model_class(name: str) -> str:
    return MODEL_CLASSES.get(name, f"Nunchaku{name}")


def _most_rank(plan: Plan) -> int:
    """The rank that most layers have, from the recode that makes them or the file that holds them."""
    pieces = [piece for layer in plan.layers for piece in layer.pieces]
    found = [piece.recode.rank for piece in pieces if piece.recode and piece.recode.rank]
    header = None if found else headers.read([Path(file.path) for file in plan.files])
    for piece in pieces:
        down = piece.part(Role.LOWRANK_DOWN)
        if header is not None and down is not None:
            found.append(prod(header.tensors[down.ref.name].shape) // piece.stored_NK[1])
    return max(set(found), key=found.count) if found else 0


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    encodings=("int4", "nvfp4"),
    namings=("nunchaku",),
    proof="true files",
    write=_write,
    quantize=_quantize,
)
