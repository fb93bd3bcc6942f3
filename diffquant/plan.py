"""The plan: what every layer of one transformer is made of, free of format, device and torch.

A format reads its dialect into stored layers, the planner lays them over a family's modules, and
the result is this one description. Kernels, `dequantize` and faithful numerics all mean the same
equation by it. For each piece of a layer:

    h = x[:, cols] + shift ;   h = h * s  or  h / s   (smooth = multiply | divide) ;   h = R(h)
    y[:, out] += A(h) @ W[take].T + (l @ D.T) @ U.T + bias + bias_offsets

    W      decode(parts) of the stored [N, K] weight;  A  the activation quantization, or identity
    l      x[:, cols] when lowrank_input is "raw", the smoothed h before R when it is "smoothed"
    D, U   lowrank_down [R, K] and lowrank_up [N, R]

Letters: N output features, K input features, G groups along K, R rank. `take` names logical rows
of the stored weight and reaches codes, scales, U and bias together, always after the physical
layout was undone. All spans are half-open.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from typing import Any, Literal

Options = tuple[tuple[str, str], ...]


class Role(StrEnum):
    """What a stored tensor is for. The comment gives its axes once the layout is undone."""

    CODES = "codes"  # N, K (or packed: N, K // 2 bytes, bits 0-3 hold the even column)
    BLOCK_SCALE = "block_scale"  # N, G; or N / 128, K / 128 for two-dimensional blocks
    CHANNEL_SCALE = "channel_scale"  # N
    TENSOR_SCALE = "tensor_scale"  # ()
    OUTER_SCALE = "outer_scale"  # N, K / 512
    INPUT_SCALE = "input_scale"  # ()
    INPUT_ZERO_POINT = "input_zero_point"  # ()
    ZERO_POINT = "zero_point"  # N, G or N
    SMOOTH = "smooth"  # K
    LOWRANK_UP = "lowrank_up"  # N, R
    LOWRANK_DOWN = "lowrank_down"  # R, K
    BIAS = "bias"  # N
    INT_BIAS = "int_bias"  # N
    OUTPUT_SCALE = "output_scale"  # N
    CODEBOOK = "codebook"  # 16
    CORRECTION = "correction"  # N, G
    GROUP_INDEX = "group_index"  # K
    NESTED_SCALE = "nested_scale"  # N, G
    NESTED_MAP = "nested_map"  # 256
    NESTED_OFFSET = "nested_offset"  # ()


#: Roles whose first axis is N, so that `take` cuts them.
ROW_ROLES = frozenset(
    {
        Role.CODES,
        Role.BLOCK_SCALE,
        Role.CHANNEL_SCALE,
        Role.OUTER_SCALE,
        Role.ZERO_POINT,
        Role.LOWRANK_UP,
        Role.BIAS,
        Role.INT_BIAS,
        Role.OUTPUT_SCALE,
        Role.CORRECTION,
        Role.NESTED_SCALE,
    }
)


@dataclass(frozen=True, slots=True)
class Span:
    """Half-open range of rows or columns; `step` > 1 takes every step-th."""

    start: int
    stop: int
    step: int = 1

    def __len__(self) -> int:
        return len(range(self.start, self.stop, self.step))

    def as_slice(self) -> slice:
        return slice(self.start, self.stop, self.step)


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A stored tensor: `file` indexes `Plan.files`."""

    file: int
    name: str


@dataclass(frozen=True, slots=True)
class Layout:
    """Physical order of a stored tensor, and nothing else; the name is a module of `layouts/`."""

    name: str = "row_major"
    options: Options = ()

    def __str__(self) -> str:
        return _spelled(self.name, self.options)


ROW_MAJOR = Layout()


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of a piece: its role, where it lies, how it lies there."""

    role: Role
    ref: TensorRef
    layout: Layout = ROW_MAJOR


@dataclass(frozen=True, slots=True)
class Encoding:
    """How numbers are stored; the name is a module of `encodings/`. `str` is canonical."""

    name: str
    options: Options = ()

    def __str__(self) -> str:
        return _spelled(self.name, self.options)

    def option(self, key: str, default: str) -> str:
        return dict(self.options).get(key, default)


DENSE = Encoding("dense")


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """How a format says inputs must be quantized before the product. No activation = weight-only.

    number       an encoding's name: fp8, int8, int4, nvfp4, mxfp8, mxfp4
    granularity  one scale per tensor, per token (row of x) or per group of `group` columns
    mode         static: the file stores the scale; dynamic: it is taken from each input
    """

    number: str
    granularity: Literal["tensor", "token", "group"]
    mode: Literal["static", "dynamic"]
    group: int | None = None
    symmetric: bool = True
    unsigned: bool = False

    def __str__(self) -> str:
        grain = self.granularity if self.group is None else f"{self.granularity}{self.group}"
        marks = ("" if self.symmetric else ":asymmetric") + (":unsigned" if self.unsigned else "")
        return f"{self.number}:{grain}:{self.mode}{marks}"


@dataclass(frozen=True, slots=True)
class Rotation:
    """Group-wise orthogonal transform of the input: h -> h @ H per `group` columns."""

    kind: Literal["regular_hadamard"]
    group: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recode:
    """Quantize this dense piece to `encoding` while loading; siblings with one key share an amax.

    granularity  of the weight scale: tensor, channel (one per row), group (of `group` columns) or
                 block (of `group` x `group`)
    roles        the parts the quantized piece will have; a bias among them is made too
    rank         of a low-rank branch that carries what the codes lose
    rounds       of refining branch and codes; None: as many as loading has time for
    fused        pieces with one key are encoded as one weight: one D, one smoothing for all
    scale_dtype  what scales (the outer one of two) and a made bias are rounded to; None: float32
    samples      rows of true input of the layer, [M, K], that smoothing is chosen by
    bias_offsets those a dialect stores the bias with: a made one is what comes back from there
    input_amax   largest magnitude calibration saw of the input; INPUT_SCALE is made from it
    arithmetic   whose order of rounding, where tools differ in it
    """

    encoding: Encoding
    granularity: Literal["tensor", "channel", "group", "block"]
    activation: Activation | None
    roles: frozenset[Role]
    group: int | None = None
    shared_amax: str | None = None
    rank: int | None = None
    fused: str | None = None
    scale_dtype: str | None = None
    samples: TensorRef | None = None
    rounds: int | None = None
    bias_offsets: tuple["BiasOffset", ...] = ()
    input_amax: float | None = None
    arithmetic: str = "modelopt"


@dataclass(frozen=True, slots=True)
class BiasOffset:
    """A constant to add to the bias on output rows `rows`, counted after `take`."""

    rows: Span
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One stored weight, or a cut of it, in its place in a layer.

    stored_NK     logical shape of the stored weight, padding included
    take          its rows in the order the module wants them; empty means all rows
    out, cols     where the piece lies in the module's output and input
    skip          stored columns before the first one that is its own
    """

    encoding: Encoding
    stored_NK: tuple[int, int]
    parts: tuple[Part, ...]
    out: Span
    cols: Span
    take: tuple[Span, ...] = ()
    activation: Activation | None = None
    smooth: Literal["multiply", "divide"] | None = None
    shift: float = 0.0
    rotation: Rotation | None = None
    lowrank_input: Literal["raw", "smoothed"] | None = None
    bias_offsets: tuple[BiasOffset, ...] = ()
    recode: Recode | None = None
    skip: int = 0

    def part(self, role: Role) -> Part | None:
        """The part of that role, if the piece has one."""
        return next((part for part in self.parts if part.role is role), None)

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset(part.role for part in self.parts)

    @property
    def runs_as(self) -> Encoding:
        """The encoding that multiplies: the recode's target, else the stored one."""
        return self.encoding if self.recode is None else self.recode.encoding

    @property
    def is_ordinary(self) -> bool:
        """Whether a plain nn.Linear computes exactly this piece."""
        return (
            self.runs_as == DENSE
            and self.smooth is None
            and self.rotation is None
            and self.lowrank_input is None
            and not self.shift
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One linear module: `path` in the diffusers class, weight shape [N, K], pieces, and why."""

    path: str
    shape_NK: tuple[int, int]
    pieces: tuple[Piece, ...]
    dtype: str
    why: str

    @property
    def encodings(self) -> tuple[str, ...]:
        """Distinct encoding names the layer multiplies with, in piece order."""
        return tuple(dict.fromkeys(piece.runs_as.name for piece in self.pieces))

    @property
    def is_ordinary(self) -> bool:
        return all(piece.is_ordinary for piece in self.pieces)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """A parameter that is no linear weight: norm, table, embedding, convolution.

    sources   stored tensors stacked along axis 0 in this order, each with the rows it gives
    encoding  dense, or the encoding of a quantized one, which is decoded while loading
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple["PlainSource", ...]
    dtype: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainSource:
    """One stored tensor (or the parts of a quantized one) that a plain parameter is made from."""

    parts: tuple[Part, ...]
    take: tuple[Span, ...] = ()
    encoding: Encoding = DENSE
    stored_NK: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What only data can answer: which of `layouts` the parts of `role` really have."""

    topic: str
    role: Role
    layouts: tuple[Layout, ...]
    paths: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Problem:
    """What keeps a checkpoint from being a model: the tensor or parameter, and what is wrong."""

    tensor: str
    what: str


@dataclass(frozen=True, slots=True)
class PlanFile:
    """A weights file and its size in bytes."""

    path: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything needed to build one transformer, given a device and kernels.

    config   the diffusers config of the module, with `_class_name`
    evidence sentences that proved the format, each with the file and key it rests on
    notes    what a careful reader should be told (missing scales made dynamic, old exporters …)
    """

    files: tuple[PlanFile, ...]
    format: str
    family: str
    config: Mapping[str, Any]
    layers: tuple[LayerPlan, ...]
    plain: tuple[Plain, ...]
    unused: Mapping[TensorRef, str] = field(default_factory=dict)
    open: tuple[Question, ...] = ()
    evidence: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def layer(self, path: str) -> LayerPlan:
        return next(layer for layer in self.layers if layer.path == path)

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        """Layers with at least one piece that is not dense."""
        return tuple(layer for layer in self.layers if set(layer.encodings) != {DENSE.name})

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the plan; directories do not count."""
        text = json.dumps(to_json(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values: file names without directories, defaults left out, stable order."""
    written = {name: _json(getattr(plan, name)) for name in _names(plan)}
    written["files"] = [
        {"name": file.path.replace("\\", "/").rsplit("/", 1)[-1], "size": file.size}
        for file in plan.files
    ]
    written["unused"] = [
        {"ref": _json(ref), "why": why}
        for ref, why in sorted(plan.unused.items(), key=lambda item: (item[0].file, item[0].name))
    ]
    return written


def _spelled(name: str, options: Options) -> str:
    return ";".join([name, *(f"{key}={value}" for key, value in sorted(options))])


def _names(value: Any) -> Iterator[str]:
    return (item.name for item in fields(value))


def _json(value: Any) -> Any:
    """Dataclasses to objects without their empty fields; canonical strings where there are some."""
    if isinstance(value, Encoding | Activation | Layout):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        pairs = ((name, getattr(value, name)) for name in _names(value))
        return {name: _json(item) for name, item in pairs if item not in (None, (), 0.0, ROW_MAJOR)}
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, frozenset):
        return sorted(str(item) for item in value)
    if isinstance(value, tuple | list):
        return [_json(item) for item in value]
    return value
