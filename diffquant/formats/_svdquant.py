"""What the dialects of SVDQuant share: the tensors of a layer, whatever order they lie in.

Per linear X; N and K are the stored sizes, padding included:

    X.qweight                     I8 [N, K / 2]       4-bit codes
    X.wscales                     BF16 [K / 64, N]    int4, one per row and group of 64
                                  F8_E4M3 [K / 16, N] nvfp4, one per row and group of 16
    X.wtscale, X.wcscales         [1], [N]            outer scales of nvfp4; both absent means none
    X.smooth_factor | smooth      [K]                 divides the input
    X.proj_down | lora_down       [K, R]              low rank of the raw input …
    X.proj_up | lora_up           [N, R]              … added to the output
    X.bias                        [N]                 zeros on modules that have none

and of an AWQ layer, in groups of 64 along K, weight = code * wscales + wzeros:

    X.qweight I32 [N / 4, K / 2]    X.wscales, X.wzeros [K / 64, N]    X.bias [N]

Precision and rank are read from the tensors of each layer; what metadata, a name or a person says
about them is an expectation that the tensors confirm or refute.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from diffquant.errors import FormatError
from diffquant.formats import StoredLayer, StoredPart
from diffquant.headers import Header, Tensor
from diffquant.plan import ROW_MAJOR, Activation, Encoding, Layout, Role

Layouts = Mapping[Role, Layout]

MMA = Layout("nunchaku_mma")
AWQ = Layout("nunchaku_awq")
TRANSPOSED = Layout("transposed")

#: As Nunchaku's kernels read them.
PACKED: Layouts = {
    role: MMA
    for role in (
        Role.CODES,
        Role.BLOCK_SCALE,
        Role.CHANNEL_SCALE,
        Role.SMOOTH,
        Role.LOWRANK_DOWN,
        Role.LOWRANK_UP,
        Role.BIAS,
    )
}
#: The same shapes meant as they look: low nibble even column, scales [G, N], down [K, R].
ROWS: Layouts = {role: ROW_MAJOR for role in PACKED} | {
    Role.BLOCK_SCALE: TRANSPOSED,
    Role.LOWRANK_DOWN: TRANSPOSED,
}

#: The spellings of each part; one layer uses one of them.
ENDINGS: Mapping[Role, tuple[str, ...]] = {
    Role.CODES: ("qweight",),
    Role.BLOCK_SCALE: ("wscales",),
    Role.TENSOR_SCALE: ("wtscale",),
    Role.CHANNEL_SCALE: ("wcscales",),
    Role.SMOOTH: ("smooth_factor", "smooth"),
    Role.LOWRANK_DOWN: ("proj_down", "lora_down"),
    Role.LOWRANK_UP: ("proj_up", "lora_up"),
    Role.BIAS: ("bias",),
}
#: Tensors nothing computes with.
UNUSED: Mapping[str, str] = {
    ending: "the smoothing as calibrated, for the record; what divides the input is stored beside it"
    for ending in ("smooth_factor_orig", "smooth_orig")
}

#: What is added to the input of int4 layers behind GELU, whose smallest value is -0.17.
GELU_SHIFT = 0.171875
WIDE = frozenset({"BF16", "F16", "F32"})
AWQ_GROUP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """A kind of SVDQuant weight: its encoding, its group along K, how its inputs are quantized."""

    name: str
    encoding: Encoding
    group: int
    activation: Activation


INT4 = Precision(
    name="int4",
    encoding=Encoding("int4", (("group", "64"),)),
    group=64,
    activation=Activation(number="int4", granularity="group", group=64, mode="dynamic"),
)
NVFP4 = Precision(
    name="nvfp4",
    encoding=Encoding("nvfp4"),
    group=16,
    activation=Activation(number="nvfp4;outer=none", granularity="group", group=16, mode="dynamic"),
)
PRECISIONS: Mapping[str, Precision] = {
    **{dtype: INT4 for dtype in WIDE},
    "F8_E4M3": NVFP4,
}


def svdquant_names(header: Header) -> Iterator[str]:
    """Stored modules with 4-bit SVDQuant codes."""
    return _named(header, ("I8", "U8"), "wscales")


def awq_names(header: Header) -> Iterator[str]:
    """Stored modules with Nunchaku's AWQ codes."""
    return _named(header, ("I32",), "wzeros")


def _named(header: Header, dtypes: tuple[str, ...], beside: str) -> Iterator[str]:
    for name, tensor in header.tensors.items():
        stem, _, ending = name.rpartition(".")
        if ending == "qweight" and tensor.dtype in dtypes and f"{stem}.{beside}" in header.tensors:
            yield stem


def svdquant_layer(
    name: str, header: Header, layouts: Layouts, why: str, *, gelu_shift: float = 0.0
) -> StoredLayer:
    """One SVDQuant linear. `gelu_shift` counts for int4 only: nvfp4 layers are never shifted.

    Raises FormatError for scales of a type or group that no SVDQuant kernel has.
    """
    parts = tuple(_parts(name, header, layouts))
    roles = {part.role for part in parts}
    codes, scales = header.tensors[f"{name}.qweight"], header.tensors[f"{name}.wscales"]
    stored_NK = _stored_NK(codes)
    precision = _precision(scales, stored_NK)
    is_int4 = precision is INT4
    bare = not is_int4 and not roles & {Role.TENSOR_SCALE, Role.CHANNEL_SCALE}
    return StoredLayer(
        name=name,
        stored_NK=stored_NK,
        encoding=Encoding("nvfp4", (("outer", "none"),)) if bare else precision.encoding,
        parts=parts,
        why=why,
        activation=precision.activation,
        smooth="divide" if Role.SMOOTH in roles else None,
        lowrank_input="raw" if Role.LOWRANK_DOWN in roles else None,
        gelu_shift=gelu_shift if is_int4 else 0.0,
    )


def awq_layer(name: str, header: Header, why: str, *, modulation: bool) -> StoredLayer:
    """One AWQ linear; `modulation` says that its rows are interleaved and 1 is added to its bias.

    Raises FormatError where shapes contradict each other.
    """
    codes = header.tensors[f"{name}.qweight"]
    scales = header.tensors.get(f"{name}.wscales")
    if scales is None:
        raise FormatError(f"{codes.name!r} has zeros beside it and no wscales")
    if len(codes.shape) != 2:
        raise FormatError(f"{codes.name!r} has shape {list(codes.shape)}, not [N / 4, K / 2]")
    roles = {"qweight": Role.CODES, "wscales": Role.BLOCK_SCALE, "wzeros": Role.ZERO_POINT}
    parts = [StoredPart(role, f"{name}.{ending}", AWQ) for ending, role in roles.items()]
    if f"{name}.bias" in header.tensors:
        parts.append(StoredPart(Role.BIAS, f"{name}.bias"))
    shape_NK = (4 * codes.shape[0], 2 * codes.shape[1])
    return StoredLayer(
        name=name,
        stored_NK=shape_NK,
        encoding=awq_encoding(scales, shape_NK, AWQ_GROUP),
        parts=tuple(parts),
        why=why,
        interleaved=modulation,
        plus_one=modulation,
    )


def awq_encoding(scales: Tensor, shape_NK: tuple[int, int], group: int) -> Encoding:
    """Codes 0..15 with a scale and a scaled zero per group. Writers pad the rows of groups, so there
    may be more than K / group; raises FormatError when there are fewer, or N differs."""
    n, k = shape_NK
    if len(scales.shape) != 2 or scales.shape[1] != n or scales.shape[0] * group < k:
        raise FormatError(
            f"{scales.name!r} has shape {list(scales.shape)}, a weight of {[n, k]} in groups of "
            f"{group} needs [{k // group}, {n}]"
        )
    return Encoding("int4", (("group", str(group)), ("signed", "false"), ("zero", "scaled")))


def unused(header: Header) -> dict[str, str]:
    """Tensors that no layer computes with, each with the reason."""
    return {
        name: reason
        for name in header.tensors
        if (reason := UNUSED.get(name.rpartition(".")[2])) is not None
    }


def ranks(layers: Sequence[StoredLayer], header: Header) -> Counter[int]:
    """How many layers have a low-rank branch of each rank; 0 counts those without one."""
    return Counter(_rank(layer, header) for layer in layers if layer.lowrank_input is not None)


def require_precision(promised: str | None, layers: Sequence[StoredLayer], who: str) -> None:
    """Raises FormatError when a layer is not of the promised precision; `who` promised it."""
    for layer in layers:
        if promised is not None and layer.encoding.name != promised:
            raise FormatError(
                f"{who} says {promised}, and {layer.name!r} is stored as {layer.encoding.name}",
                hint="rename the file, or leave out --quantization-precision",
            )


def require_rank(promised: int | None, found: Mapping[int, int], who: str) -> None:
    """Raises FormatError when no layer has the promised rank; ranks are stored in steps of 16."""
    if not isinstance(promised, int) or not found or -(-promised // 16) * 16 in found:
        return
    most = max(found, key=lambda rank: found[rank])
    raise FormatError(
        f"{who} says rank {promised}, and the layers have rank {most}",
        hint=f"--quantization-rank {most}",
    )


def _parts(name: str, header: Header, layouts: Layouts) -> Iterator[StoredPart]:
    for role, endings in ENDINGS.items():
        for ending in endings:
            if f"{name}.{ending}" in header.tensors:
                yield StoredPart(role, f"{name}.{ending}", layouts.get(role, ROW_MAJOR))
                break


def _stored_NK(codes: Tensor) -> tuple[int, int]:
    if len(codes.shape) != 2:
        raise FormatError(
            f"{codes.name!r} has shape {list(codes.shape)}: tiles of four axes (comfy-kitchen's packed "
            "form) are not read",
            hint="store it as [N, K / 2], as comfy-kitchen does before packing",
        )
    return codes.shape[0], 2 * codes.shape[1]


def _precision(scales: Tensor, stored_NK: tuple[int, int]) -> Precision:
    """What dtype and shape of the scales make of a layer. Raises FormatError for anything else."""
    n, k = stored_NK
    precision = PRECISIONS.get(scales.dtype)
    groups = scales.shape[0] if len(scales.shape) == 2 and scales.shape[-1] == n else 0
    if precision is not None and groups * precision.group == k:
        return precision
    group = f"groups of {k // groups}" if groups else f"shape {list(scales.shape)}"
    raise FormatError(
        f"{scales.name!r} holds {scales.dtype} scales in {group}; SVDQuant has bf16 in groups of 64 "
        "(int4) or float8 e4m3 in groups of 16 (nvfp4)",
        hint="MXFP4 exports under these names (ue8m0 scales in groups of 32) are not read",
    )


def _rank(layer: StoredLayer, header: Header) -> int:
    (down,) = (part for part in layer.parts if part.role is Role.LOWRANK_DOWN)
    shape = header.tensors[down.tensor].shape
    return shape[1] if len(shape) == 2 else 0
