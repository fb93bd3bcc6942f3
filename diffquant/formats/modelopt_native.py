"""NVIDIA ModelOpt's native saves: `save_pretrained` with live quantizers, read from tensors alone.

`mto.enable_huggingface_checkpointing()` leaves no quantization_config. Beside each linear X lie the
buffers of its quantizers, and a pickled modelopt_state.pth that nothing here opens. After
`mtq.compress`, X is decided by these:

    X.weight           X.weight_quantizer._scale     encoding    activation
    F8_E4M3 [N, K]     BF16 ()                       fp8         fp8 per tensor
    F8_E4M3 [N, K]     BF16 [N, 1]                   fp8         fp8 per token
    F8_E4M3 [N, K]     U8 [N, K/32]                  mxfp8       dynamic groups of 32
    I8 [N, K]          BF16 [N, 1]                   int8        int8 per tensor
    U8 [N, K/2]        F8_E4M3 [N, K/16]             nvfp4       nvfp4; _double_scale multiplies

FP8 and INT8 scales are rounded to the model's dtype, and codes were made with the rounded ones. Beside
any of them: X.input_quantizer._pre_quant_scale [K] multiplies the input, X.weight_quantizer.
svdquant_lora_a [R, K] and _b [N, R] are a low-rank branch on the scaled input. X.input_quantizer._amax
is a range and no scale, so inputs are quantized by their own range instead of the calibrated one, and
not at all where a quantizer left no range. Without `mtq.compress` weights are still plain and only
ranges are stored: such a file is refused, because nothing in it is quantized yet.

Source: nvidia-modelopt 0.47.0 run on tiny models (tests/oracle/write_modelopt_native_cases.py).
"""

from collections.abc import Iterator, Mapping
from math import prod

from diffquant.errors import FormatError
from diffquant.formats import Format, Hints, Reading, StoredLayer, StoredPart
from diffquant.formats._scales import scale_role
from diffquant.headers import Header, Tensor
from diffquant.plan import DENSE, Activation, Encoding, Role
from diffquant.sources import Checkpoint

RANGE = ".weight_quantizer._amax"
SCALE = ".weight_quantizer._scale"
INPUT_RANGE = ".input_quantizer._amax"

#: Extra tensors of a layer: ending -> role.
EXTRAS: Mapping[str, Role] = {
    ".weight_quantizer._double_scale": Role.TENSOR_SCALE,
    ".input_quantizer._pre_quant_scale": Role.SMOOTH,
    ".weight_quantizer.svdquant_lora_a": Role.LOWRANK_DOWN,
    ".weight_quantizer.svdquant_lora_b": Role.LOWRANK_UP,
    ".bias": Role.BIAS,
}
#: (dtype of the codes, dtype of the scale) of what `mtq.compress` writes, where they tell it all.
BLOCKED: Mapping[tuple[str, str], str] = {("F8_E4M3", "U8"): "mxfp8", ("U8", "F8_E4M3"): "nvfp4"}
SCALED: Mapping[str, str] = {"F8_E4M3": "fp8", "I8": "int8"}


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    if "quantization_config" in checkpoint.config:
        return None
    found = next((name for name in header.tensors if name.endswith((SCALE, RANGE))), None)
    return None if found is None else f"{found!r} is the buffer of a live ModelOpt quantizer"


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    names = [name.removesuffix(SCALE) for name in header.tensors if name.endswith(SCALE)]
    if not names:
        raise FormatError(
            f"{checkpoint.origin!r} is a ModelOpt save that was never compressed: its weights are "
            "plain, and the ranges beside them only say how they would be quantized",
            hint="diffquant convert build_modelopt_fp8_transformer --modelopt-hf-dir DIR --output-dir OUT, "
            "or call modelopt.torch.quantization.compress(model) before saving",
        )
    changed = [
        name.removesuffix(ending)
        for ending, role in EXTRAS.items()
        for name in header.tensors
        if name.endswith(ending) and role is not Role.BIAS
    ]
    layers = tuple(_layer(name, header) for name in dict.fromkeys([*names, *changed]))
    return Reading(
        layers=layers,
        unused={
            name: _unused(name, {layer.name for layer in layers})
            for name in header.tensors
            if name.endswith("_quantizer._amax")
        },
        notes=tuple(_notes(layers, header)),
    )


def _layer(name: str, header: Header) -> StoredLayer:
    encoding, stored_NK, parts = _numbers(name, header)
    for ending, role in EXTRAS.items():
        if name + ending in header.tensors:
            parts = (*parts, StoredPart(role, name + ending))
    roles = {part.role for part in parts}
    return StoredLayer(
        name=name,
        stored_NK=stored_NK,
        encoding=encoding,
        parts=parts,
        activation=_activation(encoding, roles, f"{name}{INPUT_RANGE}" in header.tensors),
        smooth="multiply" if Role.SMOOTH in roles else None,
        lowrank_input="smoothed" if Role.LOWRANK_DOWN in roles else None,
        why=f"stored with {name}.weight_quantizer",
    )


def _numbers(name: str, header: Header) -> tuple[Encoding, tuple[int, int], tuple[StoredPart, ...]]:
    """Encoding, logical shape and weight-side parts of one layer, from dtypes and shapes."""
    weight = _tensor(f"{name}.weight", header)
    rows, columns = weight.shape[0], prod(weight.shape[1:])
    codes = StoredPart(Role.CODES, weight.name)
    if name + SCALE not in header.tensors:
        return DENSE, (rows, columns), (codes,)
    scale = header.tensors[name + SCALE]
    blocked = BLOCKED.get((weight.dtype, scale.dtype))
    if blocked is not None:
        width = 2 * columns if blocked == "nvfp4" else columns
        return Encoding(blocked), (rows, width), (codes, StoredPart(Role.BLOCK_SCALE, scale.name))
    role = scale_role(scale, rows)
    if weight.dtype not in SCALED or role is Role.BLOCK_SCALE:
        raise FormatError(
            f"{weight.name!r} is {weight.dtype} {list(weight.shape)} beside a {scale.dtype} scale of "
            f"{list(scale.shape)}, which is none of fp8, int8, mxfp8 and nvfp4",
            hint="export it with modelopt.torch.export.export_hf_checkpoint instead",
        )
    return Encoding(SCALED[weight.dtype]), (rows, columns), (codes, StoredPart(role, scale.name))


def _tensor(name: str, header: Header) -> Tensor:
    if name not in header.tensors:
        raise FormatError(f"quantizer buffers speak of {name!r}, which the file does not hold")
    return header.tensors[name]


def _activation(encoding: Encoding, roles: set[Role], calibrated: bool) -> Activation | None:
    if encoding.name == "mxfp8":
        return Activation(number="mxfp8", granularity="group", group=32, mode="dynamic")
    if encoding == DENSE:
        return None
    if encoding.name == "fp8" and Role.CHANNEL_SCALE in roles:
        return Activation(number="fp8", granularity="token", mode="dynamic")
    if not calibrated:
        return None
    if encoding.name == "nvfp4":
        return Activation(number="nvfp4", granularity="group", group=16, mode="dynamic")
    return Activation(number=encoding.name, granularity="tensor", mode="dynamic")


def _unused(name: str, layers: set[str]) -> str:
    if name.removesuffix(RANGE) in layers:
        return "the range the weight's scale was made from"
    if name.removesuffix(INPUT_RANGE) in layers:
        return "a calibrated range; inputs are quantized by their own"
    return "a range left by a quantizer that is declared, not applied"


def _notes(layers: tuple[StoredLayer, ...], header: Header) -> Iterator[str]:
    ranged = [layer.name for layer in layers if f"{layer.name}{INPUT_RANGE}" in header.tensors]
    if ranged:
        yield (
            f"{len(ranged)} layers store a calibrated input range and quantize dynamically instead, "
            f"first {ranged[0]!r}"
        )
    known = {layer.name for layer in layers if layer.encoding != DENSE}
    plain = [
        name.removesuffix(RANGE)
        for name in header.tensors
        if name.endswith(RANGE) and name.removesuffix(RANGE) not in known
    ]
    if plain:
        yield f"{len(plain)} quantized layers were left uncompressed and run plain, first {plain[0]!r}"


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    encodings=("fp8", "nvfp4", "mxfp8", "int8"),
    proof="true files",
)
