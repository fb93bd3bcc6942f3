"""Plan -> compressed-tensors: weights by kind, and the configuration's groups that they fill."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal

from diffquant import headers
from diffquant.errors import FormatError
from diffquant.formats import Export, Outgoing
from diffquant.formats._compressed_tensors_config import DIVIDES, KEYS, METHOD, SCALE_ROLES, words
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
from diffquant.plan import DENSE, Activation, Encoding, Piece, Plan, Recode, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How the dialect stores one kind of weight.

    grouping  strategy and group where the format leaves no choice
    packed    bits per code in words, which come with X.weight_shape
    """

    format: str
    type: str
    bits: int
    codes: Outgoing
    grouping: Mapping[str, object] | None = None
    scale_dtype: str | None = None
    packed: int | None = None


def _words_of(bits: int) -> Outgoing:
    layout = words(bits, "columns")
    return Outgoing(role=Role.CODES, tensor="weight_packed", dtype="I32", layout=layout)


PAIRS = Outgoing(role=Role.CODES, tensor="weight_packed", dtype="U8")
FLOAT8 = Outgoing(role=Role.CODES, tensor="weight", dtype="F8_E4M3")
INT8 = Outgoing(role=Role.CODES, tensor="weight", dtype="I8")
PER_32: Mapping[str, object] = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
PER_16: Mapping[str, object] = {
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
}

#: Encoding (without the size of its blocks) and whether inputs are quantized.
STORAGES: Mapping[tuple[str, bool], Storage] = {
    ("fp8", True): Storage(format="float-quantized", type="float", bits=8, codes=FLOAT8),
    ("fp8", False): Storage(format="naive-quantized", type="float", bits=8, codes=FLOAT8),
    ("int8", True): Storage(format="int-quantized", type="int", bits=8, codes=INT8),
    ("int8", False): Storage(
        format="pack-quantized", type="int", bits=8, codes=_words_of(8), packed=8
    ),
} | {
    (name, inputs): storage
    for inputs in (True, False)
    for name, storage in {
        "int4": Storage(format="pack-quantized", type="int", bits=4, codes=_words_of(4), packed=4),
        str(Encoding("nvfp4", DIVIDES)): Storage(
            format="nvfp4-pack-quantized",
            type="float",
            bits=4,
            codes=PAIRS,
            grouping=PER_16,
            scale_dtype="F8_E4M3",
        ),
        "mxfp4": Storage(
            format="mxfp4-pack-quantized",
            type="float",
            bits=4,
            codes=PAIRS,
            grouping=PER_32,
            scale_dtype="U8",
        ),
        "mxfp8": Storage(
            format="mxfp8-quantized",
            type="float",
            bits=8,
            codes=FLOAT8,
            grouping=PER_32,
            scale_dtype="U8",
        ),
    }.items()
}
#: An activation's number -> how the configuration spells it.
INPUTS: Mapping[str, Mapping[str, object]] = {
    "fp8": {"type": "float", "num_bits": 8},
    "int8": {"type": "int", "num_bits": 8},
    "int4": {"type": "int", "num_bits": 4},
    "nvfp4": {"type": "float", "num_bits": 4, **PER_16},
    "mxfp8": {"type": "float", "num_bits": 8, **PER_32},
    "mxfp4": {"type": "float", "num_bits": 4, **PER_32},
}


def write(plan: Plan) -> Export:
    naming = naming_of(plan, ("diffusers",), METHOD)
    weights = joined(plan, naming, METHOD)
    groups = _Groups(plan)
    layers = tuple(spelled_layer(each, groups.spelling(each), METHOD) for each in weights)
    export = exported(plan, layers, naming, config={KEYS[0]: groups.block()})
    return replace(export, constants=groups.shapes)


class _Groups:
    """The configuration's groups, which fill as weights are spelled."""

    def __init__(self, plan: Plan) -> None:
        self._stored = headers.read([Path(file.path) for file in plan.files])
        self._pieces = {layer.path: layer.pieces for layer in plan.layers}
        self._members: dict[str, list[str]] = {}
        self._dense: list[str] = []
        self.shapes: dict[str, tuple[int, ...]] = {}

    def spelling(self, weight: Joined) -> Spelling | None:
        piece = weight.piece
        if piece.encoding == DENSE:
            self._dense.append(weight.name)
            return DENSE_SPELLING
        bare = tuple(item for item in piece.encoding.options if item[0] != "block")
        key = (str(Encoding(piece.encoding.name, bare)), piece.activation is not None)
        storage = STORAGES.get(key)
        if storage is None:
            _require_inverse(weight)
            return None
        grouping = storage.grouping or self._grouping(weight)
        _require_whole_groups(weight, grouping)
        symmetric = Role.ZERO_POINT not in piece.roles
        group = {
            "format": storage.format,
            "weights": {
                "num_bits": storage.bits,
                "type": storage.type,
                "symmetric": symmetric,
                "dynamic": False,
                **grouping,
            },
            "input_activations": _inputs(weight.name, piece),
        }
        self._members.setdefault(json.dumps(group), []).append(weight.name)
        if storage.packed is not None:
            self.shapes[f"{weight.name}.weight_shape"] = self._shape(weight)
        return Spelling(parts=_parts(storage, piece, str(grouping["strategy"])))

    def block(self) -> dict[str, object]:
        """One group takes every linear that is not ignored; several name their layers."""
        groups = [(json.loads(text), names) for text, names in self._members.items()]
        formats = {group["format"] for group, _ in groups} or {"dense"}
        alone = len(groups) == 1
        return {
            "quant_method": METHOD,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{index}": {"targets": ["Linear"] if alone else names, **group}
                for index, (group, names) in enumerate(groups)
            },
            "ignore": self._dense,
        }

    def _shape(self, weight: Joined) -> tuple[int, ...]:
        rows = (len(self._pieces[path][index].out) for path, index in weight.members)
        return sum(rows), len(weight.piece.cols)

    def _grouping(self, weight: Joined) -> dict[str, object]:
        """Strategy and sizes. Raises FormatError for scales upon scales, and for ragged groups."""
        roles = weight.piece.roles & set(SCALE_ROLES.values())
        if len(roles) != 1:
            raise FormatError(f"{weight.name!r} has {len(roles)} scales, {METHOD} stores one")
        (role,) = roles
        if role is not Role.BLOCK_SCALE:
            return {"strategy": "tensor" if role is Role.TENSOR_SCALE else "channel"}
        path, index = weight.members[0]
        piece = self._pieces[path][index]
        if piece.recode is not None:
            return _recoded(piece.recode)
        return self._blocks(weight.name, piece)

    def _blocks(self, name: str, piece: Piece) -> dict[str, object]:
        """By how many scales are stored: one per block of rows and columns, or per group."""
        n, k = piece.stored_NK
        part = piece.part(Role.BLOCK_SCALE)
        assert part is not None, "it is one of the piece's roles"
        count = prod(self._stored.tensors[part.ref.name].shape)
        rows, columns = map(int, piece.encoding.option("block", "128x128").split("x"))
        if piece.encoding.name in ("fp8", "int8") and count == -(-n // rows) * -(-k // columns):
            return {"strategy": "block", "block_structure": [rows, columns]}
        if n * k % count or count % n:
            raise FormatError(
                f"{name!r} has {count} scales for {[n, k]}, no whole groups of columns"
            )
        return {"strategy": "group", "group_size": n * k // count}


def _require_inverse(weight: Joined) -> None:
    if weight.piece.encoding == Encoding("nvfp4"):
        raise FormatError(
            f"{weight.name!r} has a tensor scale that multiplies, {METHOD} stores its inverse, which "
            "no float32 is exactly",
            hint="build_modelopt_nvfp4_transformer --from-bf16 --dialect compressed_tensors makes one",
        )


def _require_whole_groups(weight: Joined, grouping: Mapping[str, object]) -> None:
    group, k = grouping.get("group_size"), len(weight.piece.cols)
    if isinstance(group, int) and k % group:
        raise FormatError(f"{weight.name!r} has K {k}, {METHOD} needs whole groups of {group}")


def _recoded(recode: Recode) -> dict[str, object]:
    if recode.granularity == "block":
        return {"strategy": "block", "block_structure": [recode.group or 128] * 2}
    return {"strategy": "group", "group_size": recode.group}


def _parts(storage: Storage, piece: Piece, strategy: str) -> tuple[Outgoing, ...]:
    column: Literal["column"] | None = "column" if strategy == "channel" else None
    scale = Outgoing(
        role=SCALE_ROLES[strategy],
        tensor="weight_scale",
        dtype=storage.scale_dtype,
        axes="one" if strategy == "tensor" else column,
    )
    outer = Outgoing(role=Role.TENSOR_SCALE, tensor="weight_global_scale", dtype="F32", axes="one")
    zeros = Outgoing(role=Role.ZERO_POINT, tensor="weight_zero_point", dtype="I8", axes=column)
    if storage.packed is not None:
        layout = words(storage.packed, "rows")
        zeros = replace(zeros, dtype="I32", layout=layout, axes=None)
    number = "" if piece.activation is None else piece.activation.number.partition(";")[0]
    told = "input_global_scale" if number == "nvfp4" else "input_scale"
    return (
        storage.codes,
        scale,
        *((outer,) if strategy == "tensor_group" else ()),
        zeros,
        Outgoing(role=Role.GROUP_INDEX, tensor="weight_g_idx", dtype="I32"),
        Outgoing(role=Role.INPUT_SCALE, tensor=told, dtype="F32", axes="one"),
        Outgoing(role=Role.INPUT_ZERO_POINT, tensor="input_zero_point", dtype="I8", axes="one"),
        BIAS,
    )


def _inputs(name: str, piece: Piece) -> dict[str, object] | None:
    activation = piece.activation
    if activation is None:
        return None
    number, _, options = activation.number.partition(";")
    if number not in INPUTS or options not in ("", "tensor_scale=divide"):
        raise FormatError(f"{name!r} has inputs {activation}, for which {METHOD} has no word")
    spelled = {"strategy": activation.granularity, "group_size": activation.group, **INPUTS[number]}
    return {
        **spelled,
        "symmetric": activation.symmetric,
        "dynamic": _dynamic(activation),
    }


def _dynamic(activation: Activation) -> bool | str:
    """Groups under a stored scale quantize by themselves: that is `local`."""
    if activation.mode == "dynamic":
        return True
    return "local" if activation.granularity == "group" else False
