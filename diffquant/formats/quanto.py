"""optimum-quanto: what its `freeze` leaves in a state dict, in folders of diffusers and in lone files.

    qint8                    X.weight._data         I8 [N, K]            X.weight._scale [N, 1]
    qfloat8_e4m3fn, _e5m2    X.weight._data         F8 [N, K]            the same
    qint4, qint2             X.weight._data._data   U8 [ceil(R / 2), g]  X.weight._scale, _shift [R, 1]

Scales multiply; the shift, in the units of the weight, is then subtracted. 4 and 2 bits come in groups
of g columns: R = N * K / g rows of groups, `halves` tells how they share bytes. Groups are 128 wide, or
as much narrower as K wants, or whole rows; only the bias of the layer tells how many rows there are.
X.input_scale and X.output_scale () are 1 unless activations were calibrated.

Proof are the tensors, or `quant_method: quanto`, or `quantization_format: quanto` in the header. What
becomes of inputs stands in a map {layer: {weights, activations}}: in the header as
`quantization_map_base64`, or in a file `*quantization_map.json` or `*_qmap.json` beside the weights.

Source: optimum-quanto 0.2.7, which wrote and decoded the cases it is tested with.
"""

from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from diffquant.errors import FormatError
from diffquant.formats import Format, Hints, Reading, StoredLayer, StoredPart
from diffquant.formats._json import blocks, json_object
from diffquant.headers import Header, Tensor
from diffquant.plan import ROW_MAJOR, Activation, Encoding, Layout, Options, Role
from diffquant.sources import Checkpoint

METHOD = "quanto"
WHOLE, PACKED = ".weight._data", ".weight._data._data"
MAPS = ("quantization_map.json", "_qmap.json")
#: dtype of whole codes -> encoding.
WHOLE_CODES: Mapping[str, Encoding] = {
    "I8": Encoding("int8"),
    "F8_E4M3": Encoding("fp8"),
    "F8_E5M2": Encoding("fp8", (("kind", "e5m2"),)),
}
#: What a map calls activations -> what they become; the scale is calibrated.
INPUTS = {"qint8": "int8", "qfloat8": "fp8", "qfloat8_e4m3fn": "fp8"}
#: What is stored with every layer, needed or not -> why it may not be.
IDLE = {
    "input_scale": "declared, not applied: inputs are not quantized",
    "output_scale": "declared, not applied: outputs are not quantized",
}


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    for name, tensor in header.tensors.items():
        if name.endswith((WHOLE, PACKED)):
            return f"{name!r} ({tensor.dtype}) is how {METHOD} names codes"
    if header.metadata.get("quantization_format") == METHOD:
        return f"header metadata quantization_format says {METHOD}"
    for where, block in blocks(checkpoint, header, "quantization_config"):
        if block.get("quant_method") == METHOD:
            return f"{where} says quant_method {METHOD}"
    return None


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    inputs = _inputs(checkpoint, header)
    layers = tuple(
        _layer(tensor, header, inputs)
        for name, tensor in header.tensors.items()
        if name.endswith((WHOLE, PACKED))
    )
    used = {part.tensor for layer in layers for part in layer.parts}
    idle = ((f"{layer.name}.{leaf}", why) for layer in layers for leaf, why in IDLE.items())
    unused = {name: why for name, why in idle if name in header.tensors and name not in used}
    return Reading(layers=layers, unused=unused)


def _layer(codes: Tensor, header: Header, inputs: Mapping[str, str]) -> StoredLayer:
    packed = codes.name.endswith(PACKED)
    name = codes.name.removesuffix(PACKED if packed else WHOLE)
    stored_NK, encoding, parts = (_packed if packed else _whole)(codes, name, header)
    parts += _scales(name, packed, header)
    activation = _activation(name, inputs)
    if activation is not None and f"{name}.input_scale" in header.tensors:
        parts.append(StoredPart(Role.INPUT_SCALE, f"{name}.input_scale"))
    return StoredLayer(
        name=name,
        stored_NK=stored_NK,
        encoding=encoding,
        parts=tuple(parts),
        activation=activation,
        why=f"{codes.name!r} is {codes.dtype}",
    )


Numbers = tuple[tuple[int, int], Encoding, list[StoredPart]]


def _whole(codes: Tensor, name: str, header: Header) -> Numbers:
    """One code per byte."""
    encoding = WHOLE_CODES.get(codes.dtype)
    if encoding is None or len(codes.shape) != 2:
        raise FormatError(
            f"{codes.name!r} is {codes.dtype} of {list(codes.shape)}, which {METHOD} does not store"
        )
    return (codes.shape[0], codes.shape[1]), encoding, [StoredPart(Role.CODES, codes.name)]


def _packed(codes: Tensor, name: str, header: Header) -> Numbers:
    """Two or four codes per byte. Raises FormatError where nothing tells N, or K is odd."""
    scale, bias = (header.tensors.get(f"{name}.{leaf}") for leaf in ("weight._scale", "bias"))
    if scale is None:
        raise FormatError(f"{codes.name!r} has no scale '{name}.weight._scale'")
    rows, width = prod(scale.shape), codes.shape[-1]
    shares = next((each for each in (2, 4) if codes.shape[0] == -(-rows // each)), None)
    if codes.dtype != "U8" or len(codes.shape) != 2 or shares is None:
        raise FormatError(
            f"{codes.name!r} is {codes.dtype} of {list(codes.shape)}, {rows} scales are beside it"
        )
    if bias is None:
        raise FormatError(
            f"{codes.name!r} holds {rows} groups of {width}, and without a bias nothing tells how "
            "many of them are a row",
            hint="8 bits of the same library keep the shape",
        )
    n = prod(bias.shape)
    if rows % n or width % 2:
        raise FormatError(f"{codes.name!r} holds {rows} groups of {width}, which are no {n} rows")
    bits: Options = () if shares == 2 else (("bits", "2"),)
    options = (("group", str(width)), ("signed", "false"), ("zero", "scaled"))
    parts = [StoredPart(Role.CODES, codes.name, Layout("halves", bits))]
    return (n, rows // n * width), Encoding("int4", options), parts


def _scales(name: str, packed: bool, header: Header) -> Iterator[StoredPart]:
    """What of them is stored; a scale that is missing is the planner's to miss, a shift is not."""
    scale, shift = f"{name}.weight._scale", f"{name}.weight._shift"
    layout = Layout("halves") if packed else ROW_MAJOR
    if scale in header.tensors:
        alone = prod(header.tensors[scale].shape) == 1
        role = Role.TENSOR_SCALE if alone and not packed else Role.CHANNEL_SCALE
        yield StoredPart(Role.BLOCK_SCALE if packed else role, scale, layout)
    if packed and shift not in header.tensors:
        raise FormatError(f"'{name}{PACKED}' has no shift {shift!r}, which its numbers are less")
    if packed and header.tensors[shift].dtype not in ("BF16", "F16", "F32"):
        raise FormatError(f"{shift!r} is {header.tensors[shift].dtype}, a float was needed")
    if packed:
        negated = Layout("halves", (("numbers", "negated"),))
        yield StoredPart(Role.ZERO_POINT, shift, negated)


# inputs ------------------------------------------------------------------------------------------


def _inputs(checkpoint: Checkpoint, header: Header) -> Mapping[str, str]:
    """Layer -> what its map says of activations; {} without a map."""
    encoded = header.metadata.get("quantization_map_base64")
    if encoded is not None:
        where = "header metadata quantization_map_base64"
        return _told(_decoded(encoded, where), where)
    found = [name for name in sorted(checkpoint.sidecars) if name.endswith(MAPS)]
    if not found:
        return {}
    return _told(checkpoint.sidecars[found[0]].read_text("utf-8"), repr(found[0]))


def _decoded(encoded: str, where: str) -> str:
    try:
        return b64decode(encoded, validate=True).decode("utf-8")
    except (Base64Error, ValueError) as error:
        raise FormatError(f"{where} is no base64 of a text: {error}") from None


def _told(text: str, where: str) -> Mapping[str, str]:
    entries: Mapping[str, Any] = json_object(text, where)
    return {
        layer: str(entry.get("activations") or "none")
        for layer, entry in entries.items()
        if isinstance(entry, Mapping)
    }


def _activation(name: str, inputs: Mapping[str, str]) -> Activation | None:
    kind = inputs.get(name, "none")
    if kind == "none":
        return None
    if kind not in INPUTS:
        raise FormatError(f"the map quantizes the inputs of {name!r} to {kind}, which is not read")
    return Activation(number=INPUTS[kind], granularity="tensor", mode="static")


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    explains=frozenset({"diffusers"}),
    encodings=("int8", "fp8", "int4"),
    proof="owner's library",
)
