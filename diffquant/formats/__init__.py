"""On-disk dialects: one file each. A format says what proves it and what its tensors mean.

A format speaks in the file's own names and knows no family; the planner lays its layers over one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from diffquant.headers import Header
from diffquant.plan import (
    ROW_MAJOR,
    Activation,
    Encoding,
    Layout,
    Piece,
    Plan,
    Recode,
    Role,
    Rotation,
)
from diffquant.plugins import Registry
from diffquant.sources import Checkpoint


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A tensor of the file in its role; `tensor` is the full stored name."""

    role: Role
    tensor: str
    layout: Layout = ROW_MAJOR


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLayer:
    """One stored weight, in the file's own names. Fields mean what they mean in `plan.Piece`.

    name       the stored module name (without `.weight` or `.qweight`)
    stored_NK  logical shape [N, K], padding included
    interleaved  rows of modulation chunks are stored as channel * S + chunk
    plus_one     the bias of the scale chunks has 1 added in the file
    gelu_shift   constant the file expects on the input where the family says GELU feeds the layer
    """

    name: str
    stored_NK: tuple[int, int]
    encoding: Encoding
    parts: tuple[StoredPart, ...]
    why: str
    activation: Activation | None = None
    smooth: Literal["multiply", "divide"] | None = None
    rotation: Rotation | None = None
    lowrank_input: Literal["raw", "smoothed"] | None = None
    interleaved: bool = False
    plus_one: bool = False
    gelu_shift: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPart:
    """A role whose physical order only data can tell, for all layers named."""

    topic: str
    role: Role
    layouts: tuple[Layout, ...]
    layers: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a format makes of a checkpoint. Tensors it does not mention are plain.

    layers   quantized weights, and dense ones that carry smoothing, low rank or rotation
    unused   stored tensor -> why nothing needs it
    naming   the family naming its names follow, when the format knows; None: the planner finds it
    strip    a prefix to remove from every stored name before a naming is applied
    config   a module config the file itself carries (Nunchaku's metadata), {} otherwise
    """

    layers: tuple[StoredLayer, ...]
    unused: Mapping[str, str] = field(default_factory=dict)
    open: tuple[OpenPart, ...] = ()
    notes: tuple[str, ...] = ()
    naming: str | None = None
    strip: str = ""
    config: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """What a person typed that a format may need to know; every field is usually None.

    nibbles, scales   which order 4-bit codes and block scales are in: low|high, linear|tiles
    svdquant          SVDQuant is expected, from the name or typed
    precision, rank   of it, where they are expected too
    raw_fp8           accept float8 weights that have no scale at all
    """

    nibbles: Literal["low", "high"] | None = None
    scales: Literal["linear", "tiles"] | None = None
    svdquant: bool = False
    precision: Literal["int4", "nvfp4"] | None = None
    rank: int | None = None
    raw_fp8: bool = False


NO_HINTS = Hints()


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One dialect.

    evidence   the sentence that proves it (file, key, value), or None; reads content, not presence
    read       checkpoint -> Reading; raises FormatError where the file contradicts its own claim
    explains   other formats whose markers a true file of this one may also carry
    encodings  what its layers may be stored as
    namings    family namings its files follow; empty: any
    proof      what our reading of it was held against: "true files", "owner's library", or
               "from description" where neither could be had
    write      Plan -> Export, the way out; raises FormatError for what the dialect cannot say
    quantize   layers of a dense plan -> their pieces in the units the dialect stores, each with its
               recode; None: every layer is a unit by itself
    """

    evidence: Callable[[Checkpoint, Header], str | None]
    read: Callable[[Checkpoint, Header, Hints], Reading]
    explains: frozenset[str] = frozenset()
    encodings: tuple[str, ...] = ()
    namings: tuple[str, ...] = ()
    proof: Literal["true files", "owner's library", "from description"] = "from description"
    write: "Writer | None" = None
    quantize: "Quantizer | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """One tensor to store: a part of a layer, its full name, its order, and how it looks.

    dtype   as safetensors spells it; None keeps what the plan has. Nothing is ever rounded into it
    axes    "one" stores a scalar as [1], "column" a vector as [N, 1], "blocks" two-dimensional blocks
            as [R, 1, C, 1]
    filled  what fills the tensor where the plan has no such part; None: then there is no tensor
    """

    role: Role
    tensor: str
    layout: Layout = ROW_MAJOR
    dtype: str | None = None
    axes: Literal["one", "column", "blocks"] | None = None
    filled: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutgoingLayer:
    """One weight to store, stacked along N from pieces of the plan.

    members  (module path, index of the piece) in stored order; the row order inside is the reader's
    pad      N and K grow to a multiple of it
    """

    name: str
    members: tuple[tuple[str, int], ...]
    parts: tuple[Outgoing, ...]
    pad: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What a file of a dialect consists of.

    plain      stored tensor -> the plain parameters stacked in it along axis 0
    naming     of the family, which the names follow
    config     config.json of a component folder; None where the dialect is one file by itself
    metadata   entries for the safetensors header
    lossless   None, or what is lost as far as the plan tells
    constants  stored tensor -> whole numbers the dialect wants beside its weights, as int64
    """

    layers: tuple[OutgoingLayer, ...]
    plain: Mapping[str, tuple[str, ...]]
    naming: str
    config: Mapping[str, object] | None
    metadata: Mapping[str, str]
    lossless: str | None = None
    constants: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


Writer = Callable[[Plan], Export]
#: (plan, paths of the layers, what a weight becomes) -> pieces by path
Quantizer = Callable[[Plan, frozenset[str], Recode], Mapping[str, tuple[Piece, ...]]]

FORMATS: Registry[Format] = Registry("diffquant.formats", "FORMAT")
