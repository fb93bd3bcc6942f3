"""NVIDIA ModelOpt's exports of diffusers transformers (nvidia-modelopt 0.42 to 0.47).

Per linear X, decided by the tensors that are there and not by the configuration, because one file
mixes algorithms and `ignore` does not mean "plain" (a smoothed layer may be ignored):

    X.weight           X.weight_scale               encoding     activation
    F8_E4M3 [N, K]     F32 ()                       fp8          static if X.input_scale, else dynamic
    F8_E4M3 [N, K]     F32 [N]                      fp8          dynamic per token
    F8_E4M3 [N, K]     F32 [N/128, 1, K/128, 1]     fp8 blocks   none
    F8_E4M3 [N, K]     U8 [N, K/32]                 mxfp8        dynamic groups of 32
    U8 [N, K/2]        F8_E4M3 [N, K/16]            nvfp4        nvfp4; X.weight_scale_2 multiplies
    U8 [N, K/2]        F8_E4M3 [N, K/32]            nvfp4        fp8 (W4A8_NVFP4_FP8)
    U8 [N, K/2]        U8 [N, K/32]                 mxfp4        dynamic groups of 32
    U8 [N/2, K]        F32 [N, K/128]               int4 AWQ     none, or fp8 (W4A8)
    I8 [N, K]          F32 [N]                      int8         static if X.input_scale; none for W8A16

Beside any of them, dense weights included: X.pre_quant_scale [K] multiplies the input, and
X.svdquant_lora_a [R, K], X.svdquant_lora_b [N, R] are a low-rank branch on the scaled input.
All scales multiply. The proof is `quant_method: modelopt` in config.json, hf_quant_config.json or
the header. Block scales may have been swizzled or padded without a mark (releases from 0.45 on);
where shape does not tell, the order is left open.

Source: running the exporter; what is read from its releases is said where it matters.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

from diffquant.errors import FormatError
from diffquant.formats import (
    Export,
    Format,
    Hints,
    Outgoing,
    Reading,
    StoredLayer,
    StoredPart,
)
from diffquant.formats._json import json_object
from diffquant.formats._outgoing import (
    BIAS,
    PLAIN_LINEAR,
    Joined,
    Spelling,
    exported,
    joined,
    naming_of,
    spelled_layer,
)
from diffquant.formats._scale_orders import agreed, block_scale
from diffquant.formats._scales import scale_role
from diffquant.headers import Header, Tensor
from diffquant.plan import DENSE, ROW_MAJOR, Activation, Encoding, Layout, Piece, Plan, Role
from diffquant.sources import Checkpoint

METHODS = ("modelopt", "modelopt_fp8", "modelopt_fp4")

#: Algorithms whose activations stay in high precision, in any spelling the exporter uses.
WEIGHT_ONLY = frozenset({"W4A16_NVFP4", "W4A16_AWQ", "W8A16", "FP8_PB_WO"})
#: Algorithms whose activations are fp8 whatever the weight is.
FP8_ACTIVATIONS = frozenset({"W4A8_NVFP4_FP8", "W4A8_AWQ", "W4A8_AWQ_BETA"})

#: Extra tensors of a layer: ending -> role.
EXTRAS: Mapping[str, Role] = {
    "weight_scale_2": Role.TENSOR_SCALE,
    "input_scale": Role.INPUT_SCALE,
    "pre_quant_scale": Role.SMOOTH,
    "svdquant_lora_a": Role.LOWRANK_DOWN,
    "svdquant_lora_b": Role.LOWRANK_UP,
    "bias": Role.BIAS,
}
QUANTIZED = frozenset({"F8_E4M3", "F8_E5M2", "U8", "I8"})
STRAY = re.compile(r"\.[a-z0-9_]*quantizer\._amax$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What the file says of itself, whichever of its places says it.

    algorithm   of all layers, upper case; None when the export quantized nothing
    per_layer   MIXED_PRECISION: layer -> algorithm
    ignore      patterns: a trailing * is a raw prefix
    where       the file and key it was read from
    swapped     SGLang's converter marks packed weights whose even column is in the high nibble
    """

    algorithm: str | None
    where: str
    per_layer: Mapping[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    producer: str | None = None
    kv_cache: bool = False
    weight_only: bool = False
    swapped: bool = False

    def of(self, layer: str) -> str | None:
        return self.per_layer.get(layer, self.algorithm)


def declared(checkpoint: Checkpoint, header: Header) -> Declaration | None:
    """The first ModelOpt declaration found in config.json, hf_quant_config.json, header metadata."""
    for where, block in _declarations(checkpoint, header):
        if block.get("quant_method") in METHODS:
            return _declaration(where, block)
    return None


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    found = declared(checkpoint, header)
    if found is None:
        return None
    algorithm = found.algorithm or "no quant_algo"
    return f"{found.where} says quant_method modelopt, {algorithm}"


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    declaration = declared(checkpoint, header)
    assert declaration is not None, "read is called only where evidence was found"
    if declaration.swapped and hints.nibbles is None:
        hints = replace(hints, nibbles="high")
    read = tuple(_layer(name, header, declaration, hints) for name in _layer_names(header))
    layers, questions = agreed(read, header, hints)
    stray = {
        name: "an amax left by a quantizer that is declared, not applied"
        for name in header.tensors
        if STRAY.search(name)
    }
    return Reading(
        layers=layers,
        unused=stray,
        open=questions,
        notes=tuple(_notes(declaration, layers, header)),
        naming=None,
    )


def _declarations(
    checkpoint: Checkpoint, header: Header
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every quantization block, with the place it was found in."""
    block = checkpoint.config.get("quantization_config")
    if isinstance(block, Mapping):
        yield "config.json quantization_config", block
    side = checkpoint.sidecars.get("hf_quant_config.json")
    if side is not None:
        yield (
            "hf_quant_config.json",
            _nested(json_object(side.read_text("utf-8", "replace"), str(side))),
        )
    text = header.metadata.get("quantization_config")
    if text is not None:
        yield "header metadata quantization_config", _nested(json_object(text, "header metadata"))


def _nested(block: Mapping[str, Any]) -> Mapping[str, Any]:
    """hf_quant_config.json nests what config.json has flat, under other names."""
    inner = block.get("quantization")
    if not isinstance(inner, Mapping):
        return block
    return {
        "quant_method": "modelopt",
        "ignore": inner.get("exclude_modules", []),
        "producer": block.get("producer", {}),
        **inner,
    }


def _declaration(where: str, block: Mapping[str, Any]) -> Declaration:
    producer = block.get("producer") or {}
    groups = list(_objects(block, "config_groups", where).values())
    algorithm = block.get("quant_algo")
    layers = _objects(block, "quantized_layers", where)
    ignore = block.get("ignore") or ()
    if not isinstance(ignore, list | tuple) or not all(isinstance(name, str) for name in ignore):
        raise FormatError(f"{where} has {ignore!r:.60} as `ignore`, a list of names was needed")
    return Declaration(
        algorithm=str(algorithm).upper() if algorithm else None,
        where=where,
        per_layer={name: str(layer.get("quant_algo")).upper() for name, layer in layers.items()},
        ignore=tuple(ignore),
        producer=producer.get("version") if isinstance(producer, Mapping) else None,
        kv_cache=bool(block.get("kv_cache_scheme")),
        swapped=bool(block.get("swap_weight_nibbles")),
        weight_only=bool(groups) and all("input_activations" not in group for group in groups),
    )


def _objects(block: Mapping[str, Any], key: str, where: str) -> Mapping[str, Mapping[str, Any]]:
    """An object of objects, {} where the key is absent."""
    found = block.get(key) or {}
    if not isinstance(found, Mapping) or not all(isinstance(v, Mapping) for v in found.values()):
        raise FormatError(f"{where} has {found!r:.60} as `{key}`, an object of objects was needed")
    return found


def _layer_names(header: Header) -> Iterator[str]:
    """Layers with a quantized weight, or a dense one that is smoothed or has a low-rank branch."""
    for name, tensor in header.tensors.items():
        if not name.endswith(".weight"):
            continue
        layer = name.removesuffix(".weight")
        changed = (f"{layer}.pre_quant_scale", f"{layer}.svdquant_lora_a")
        if tensor.dtype in QUANTIZED or any(key in header.tensors for key in changed):
            yield layer


def _layer(name: str, header: Header, declaration: Declaration, hints: Hints) -> StoredLayer:
    weight = header.tensors[f"{name}.weight"]
    scale = header.tensors.get(f"{name}.weight_scale")
    encoding, stored_NK, parts = _numbers(name, weight, scale, hints)
    for ending, role in EXTRAS.items():
        if f"{name}.{ending}" in header.tensors:
            parts = (*parts, StoredPart(role, f"{name}.{ending}"))
    roles = {part.role for part in parts}
    return StoredLayer(
        name=name,
        stored_NK=stored_NK,
        encoding=encoding,
        parts=parts,
        activation=_activation(encoding, roles, declaration, name),
        smooth="multiply" if Role.SMOOTH in roles else None,
        lowrank_input="smoothed" if Role.LOWRANK_DOWN in roles else None,
        why=f"{declaration.where} {declaration.of(name) or ''}".strip(),
    )


Numbers = tuple[Encoding, tuple[int, int], tuple[StoredPart, ...]]


def _numbers(name: str, weight: Tensor, scale: Tensor | None, hints: Hints) -> Numbers:
    """Encoding, logical shape and weight-side parts of one layer, from dtypes and shapes."""
    if len(weight.shape) < 2 or (weight.dtype == "U8" and len(weight.shape) > 2):
        raise FormatError(f"{weight.name!r} is {weight.dtype} of {list(weight.shape)}, not [N, K]")
    # A convolution's weight is a matrix of N filters; the planner decodes it.
    rows, columns = weight.shape[0], prod(weight.shape[1:])
    codes = StoredPart(Role.CODES, weight.name, _codes_layout(hints))
    if weight.dtype not in QUANTIZED:
        return DENSE, (rows, columns), (StoredPart(Role.CODES, weight.name),)
    if scale is None:
        # The audit names the missing scale; nothing is invented for it.
        return _unscaled(weight), (rows, columns), (codes,)
    if weight.dtype == "U8":
        return _packed(weight, scale, codes, hints)
    plain = StoredPart(Role.CODES, weight.name)
    if scale.dtype in ("U8", "F8_E8M0"):
        parts = (plain, block_scale(scale, (rows, -(-columns // 32)), hints))
        return Encoding("mxfp8"), (rows, columns), parts
    number = {"I8": Encoding("int8"), "F8_E5M2": Encoding("fp8", (("kind", "e5m2"),))}
    encoding = number.get(weight.dtype, Encoding("fp8"))
    return encoding, (rows, columns), (plain, StoredPart(scale_role(scale, rows), scale.name))


def _unscaled(weight: Tensor) -> Encoding:
    names = {"U8": "nvfp4", "I8": "int8"}
    return Encoding(names.get(weight.dtype, "fp8"))


def _packed(weight: Tensor, scale: Tensor, codes: StoredPart, hints: Hints) -> Numbers:
    """Two 4-bit codes per byte: columns paired (nvfp4, mxfp4) or rows paired (int4 AWQ)."""
    rows, width = weight.shape
    if scale.dtype == "F32":
        paired = StoredPart(Role.CODES, weight.name, Layout("rows_paired"))
        return Encoding("int4"), (2 * rows, width), (paired, _plain_scale(scale))
    columns = 2 * width
    if scale.dtype in ("U8", "F8_E8M0"):
        return (
            Encoding("mxfp4"),
            (rows, columns),
            (codes, block_scale(scale, (rows, -(-columns // 32)), hints)),
        )
    block = 32 if scale.shape[-1:] == (columns // 32,) and columns % 32 == 0 else 16
    encoding = Encoding("nvfp4", () if block == 16 else (("block", "32"),))
    return (
        encoding,
        (rows, columns),
        (codes, block_scale(scale, (rows, -(-columns // block)), hints)),
    )


def _plain_scale(scale: Tensor) -> StoredPart:
    return StoredPart(Role.BLOCK_SCALE, scale.name)


def _codes_layout(hints: Hints) -> Layout:
    return Layout("row_major", (("nibbles", "high"),)) if hints.nibbles == "high" else ROW_MAJOR


def _activation(
    encoding: Encoding, roles: set[Role], declaration: Declaration, name: str
) -> Activation | None:
    """How inputs must be quantized. A missing input_scale makes a static scheme dynamic."""
    algorithm = declaration.of(name) or ""
    if encoding == DENSE or algorithm in WEIGHT_ONLY or declaration.weight_only:
        return None
    mode: Literal["static", "dynamic"] = "static" if Role.INPUT_SCALE in roles else "dynamic"
    if encoding.name in ("mxfp8", "mxfp4"):
        return Activation(number=encoding.name, granularity="group", group=32, mode="dynamic")
    if algorithm in FP8_ACTIVATIONS:
        return Activation(number="fp8", granularity="tensor", mode=mode)
    if encoding.name == "nvfp4":
        return Activation(number="nvfp4", granularity="group", group=16, mode=mode)
    if encoding.name == "int4" or Role.BLOCK_SCALE in roles:
        return None
    if Role.CHANNEL_SCALE in roles and encoding.name == "fp8":
        return Activation(number="fp8", granularity="token", mode="dynamic")
    if encoding.name == "int8" and mode == "dynamic" and not algorithm.startswith("W8A8"):
        return None
    return Activation(number=encoding.name, granularity="tensor", mode=mode)


def _notes(
    declaration: Declaration, layers: tuple[StoredLayer, ...], header: Header
) -> Iterator[str]:
    quantized = [layer for layer in layers if layer.encoding != DENSE]
    if not quantized:
        yield (
            f"{declaration.where} names ModelOpt, but no weight in the file is quantized: exporters "
            "before 0.45 wrote plain weights for some families"
        )
    dynamic = [
        layer.name
        for layer in quantized
        if layer.activation is not None
        and (layer.activation.granularity == "tensor" or layer.activation.number == "nvfp4")
        and layer.activation.mode == "dynamic"
    ]
    if dynamic:
        yield f"{len(dynamic)} layers lack input_scale and quantize dynamically, first {dynamic[0]!r}"
    if declaration.kv_cache:
        yield "attention quantizers are declared (kv_cache_scheme), and not applied"
    yield from _lost_smoothing(declaration, layers)


def _lost_smoothing(declaration: Declaration, layers: tuple[StoredLayer, ...]) -> Iterator[str]:
    """Releases up to 0.45 dropped pre_quant_scale while the algorithm still says it was used."""
    smoothed = any(layer.smooth for layer in layers)
    algorithm = declaration.algorithm or ""
    if smoothed or not layers:
        return
    if algorithm in ("NVFP4_SVD", "NVFP4_AWQ", "W4A16_AWQ", "W4A8_AWQ"):
        raise FormatError(
            f"quant_algo {algorithm} smooths its layers, and the file holds no pre_quant_scale "
            f"(written by ModelOpt {declaration.producer or 'of unknown version'})",
            hint="export again with nvidia-modelopt >= 0.46; releases up to 0.45 lose these tensors",
        )
    if algorithm == "W8A8_SQ_PER_CHANNEL" and _older(declaration.producer, (0, 46)):
        yield (
            f"written by ModelOpt {declaration.producer}, which loses SmoothQuant's scales: if the "
            "export was smoothed, its pictures will be wrong and nothing in the file can tell"
        )


def _older(version: str | None, than: tuple[int, int]) -> bool:
    numbers = re.findall(r"\d{1,9}", str(version or ""))[:2]
    return len(numbers) == 2 and (int(numbers[0]), int(numbers[1])) < than


# the way out ---------------------------------------------------------------------------------------

WHO = "modelopt"
INPUTS = (
    Outgoing(role=Role.INPUT_SCALE, tensor="input_scale", dtype="F32"),
    Outgoing(role=Role.SMOOTH, tensor="pre_quant_scale"),
    Outgoing(role=Role.LOWRANK_DOWN, tensor="svdquant_lora_a"),
    Outgoing(role=Role.LOWRANK_UP, tensor="svdquant_lora_b"),
    BIAS,
)


def _spelling(*parts: Outgoing) -> Spelling:
    return Spelling(parts=(*parts, *INPUTS), smooth="multiply", lowrank_input="smoothed")


def _codes(dtype: str, layout: Layout = ROW_MAJOR) -> Outgoing:
    return Outgoing(role=Role.CODES, tensor="weight", dtype=dtype, layout=layout)


def _scale(role: Role, dtype: str, ending: str = "weight_scale") -> Outgoing:
    return Outgoing(role=role, tensor=ending, dtype=dtype)


def _float8(dtype: str) -> Spelling:
    return _spelling(
        _codes(dtype),
        _scale(Role.TENSOR_SCALE, "F32"),
        _scale(Role.CHANNEL_SCALE, "F32"),
        Outgoing(role=Role.BLOCK_SCALE, tensor="weight_scale", dtype="F32", axes="blocks"),
    )


NVFP4 = _spelling(
    _codes("U8"),
    _scale(Role.BLOCK_SCALE, "F8_E4M3"),
    _scale(Role.TENSOR_SCALE, "F32", "weight_scale_2"),
)
#: Scaling by ones is stored where nothing is smoothed: the algorithm's readers ask for it.
INT4_AWQ = Spelling(
    parts=(
        _codes("U8", Layout("rows_paired")),
        _scale(Role.BLOCK_SCALE, "F32"),
        _scale(Role.TENSOR_SCALE, "F32", "weight_scale_2"),
        *(replace(part, filled=1.0) if part.role is Role.SMOOTH else part for part in INPUTS),
    ),
    smooth="multiply",
    lowrank_input="smoothed",
)
SPELLINGS: Mapping[str, Spelling] = {
    "dense": replace(_spelling(), parts=(PLAIN_LINEAR[0], *INPUTS)),
    "fp8": _float8("F8_E4M3"),
    "fp8;kind=e5m2": _float8("F8_E5M2"),
    "nvfp4": NVFP4,
    "nvfp4;block=32": NVFP4,
    "mxfp8": _spelling(_codes("F8_E4M3"), _scale(Role.BLOCK_SCALE, "U8")),
    "mxfp4": _spelling(_codes("U8"), _scale(Role.BLOCK_SCALE, "U8")),
    "int8": _spelling(
        _codes("I8"), _scale(Role.TENSOR_SCALE, "F32"), _scale(Role.CHANNEL_SCALE, "F32")
    ),
    "int4": INT4_AWQ,
}
#: Encoding, what its inputs become, a part that must be there, and the algorithm's name. The first
#: row that fits counts.
ALGORITHMS: tuple[tuple[str, str | None, Role | None, str], ...] = (
    ("fp8", "fp8", Role.CHANNEL_SCALE, "FP8_PER_CHANNEL_PER_TOKEN"),
    ("fp8", "fp8", None, "FP8"),
    ("fp8", None, None, "FP8_PB_WO"),
    ("nvfp4", "nvfp4", Role.LOWRANK_DOWN, "NVFP4_SVD"),
    ("nvfp4", "nvfp4", Role.SMOOTH, "NVFP4_AWQ"),
    ("nvfp4", "nvfp4", None, "NVFP4"),
    ("nvfp4", "fp8", None, "W4A8_NVFP4_FP8"),
    ("nvfp4", None, None, "W4A16_NVFP4"),
    ("mxfp8", "mxfp8", None, "MXFP8"),
    ("mxfp4", "mxfp4", None, "MXFP4"),
    ("int8", "int8", None, "W8A8_SQ_PER_CHANNEL"),
    ("int8", None, None, "W8A16"),
    ("int4", "fp8", None, "W4A8_AWQ"),
    ("int4", None, None, "W4A16_AWQ"),
)


def _write(plan: Plan) -> Export:
    naming = naming_of(plan, ("diffusers",), WHO)
    weights = joined(plan, naming, WHO)
    layers = tuple(
        spelled_layer(each, SPELLINGS.get(str(each.piece.encoding)), WHO) for each in weights
    )
    return exported(plan, layers, naming, config={"quantization_config": _block(weights)})


def _block(weights: tuple[Joined, ...]) -> dict[str, object]:
    """What the configuration says: one algorithm, or a list of layers where there are several."""
    named = {each.name: _algorithm(each) for each in weights if each.piece.encoding != DENSE}
    found = sorted(set(named.values()))
    block: dict[str, object] = {
        "quant_method": "modelopt",
        "quant_algo": found[0] if len(found) == 1 else "MIXED_PRECISION" if found else None,
        "ignore": [each.name for each in weights if each.name not in named],
        "producer": {"name": "diffquant"},
    }
    if len(found) > 1:
        block["quantized_layers"] = {name: {"quant_algo": said} for name, said in named.items()}
    return block


def _algorithm(weight: Joined) -> str:
    piece = weight.piece
    for encoding, number, role, name in ALGORITHMS:
        if (encoding, number) == (piece.encoding.name, _number(piece)) and (
            role is None or role in piece.roles
        ):
            return name
    raise FormatError(
        f"{weight.name!r} is {piece.encoding} with {piece.activation or 'plain'} inputs, for which "
        "ModelOpt has no algorithm"
    )


def _number(piece: Piece) -> str | None:
    return None if piece.activation is None else Encoding(piece.activation.number).name


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    # True files carry Comfy's layer metadata too, and old exports may hold plain weights only.
    explains=frozenset({"bfl", "comfy", "diffusers", "fp8"}),
    encodings=("fp8", "nvfp4", "mxfp8", "mxfp4", "int8", "int4"),
    proof="true files",
    write=_write,
)
