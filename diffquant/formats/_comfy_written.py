"""Plan -> a ComfyUI file: BFL's or the original's names, and a marker for every layer."""

import json
from collections.abc import Mapping

from diffquant.formats import Export, Outgoing
from diffquant.formats._comfy_kinds import KINDS, NIBBLES_HIGH, TILES
from diffquant.formats._comfy_markers import FULL_PRECISION, METADATA
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
from diffquant.plan import DENSE, ROW_MAJOR, Layout, Plan, Role

WHO = "comfy"
INPUT = Outgoing(role=Role.INPUT_SCALE, tensor="input_scale", dtype="F32")
TENSOR = Outgoing(role=Role.TENSOR_SCALE, tensor="weight_scale", dtype="F32")


def _codes(dtype: str, layout: Layout = ROW_MAJOR) -> Outgoing:
    return Outgoing(role=Role.CODES, tensor="weight", dtype=dtype, layout=layout)


def _tiled(dtype: str) -> Outgoing:
    return Outgoing(role=Role.BLOCK_SCALE, tensor="weight_scale", dtype=dtype, layout=TILES)


def _as_read(name: str, dtype: str) -> Spelling:
    """The spelling that the reader's table already is; a scale of any shape is one per row."""
    kind = KINDS[name]
    beside = (
        Outgoing(role=role or Role.CHANNEL_SCALE, tensor=ending, layout=layout)
        for ending, (role, layout) in kind.parts.items()
    )
    return Spelling(
        parts=(_codes(dtype, kind.codes), *beside, BIAS),
        smooth=kind.smooth,
        lowrank_input="raw",
        rotates=kind.rotation != "never",
    )


#: What ComfyUI's own kernels read of each format; fewer granularities than our reader takes.
SPELLINGS: Mapping[str, Spelling] = {
    "float8_e4m3fn": Spelling(parts=(_codes("F8_E4M3"), TENSOR, INPUT, BIAS)),
    "float8_e5m2": Spelling(parts=(_codes("F8_E5M2"), TENSOR, INPUT, BIAS)),
    "nvfp4": Spelling(
        parts=(
            _codes("U8", NIBBLES_HIGH),
            _tiled("F8_E4M3"),
            Outgoing(role=Role.TENSOR_SCALE, tensor="weight_scale_2", dtype="F32"),
            INPUT,
            Outgoing(role=Role.SMOOTH, tensor="pre_quant_scale"),
            BIAS,
        ),
        smooth="multiply",
        pad=16,
    ),
    "mxfp8": Spelling(parts=(_codes("F8_E4M3"), _tiled("F8_E8M0"), BIAS), pad=32),
    "int8_tensorwise": Spelling(
        parts=(
            _codes("I8"),
            TENSOR,
            Outgoing(role=Role.CHANNEL_SCALE, tensor="weight_scale", dtype="F32", axes="column"),
            BIAS,
        ),
        rotates=True,
    ),
    "int8_blockwise": Spelling(
        parts=(
            _codes("I8"),
            Outgoing(role=Role.BLOCK_SCALE, tensor="weight_scale", dtype="F32"),
            BIAS,
        )
    ),
    "svdquant_w4a4": _as_read("svdquant_w4a4", "I8"),
    "convrot_w4a4": _as_read("convrot_w4a4", "I8"),
    "awq_w4a16": _as_read("awq_w4a16", "I8"),
    "asym_w4a8_int8": _as_read("asym_w4a8_int8", "I8"),
}
#: Encoding, a part that must be there, and ComfyUI's word for both. The first row that fits counts.
FORMAT_NAMES: tuple[tuple[str, Role | None, str], ...] = (
    ("fp8", None, "float8_e4m3fn"),
    ("fp8;kind=e5m2", None, "float8_e5m2"),
    ("nvfp4", None, "nvfp4"),
    ("mxfp8", None, "mxfp8"),
    ("int8", Role.BLOCK_SCALE, "int8_blockwise"),
    ("int8", None, "int8_tensorwise"),
    ("int4", Role.LOWRANK_DOWN, "svdquant_w4a4"),
    ("int4", Role.CHANNEL_SCALE, "convrot_w4a4"),
    ("int4;signed=offset;zero=scaled", None, "awq_w4a16"),
    ("asym_w4a8", None, "asym_w4a8_int8"),
)


def write(plan: Plan) -> Export:
    naming = naming_of(plan, ("bfl", "original", "diffusers"), WHO)
    weights = joined(plan, naming, WHO)
    return exported(
        plan,
        tuple(spelled_layer(each, _spelling(each), WHO) for each in weights),
        naming,
        config=None,
        metadata={METADATA: json.dumps({"format_version": "1.0", "layers": _said(weights)})},
    )


def _spelling(weight: Joined) -> Spelling | None:
    if weight.piece.encoding == DENSE:
        return DENSE_SPELLING
    return SPELLINGS.get(_format_name(weight))


def _format_name(weight: Joined) -> str:
    """ComfyUI's word for a quantized weight, empty where it has none."""
    piece = weight.piece
    return next(
        (
            name
            for encoding, role, name in FORMAT_NAMES
            if encoding == str(piece.encoding) and (role is None or role in piece.roles)
        ),
        "",
    )


def _said(weights: tuple[Joined, ...]) -> dict[str, dict[str, object]]:
    """Layer -> its marker."""
    said: dict[str, dict[str, object]] = {}
    for weight in weights:
        piece = weight.piece
        if piece.encoding == DENSE:
            continue
        marker: dict[str, object] = {"format": _format_name(weight)}
        if piece.activation is None:
            marker[FULL_PRECISION] = True
        if piece.shift:
            marker["act_unsigned"] = True
        if piece.rotation is not None:
            marker |= {"convrot": True, "convrot_groupsize": piece.rotation.group}
        said[weight.name] = marker
    return said
