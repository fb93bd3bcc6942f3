"""ComfyUI's formats as data: codes, what lies beside them, and what becomes of inputs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from diffquant.plan import ROW_MAJOR, Activation, Encoding, Layout, Role

TILES = Layout("tiles_128x4")
TRANSPOSED = Layout("transposed")
NIBBLES_HIGH = Layout("row_major", (("nibbles", "high"),))

FP8_ENCODINGS = {
    "F8_E4M3": Encoding("fp8"),
    "F8_E5M2": Encoding("fp8", (("kind", "e5m2"),)),
}
FP8_ACTIVATION = Activation(number="fp8", granularity="tensor", mode="dynamic")
INT8_PER_TOKEN = Activation(number="int8", granularity="token", mode="dynamic")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One of ComfyUI's formats.

    encodings   by dtype of the codes
    parts       what lies beside the codes: ending -> role and layout; no role: the shape tells it
    packed      codes per stored element along K
    activation  dynamic; it becomes static where an input scale is stored
    rotation    whether the weight is rotated: never, when the marker says so, or always
    smooth      what the input does with a smoothing factor, if one is stored
    """

    encodings: Mapping[str, Encoding]
    parts: Mapping[str, tuple[Role | None, Layout]]
    activation: Activation | None
    codes: Layout = ROW_MAJOR
    packed: int = 1
    rotation: Literal["never", "marked", "always"] = "never"
    smooth: Literal["multiply", "divide"] = "multiply"


FP8 = Kind(
    encodings=FP8_ENCODINGS,
    parts={"weight_scale": (None, ROW_MAJOR), "input_scale": (Role.INPUT_SCALE, ROW_MAJOR)},
    activation=FP8_ACTIVATION,
)
INT8 = Kind(
    encodings={"I8": Encoding("int8")},
    parts={"weight_scale": (None, ROW_MAJOR)},
    activation=INT8_PER_TOKEN,
    rotation="marked",
)
KINDS: Mapping[str, Kind] = {
    "float8_e4m3fn": FP8,
    "float8_e5m2": FP8,
    "nvfp4": Kind(
        encodings={"U8": Encoding("nvfp4")},
        parts={
            "weight_scale": (Role.BLOCK_SCALE, TILES),
            "weight_scale_2": (Role.TENSOR_SCALE, ROW_MAJOR),
            "input_scale": (Role.INPUT_SCALE, ROW_MAJOR),
            "pre_quant_scale": (Role.SMOOTH, ROW_MAJOR),
        },
        activation=Activation(number="nvfp4", granularity="group", group=16, mode="dynamic"),
        codes=NIBBLES_HIGH,
        packed=2,
    ),
    "mxfp8": Kind(
        encodings={
            "F8_E4M3": Encoding("mxfp8"),
            "F8_E5M2": Encoding("mxfp8", (("kind", "e5m2"),)),
        },
        parts={"weight_scale": (Role.BLOCK_SCALE, TILES)},
        activation=Activation(number="mxfp8", granularity="group", group=32, mode="dynamic"),
    ),
    "int8_tensorwise": INT8,
    "int8_blockwise": replace(
        INT8,
        activation=Activation(number="int8", granularity="group", group=128, mode="dynamic"),
        rotation="never",
    ),
    "convrot_w4a4": Kind(
        encodings={"I8": Encoding("int4")},
        parts={"weight_scale": (None, ROW_MAJOR)},
        activation=Activation(number="int4", granularity="token", mode="dynamic"),
        packed=2,
        rotation="always",
    ),
    "asym_w4a8_int8": Kind(
        encodings={"I8": Encoding("asym_w4a8")},
        parts={
            "weight_s_rel": (Role.BLOCK_SCALE, ROW_MAJOR),
            "weight_s_channel": (Role.CHANNEL_SCALE, ROW_MAJOR),
            "weight_codebook": (Role.CODEBOOK, ROW_MAJOR),
            "weight_correction": (Role.CORRECTION, TRANSPOSED),
        },
        activation=INT8_PER_TOKEN,
        packed=2,
        rotation="always",
    ),
    "awq_w4a16": Kind(
        encodings={"I8": Encoding("int4", (("signed", "offset"), ("zero", "scaled")))},
        parts={
            "weight_scale": (Role.BLOCK_SCALE, TRANSPOSED),
            "weight_zeros": (Role.ZERO_POINT, TRANSPOSED),
        },
        activation=None,
        packed=2,
    ),
    "svdquant_w4a4": Kind(
        encodings={"I8": Encoding("int4")},
        parts={
            "weight_scale": (Role.BLOCK_SCALE, TRANSPOSED),
            "weight_proj_down": (Role.LOWRANK_DOWN, TRANSPOSED),
            "weight_proj_up": (Role.LOWRANK_UP, ROW_MAJOR),
            "weight_smooth_factor": (Role.SMOOTH, ROW_MAJOR),
        },
        activation=Activation(number="int4", granularity="group", group=64, mode="dynamic"),
        packed=2,
        smooth="divide",
    ),
}
#: Layers of old files, by the dtype of their codes: some writers use the fp8 names for int8.
OLD_KINDS: Mapping[str, Kind] = {
    "scaled_fp8": replace(
        FP8,
        parts={"scale_weight": (None, ROW_MAJOR), "scale_input": (Role.INPUT_SCALE, ROW_MAJOR)},
    ),
    "scaled_int8": replace(INT8, parts={"scale_weight": (None, ROW_MAJOR)}, rotation="never"),
}
