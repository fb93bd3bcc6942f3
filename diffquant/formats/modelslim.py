"""msModelSlim (Ascend): a description file beside the weights names the scheme of every weight.

    quant_model_description*.json    {"blocks.0.ffn.0.weight": "W8A8_DYNAMIC", ...}

    scheme                X.weight            beside it                                 activation
    FLOAT                 as it is
    W8A8                  I8 [N, K]           weight_scale, weight_offset [N, 1],       int8 per tensor,
                                              input_scale, input_offset [1],            static, with
                                              quant_bias I32 [N], deq_scale [N]         a zero point
    W8A8_DYNAMIC          I8 [N, K]           weight_scale, weight_offset [N, 1]        int8 per token
    W4A4_DYNAMIC          I8 [N, K] -8..7     weight_scale, weight_offset [N, 1]        int4 per token
                          or I8 [N / 2, K]    the same; even row in bits 0-3
    W8A8_MXFP8            F8_E4M3 [N, K]      weight_scale U8 [N, K/32]                 mxfp8
    W4A4_MXFP4            U8 [N, K/2]         weight_scale U8 [N, K/32]                 mxfp4
    W4A4_MXFP4_DUALSCALE  U8 [N, K/2]         and weight_dual_scale F32 [N, K/512, 1]   mxfp4, dual

Scales multiply and are row-major, the offset is subtracted from the code first. X.mul_scale [K]
multiplies the input before it is quantized. In W8A8 deq_scale is input_scale * weight_scale, as
float32 or as its bits in an int64, and quant_bias is the bias over deq_scale less what the input's
zero point adds, so that the bias is

    quant_bias * deq_scale + input_offset * input_scale * (sum of the weight's rows)

The writer wraps a smoothed linear: its tensors are X.linear.weight …, X.div.mul_scale. Names are
those of the original repository. Source: SGLang's and vLLM-Ascend's loaders as described in public;
no owner runs without its hardware.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from diffquant.errors import FormatError
from diffquant.formats import Format, Hints, Reading, StoredLayer, StoredPart
from diffquant.headers import Header, Tensor
from diffquant.plan import DENSE, ROW_MAJOR, Activation, Encoding, Layout, Role
from diffquant.sources import Checkpoint

DESCRIPTION = "quant_model_description*.json"
FLOAT = "FLOAT"

#: Component -> the folder in which a model of two experts keeps it.
EXPERTS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}

#: Between a linear of Wan and its tensors, where the writer wrapped it.
WRAPPED = re.compile(r"(.*\.(?:\d+|[qkvo]|[kv]_img))\.linear$")
SMOOTHING = ("mul_scale", "div.mul_scale")

CHANNELS = {"weight_scale": Role.CHANNEL_SCALE, "weight_offset": Role.ZERO_POINT}
BLOCKS = {"weight_scale": Role.BLOCK_SCALE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One of msModelSlim's types: its encoding, how K is packed, what lies beside the codes."""

    encoding: Encoding
    dtypes: frozenset[str]
    parts: Mapping[str, Role]
    activation: Activation
    packed: int = 1


def _mx(number: str) -> Activation:
    """Ascend's operators take the exponent of the largest value and let the top saturate."""
    return Activation(number=number, granularity="group", group=32, mode="dynamic")


SCHEMES: Mapping[str, Scheme] = {
    "W8A8": Scheme(
        encoding=Encoding("int8"),
        dtypes=frozenset({"I8"}),
        parts={
            **CHANNELS,
            "input_scale": Role.INPUT_SCALE,
            "input_offset": Role.INPUT_ZERO_POINT,
            "quant_bias": Role.INT_BIAS,
            "deq_scale": Role.OUTPUT_SCALE,
        },
        activation=Activation(number="int8", granularity="tensor", mode="static", symmetric=False),
    ),
    "W8A8_DYNAMIC": Scheme(
        encoding=Encoding("int8"),
        dtypes=frozenset({"I8"}),
        parts=CHANNELS,
        activation=Activation(number="int8", granularity="token", mode="dynamic"),
    ),
    "W4A4_DYNAMIC": Scheme(
        encoding=Encoding("int8"),
        dtypes=frozenset({"I8"}),
        parts=CHANNELS,
        activation=Activation(number="int4", granularity="token", mode="dynamic"),
    ),
    "W8A8_MXFP8": Scheme(
        encoding=Encoding("mxfp8"),
        dtypes=frozenset({"F8_E4M3"}),
        parts=BLOCKS,
        activation=_mx("mxfp8;exponent=floor"),
    ),
    "W4A4_MXFP4": Scheme(
        encoding=Encoding("mxfp4"),
        dtypes=frozenset({"U8", "I8"}),
        parts=BLOCKS,
        activation=_mx("mxfp4;exponent=floor"),
        packed=2,
    ),
    "W4A4_MXFP4_DUALSCALE": Scheme(
        encoding=Encoding("mxfp4"),
        dtypes=frozenset({"U8", "I8"}),
        parts={**BLOCKS, "weight_dual_scale": Role.OUTER_SCALE},
        activation=_mx("mxfp4;outer=512"),
        packed=2,
    ),
}
#: Beginnings of types that language models have and diffusion transformers do not.
REFUSED = {
    "W4A8": "4-bit weights for 8-bit activations come with expert layers of language models",
    "W4A16": "weight-only schemes of language models",
    "W8A16": "weight-only schemes of language models",
    "FAQuant": "quantized attention, not weights",
    "C8": "a quantized key-value cache, not weights",
}
#: Role -> what it means nothing without.
NEEDED = {
    Role.INT_BIAS: (Role.OUTPUT_SCALE, Role.INPUT_SCALE, Role.INPUT_ZERO_POINT),
    Role.INPUT_ZERO_POINT: (Role.INPUT_SCALE,),
}


def expert_folders(names: Iterable[str]) -> dict[str, str]:
    """Component -> folder of a source that holds both experts, {} for any other source.

    names   of the folders that lie directly in the source
    """
    found = set(names)
    return dict(EXPERTS) if set(EXPERTS.values()) <= found else {}


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    found = _described(checkpoint)
    if found is None:
        return None
    where, types = found
    name, first = next(iter(types.items()))
    return f"{where} gives the types of {len(types)} weights, first {name!r} {first}"


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    found = _described(checkpoint)
    assert found is not None, "read is called only where evidence was found"
    where, types = found
    _require_described(header, types, where)
    layers: list[StoredLayer] = []
    unused: dict[str, str] = {}
    for name, stated in types.items():
        weight = header.tensors.get(name)
        if weight is None:
            raise FormatError(f"{where} calls {name!r} {stated}, no such weight is stored")
        stem = name.removesuffix(".weight")
        if stated == FLOAT and _module(stem) == stem and not _smoothing(stem, header):
            continue
        layers.append(_layer(stem, stated, weight, header, where))
        unused.update(_idle(stem, layers[-1], header))
    return Reading(layers=tuple(layers), unused=unused)


# the description ---------------------------------------------------------------------------------


def _described(checkpoint: Checkpoint) -> tuple[str, dict[str, str]] | None:
    """The description's file and its types by weight; the first file that gives any."""
    for side in sorted(checkpoint.sidecars):
        if not fnmatchcase(side, DESCRIPTION):
            continue
        try:
            block = json.loads(checkpoint.sidecars[side].read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{side} is not valid JSON: {error}") from None
        pairs = block.items() if isinstance(block, Mapping) else ()
        types = {key: kind for key, kind in pairs if key.endswith(".weight")}
        for key, kind in types.items():
            if not isinstance(kind, str):
                raise FormatError(f"{side} gives {key!r} the type {kind!r}, a name was needed")
        if types:
            return side, types
    return None


def _require_described(header: Header, types: Mapping[str, str], where: str) -> None:
    narrow = ("I8", "U8", "F8_E4M3", "F8_E5M2")
    for name, tensor in header.tensors.items():
        if name.endswith(".weight") and tensor.dtype in narrow and types.get(name, FLOAT) == FLOAT:
            said = "does not name it" if name not in types else f"calls it {FLOAT}"
            raise FormatError(f"{name!r} is {tensor.dtype}, and {where} {said}")


def _scheme(name: str, stated: str, where: str) -> Scheme:
    if ".experts." in name:
        raise FormatError(f"{where} has {name!r}: expert layers are not read")
    for beginning, reason in REFUSED.items():
        if stated.startswith(beginning):
            raise FormatError(f"{where} calls {name!r} {stated}, which is not read: {reason}")
    if stated not in SCHEMES:
        raise FormatError(
            f"{where} calls {name!r} {stated}, a type that is not known",
            hint=f"known are: {FLOAT}, {', '.join(SCHEMES)}",
        )
    return SCHEMES[stated]


# layers ------------------------------------------------------------------------------------------


def _layer(stem: str, stated: str, weight: Tensor, header: Header, where: str) -> StoredLayer:
    scheme = None if stated == FLOAT else _scheme(weight.name, stated, where)
    encoding, shape, layout = _numbers(stem, scheme, weight, header, stated)
    parts = [StoredPart(Role.CODES, weight.name, layout)]
    if scheme is not None:
        parts += _beside(stem, scheme, header)
    smoothing = _smoothing(stem, header)
    if smoothing is not None:
        parts.append(StoredPart(Role.SMOOTH, smoothing))
    roles = {part.role for part in parts}
    _require_whole(weight.name, roles)
    if f"{stem}.bias" in header.tensors and Role.INT_BIAS not in roles:
        parts.append(StoredPart(Role.BIAS, f"{stem}.bias"))
    return StoredLayer(
        name=_module(stem),
        stored_NK=shape,
        encoding=encoding,
        parts=tuple(parts),
        activation=_activation(scheme, roles),
        smooth="multiply" if smoothing is not None else None,
        why=f"{where} says {stated}",
    )


def _numbers(
    stem: str, scheme: Scheme | None, weight: Tensor, header: Header, stated: str
) -> tuple[Encoding, tuple[int, int], Layout]:
    """Encoding, logical shape and order of the codes."""
    if len(weight.shape) != 2:
        raise FormatError(f"{weight.name!r} is {stated} and has shape {list(weight.shape)}")
    rows, columns = weight.shape
    if scheme is None:
        return DENSE, (rows, columns), ROW_MAJOR
    if weight.dtype not in scheme.dtypes:
        raise FormatError(f"{weight.name!r} is {weight.dtype}, its description says {stated}")
    scale = header.tensors.get(f"{stem}.weight_scale")
    if scale is not None and scheme.activation.number == "int4" and scale.shape[0] == 2 * rows:
        return Encoding("int4"), (2 * rows, columns), Layout("rows_paired")
    return scheme.encoding, (rows, columns * scheme.packed), ROW_MAJOR


def _activation(scheme: Scheme | None, roles: set[Role]) -> Activation | None:
    """Of the scheme; a static one without its input scale quantizes every token by itself."""
    if scheme is None:
        return None
    if scheme.activation.mode == "static" and Role.INPUT_SCALE not in roles:
        return Activation(number=scheme.activation.number, granularity="token", mode="dynamic")
    return scheme.activation


def _beside(stem: str, scheme: Scheme, header: Header) -> Iterator[StoredPart]:
    for ending, role in scheme.parts.items():
        tensor = header.tensors.get(f"{stem}.{ending}")
        if tensor is not None and not _is_nothing(role, tensor, header):
            yield StoredPart(role, tensor.name)


def _is_nothing(role: Role, tensor: Tensor, header: Header) -> bool:
    """A weight offset of zeros: symmetric schemes store one, and most kernels know none."""
    if role is not Role.ZERO_POINT or tensor.nbytes > 65536:
        return False
    return not header.read_small(tensor.name).strip(b"\0")


def _idle(stem: str, layer: StoredLayer, header: Header) -> Iterator[tuple[str, str]]:
    used = {part.tensor for part in layer.parts}
    reasons = {
        f"{stem}.weight_offset": "all zeros: the scheme is symmetric",
        f"{stem}.bias": "folded into quant_bias",
    }
    return (item for item in reasons.items() if item[0] in header.tensors and item[0] not in used)


def _require_whole(name: str, roles: set[Role]) -> None:
    for role in NEEDED.keys() & roles:
        for partner in NEEDED[role]:
            if partner not in roles:
                raise FormatError(f"{name!r} has {role} without {partner}")


def _smoothing(stem: str, header: Header) -> str | None:
    names = (f"{_module(stem)}.{ending}" for ending in SMOOTHING)
    return next((name for name in names if name in header.tensors), None)


def _module(stem: str) -> str:
    """The linear's own name, without the writer's wrapper."""
    wrapped = WRAPPED.match(stem)
    return wrapped.group(1) if wrapped is not None else stem


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    # All weights may be FLOAT; and the description beats a config that names fp8.
    explains=frozenset({"diffusers", "fp8"}),
    encodings=("int8", "int4", "mxfp8", "mxfp4"),
    namings=("original",),
    proof="from description",
)
