"""torchao: tensor subclasses taken apart, as its safetensors support and diffusers save them.

The header has `tensor_names` and, under the name of every parameter X.weight, JSON: `_type` is the class,
`_data` what it was made with, `_tensor_data_names` which tensors it has. Those are stored as X._weight_NAME.

    _type                      qdata              scale                      beside it
    Float8Tensor               F8 [N, K]          [N, 1], [1, 1] or blocks   -
    Int8Tensor                 I8 [N, K]          [N, 1], [1, 1] or groups   zero_point, act_quant_scale
    IntxUnpackedToInt8Tensor   I8 [N, K]          [N, K / g]                 zero_point
    NVFP4Tensor                U8 [N, K / 2]      F8_E4M3 [N, K / 16]        per_tensor_scale (), for inputs
                                                                             act_per_tensor_scale
    MXTensor                   F8, U8 [N, K / 2]  F8_E8M0 [N, K / 32]        -
    Tensor                     under its own name

Scales multiply, zero points are subtracted from the code, the even column is in the low nibble.
`block_size` says what shares a scale; `is_swizzled_scales` that they lie in tiles of 128 x 4. What inputs
become stands in `act_quant_kwargs` or `activation_quantization`. Codes of fewer than 8 bits are one to a
byte. Packed INT4 classes, whose order is that of a kernel, are refused by name.

Source: torchao 0.18, which wrote and decoded the cases it is tested with. (It multiplies the two scales of
NVFP4 first, here the code comes first: a last bit of float32 may differ.)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from diffquant.errors import FormatError
from diffquant.formats import Format, Hints, Reading, StoredLayer, StoredPart
from diffquant.formats._json import blocks, json_object
from diffquant.headers import SMALL, Header, Tensor
from diffquant.plan import ROW_MAJOR, Activation, Encoding, Layout, Role
from diffquant.sources import Checkpoint

METHOD = "torchao"
NAMES = "tensor_names"
PLAIN = "Tensor"
PARAMETER = ".weight"
TILES = Layout("tiles_128x4")
ZEROS = "zeros: the scheme is symmetric"
GRAINS: Mapping[str, Literal["token", "tensor"]] = {"PerRow": "token", "PerTensor": "tensor"}
EXPONENTS = {"FLOOR": "floor", "RCEIL": "ceil"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Class:
    """One class of tensors.

    encodings   dtype of its codes -> what they are
    roles       name of a tensor it may have -> what that is for
    number      what inputs become, where `act_quant_kwargs` says that they are quantized
    """

    encodings: Mapping[str, Encoding]
    roles: Mapping[str, Role] = field(default_factory=dict)
    number: str | None = None


FP8 = {"F8_E4M3": Encoding("fp8"), "F8_E5M2": Encoding("fp8", (("kind", "e5m2"),))}
MX = {
    "F8_E4M3": Encoding("mxfp8"),
    "F8_E5M2": Encoding("mxfp8", (("kind", "e5m2"),)),
    "U8": Encoding("mxfp4"),
}
CLASSES: Mapping[str, Class] = {
    "Float8Tensor": Class(encodings=FP8, number="fp8"),
    "Int8Tensor": Class(
        encodings={"I8": Encoding("int8")},
        roles={"zero_point": Role.ZERO_POINT, "act_quant_scale": Role.INPUT_SCALE},
        number="int8",
    ),
    "IntxUnpackedToInt8Tensor": Class(
        encodings={"I8": Encoding("int8")}, roles={"zero_point": Role.ZERO_POINT}
    ),
    "NVFP4Tensor": Class(
        encodings={"U8": Encoding("nvfp4")},
        roles={"per_tensor_scale": Role.TENSOR_SCALE, "act_per_tensor_scale": Role.INPUT_SCALE},
        number="nvfp4",
    ),
    "MXTensor": Class(encodings=MX),
}


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    if NAMES in header.metadata:
        for name, block in _parameters(header):
            return f"header metadata says that {name!r} is a torchao {block['_type']}"
    for where, block in blocks(checkpoint, header, "quantization_config"):
        if block.get("quant_method") == METHOD:
            return f"{where} says quant_method {METHOD}"
    return None


def _parameters(header: Header) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What the header says of parameters that are no plain tensors."""
    for name, text in header.metadata.items():
        if '"_type"' in text:
            block = json_object(text, f"header metadata {name}")
            if block.get("_type") != PLAIN:
                yield name, block


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    unused: dict[str, str] = {}
    layers = tuple(_layer(name, block, header, unused) for name, block in _parameters(header))
    told = {part.tensor for layer in layers for part in layer.parts} | unused.keys()
    for name in header.tensors:
        if "._weight_" in name and name not in told:
            raise FormatError(f"{name!r} is part of a tensor of which the header says nothing")
    return Reading(layers=layers, unused=unused)


def _layer(
    name: str, block: Mapping[str, Any], header: Header, unused: dict[str, str]
) -> StoredLayer:
    kind, data = block["_type"], block.get("_data")
    known = CLASSES.get(kind)
    if known is None or not isinstance(data, Mapping):
        raise FormatError(
            f"{name!r} is a {kind}, whose codes are in the order of a kernel",
            hint=f"{', '.join(CLASSES)} are read",
        )
    if not name.endswith(PARAMETER):
        raise FormatError(f"{name!r} is a {kind}, which only weights of layers may be")
    stem = name.removesuffix(PARAMETER)
    codes = header.tensors.get(f"{stem}._weight_qdata")
    encoding = None if codes is None else known.encodings.get(codes.dtype)
    if codes is None or encoding is None or len(codes.shape) != 2:
        held = "no codes" if codes is None else f"codes of {codes.dtype} {list(codes.shape)}"
        raise FormatError(f"{name!r} is a {kind} with {held}")
    shape_NK = codes.shape[0], codes.shape[1] * (2 if codes.dtype == "U8" else 1)
    scale = header.tensors.get(f"{stem}._weight_scale")
    beside = dict(_beside(name, known, block, header, unused))
    return StoredLayer(
        name=stem,
        stored_NK=shape_NK,
        encoding=_encoding(name, encoding, data, shape_NK, beside),
        parts=(
            StoredPart(Role.CODES, codes.name),
            *(() if scale is None else (_scale(scale, encoding, data, shape_NK),)),
            *(StoredPart(role, tensor) for role, tensor in beside.items()),
        ),
        activation=_activation(name, known, data, beside),
        why=f"header metadata: {kind}",
    )


def _encoding(
    name: str,
    encoding: Encoding,
    data: Mapping[str, Any],
    shape_NK: tuple[int, int],
    beside: Mapping[Role, str],
) -> Encoding:
    """With its blocks, and without an outer scale where there is none."""
    fixed = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32}.get(encoding.name)
    size = data.get("block_size")
    if fixed is not None:
        if size != fixed:
            raise FormatError(f"{name!r} has blocks of {size!r:.40}, {encoding.name} has {fixed}")
        bare = encoding.name == "nvfp4" and Role.TENSOR_SCALE not in beside
        return Encoding(encoding.name, (*encoding.options, *((("outer", "none"),) if bare else ())))
    rows, columns = _cell(name, size)
    if (rows, columns) in ((128, 128), (1, shape_NK[1]), shape_NK):
        return encoding
    return Encoding(encoding.name, (*encoding.options, ("block", f"{rows}x{columns}")))


def _cell(name: str, size: Any) -> tuple[int, int]:
    if isinstance(size, list) and len(size) == 2 and all(type(each) is int for each in size):
        return size[0], size[1]
    raise FormatError(f"{name!r} has block_size {size!r:.40}, [rows, columns] was needed")


def _scale(
    scale: Tensor, encoding: Encoding, data: Mapping[str, Any], shape_NK: tuple[int, int]
) -> StoredPart:
    """A scale of the tensor, of rows or of blocks, as the block says."""
    size = data.get("block_size")
    if size == list(shape_NK) and prod(scale.shape) == 1:
        return StoredPart(Role.TENSOR_SCALE, scale.name)
    if size == [1, shape_NK[1]]:
        return StoredPart(Role.CHANNEL_SCALE, scale.name)
    layout = TILES if data.get("is_swizzled_scales") else ROW_MAJOR
    return StoredPart(Role.BLOCK_SCALE, scale.name, layout)


def _beside(
    name: str, known: Class, block: Mapping[str, Any], header: Header, unused: dict[str, str]
) -> Iterator[tuple[Role, str]]:
    """What else the tensor has. Raises FormatError for what is missing or not read."""
    for part in block.get("_tensor_data_names") or ():
        stored = f"{name.removesuffix(PARAMETER)}._weight_{part}"
        if part in ("qdata", "scale"):
            continue  # a scale that is missing is the planner's to miss
        if part not in known.roles:
            raise FormatError(f"{name!r} has {part}, which is not read for a {block['_type']}")
        if stored not in header.tensors:
            raise FormatError(f"{name!r} has {part}, and {stored!r} is not stored")
        if known.roles[part] is Role.ZERO_POINT and _is_zero(header.tensors[stored], header):
            unused[stored] = ZEROS
            continue
        yield known.roles[part], stored


def _is_zero(tensor: Tensor, header: Header) -> bool:
    return tensor.nbytes <= SMALL and not header.read_small(tensor.name).strip(b"\0")


# inputs ------------------------------------------------------------------------------------------


def _activation(
    name: str, known: Class, data: Mapping[str, Any], beside: Mapping[Role, str]
) -> Activation | None:
    per_token = data.get("activation_quantization")
    if per_token is not None:
        return _per_token(name, str(per_token))
    told = data.get("act_quant_kwargs")
    if not isinstance(told, Mapping):
        return None
    kwargs = told.get("_data") or {}
    mode: Literal["static", "dynamic"] = "static" if Role.INPUT_SCALE in beside else "dynamic"
    if known.number == "nvfp4":
        return Activation(number="nvfp4", granularity="group", group=16, mode=mode)
    if known.number is None:
        number = _micro(name, kwargs)
        return Activation(number=number, granularity="group", group=32, mode="dynamic")
    grain = str((kwargs.get("granularity") or {}).get("_type"))
    if grain not in GRAINS:
        raise FormatError(f"{name!r} quantizes inputs {grain}, {' and '.join(GRAINS)} are read")
    mapping = (kwargs.get("mapping_type") or {}).get("_data", "SYMMETRIC")
    return Activation(
        number=known.number,
        granularity="tensor" if mode == "static" else GRAINS[grain],
        mode=mode,
        symmetric=mapping != "ASYMMETRIC",
    )


def _per_token(name: str, told: str) -> Activation:
    kinds = {"int8_asym_per_token": False, "int8_sym_per_token": True}
    if told not in kinds:
        raise FormatError(f"{name!r} quantizes inputs {told}, {' and '.join(kinds)} are read")
    return Activation(number="int8", granularity="token", mode="dynamic", symmetric=kinds[told])


def _micro(name: str, kwargs: Mapping[str, Any]) -> str:
    """The number inputs of an MXTensor become, and how its exponents are rounded."""
    numbers = {"float8_e4m3fn": "mxfp8", "float4_e2m1fn_x2": "mxfp4"}
    element = (kwargs.get("elem_dtype") or {}).get("_data")
    mode = (kwargs.get("scaling_mode") or {}).get("_data", "FLOOR")
    if element not in numbers or mode not in EXPONENTS or kwargs.get("block_size", 32) != 32:
        raise FormatError(
            f"{name!r} quantizes inputs to {element}, exponents {mode}, in blocks of "
            f"{kwargs.get('block_size')}, which is not read"
        )
    return str(Encoding(numbers[element], (("exponent", EXPONENTS[mode]),)))


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    explains=frozenset({"diffusers"}),
    encodings=("fp8", "int8", "nvfp4", "mxfp4", "mxfp8"),
    proof="owner's library",
)
