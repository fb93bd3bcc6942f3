"""Black Forest Labs' own exports: FLUX.2 in NVFP4, and the row-wise FP8 and NVFP4 of FLUX.3.

    layer                    X.weight         beside it                              activation
    FLUX.2 nvfp4             U8 [N, K/2]      weight_scale in tiles, weight_scale_2, nvfp4; static
                             even col. high   maybe input_scale                      with input_scale
    FLUX.3 nvfp4             U8 [N, K/2]      weight_scale row-major,                the same
                             even col. low    weight_scale_2, input_scale
    rowwise-float8_e4m3fn    F8_E4M3 [N, K]   weight_scale [N], maybe input_scale    fp8 per token

All scales multiply. A FLUX.2 layer is a ComfyUI nvfp4 layer; what makes the file BFL's is the name
of its fused layers (`double_blocks.0.img_attn.qkv`, `single_blocks.0.linear1`) without a
`comfy_quant` tensor anywhere. The header may name the layers in `_quantization_metadata`
(format_version 1.0; 1.1 for row-wise, with the recipe in `quant_configs`) or say nothing at all. In
the `-mixed` file no layer has an input_scale. FLUX.3 says `quant_method: bfl` in config.json, or
`quantization: nvfp4` in the header, and its shapes settle the order of the scales.

Sources: the published headers and the loaders of SGLang and vLLM-Omni as described in public; no
file was at hand.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from diffquant.errors import FormatError
from diffquant.formats import Export, Format, Hints, Reading, StoredLayer, StoredPart, comfy
from diffquant.formats._comfy_kinds import FP8_ENCODINGS, NIBBLES_HIGH, TILES
from diffquant.formats._comfy_markers import MARKER, METADATA, Marker, metadata_layers
from diffquant.formats._comfy_written import SPELLINGS
from diffquant.formats._outgoing import (
    DENSE_SPELLING,
    Joined,
    Spelling,
    exported,
    joined,
    naming_of,
    spelled_layer,
)
from diffquant.formats._scales import scale_role
from diffquant.headers import Header, Tensor
from diffquant.plan import DENSE, ROW_MAJOR, Activation, Encoding, Layout, Plan, Role
from diffquant.sources import Checkpoint

FUSED = re.compile(
    r"^(double_blocks\.\d+\.(img|txt)_attn\.qkv|single_blocks\.\d+\.linear1)\.weight$"
)
NVFP4 = "nvfp4"
ROWWISE = "rowwise-float8_e4m3fn"
PLAIN = "bf16"
VERSIONS = ("1.0", "1.1")


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    if any(name.endswith(MARKER) for name in header.tensors):
        return None
    return _stated(checkpoint, header) or _layered(header) or _implied(header)


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    modern = _stated(checkpoint, header) is not None
    said = dict(_formats(header))
    proof = _evidence(checkpoint, header) or "the names of its layers"
    layers = tuple(
        _layer(tensor, said, proof, header, _order(modern, hints))
        for tensor in header.tensors.values()
        if _is_narrow(tensor)
    )
    _require_stored(said, layers)
    fused = _fused(header)
    return Reading(layers=layers, naming="bfl" if fused else None)


# evidence ----------------------------------------------------------------------------------------


def _stated(checkpoint: Checkpoint, header: Header) -> str | None:
    """FLUX.3 names itself."""
    block = checkpoint.config.get("quantization_config")
    if isinstance(block, Mapping) and block.get("quant_method") == "bfl":
        return "config.json quantization_config says quant_method bfl"
    if header.metadata.get("quantization") == NVFP4 and _has_nvfp4(header):
        return "header metadata says quantization nvfp4"
    return None


def _layered(header: Header) -> str | None:
    """Metadata of the layers: row-wise anywhere, nvfp4 in a file of fused layers."""
    formats = dict(_formats(header)).values()
    where = f"header metadata {METADATA}"
    if ROWWISE in formats:
        return f"{where} has layers that are {ROWWISE}"
    fused = _fused(header)
    if fused is not None and formats and all(each in (NVFP4, PLAIN) for each in formats):
        return f"{where} has nvfp4 layers and {fused!r} is stored"
    return None


def _implied(header: Header) -> str | None:
    """No word in the header: fused names, and nvfp4 by dtype and scales."""
    fused = _fused(header)
    if fused is None or not _has_nvfp4(header) or METADATA in header.metadata:
        return None
    return f"{fused!r} is stored, with U8 weights, F8_E4M3 block scales and weight_scale_2"


def _formats(header: Header) -> Iterator[tuple[str, str]]:
    for name, said in metadata_layers(header).items():
        yield name, said.get("format", "") if isinstance(said, Mapping) else str(said)


def _fused(header: Header) -> str | None:
    return next((name for name in header.tensors if FUSED.match(name)), None)


def _has_nvfp4(header: Header) -> bool:
    return any(
        tensor.dtype == "U8" and f"{name}_scale_2" in header.tensors
        for name, tensor in header.tensors.items()
        if name.endswith(".weight")
    )


# layers ------------------------------------------------------------------------------------------


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.name.endswith(".weight") and tensor.dtype in ("U8", "F8_E4M3")


def _layer(
    weight: Tensor,
    said: Mapping[str, str],
    proof: str,
    header: Header,
    order: tuple[Layout, Layout | None],
) -> StoredLayer:
    name = weight.name.removesuffix(".weight")
    stated = said.get(name, NVFP4 if weight.dtype == "U8" else ROWWISE)
    if said and name not in said:
        raise FormatError(f"{weight.name!r} is {weight.dtype} and {METADATA} does not name it")
    if stated == ROWWISE:
        _require_rowwise(name, header)
        return _rowwise(name, weight, header, proof)
    if stated != NVFP4 or weight.dtype != "U8":
        raise FormatError(
            f"{weight.name!r} is {weight.dtype} and called {stated!r}",
            hint=f"known are: {NVFP4}, {ROWWISE}, {PLAIN}",
        )
    built = comfy.layer(name, Marker(format=NVFP4, where=proof), header)
    return _reordered(built, header, order, proof)


def _reordered(
    built: StoredLayer, header: Header, order: tuple[Layout, Layout | None], proof: str
) -> StoredLayer:
    """The layer with this file's order of nibbles and scales, the shape's word on scales first."""
    codes, scales = order
    rows, columns = built.stored_NK
    layouts = {Role.CODES: codes}
    for part in built.parts:
        if part.role is Role.BLOCK_SCALE:
            linear = header.tensors[part.tensor].shape == (rows, columns // 16)
            layouts[part.role] = scales if scales is not None and linear else TILES
    parts = tuple(
        StoredPart(part.role, part.tensor, layouts.get(part.role, part.layout))
        for part in built.parts
    )
    return replace(built, parts=parts, why=proof)


def _order(modern: bool, hints: Hints) -> tuple[Layout, Layout | None]:
    """Nibbles, and what scales are where their shape is the plain one."""
    nibbles = hints.nibbles or ("low" if modern else "high")
    scales = hints.scales or ("linear" if modern else "tiles")
    codes = ROW_MAJOR if nibbles == "low" else NIBBLES_HIGH
    return codes, ROW_MAJOR if scales == "linear" else None


def _rowwise(name: str, weight: Tensor, header: Header, proof: str) -> StoredLayer:
    parts = [StoredPart(Role.CODES, weight.name)]
    scale = header.tensors.get(f"{name}.weight_scale")
    if scale is not None:
        parts.append(StoredPart(scale_role(scale, weight.shape[0]), scale.name))
    measured = f"{name}.input_scale" in header.tensors
    if measured:
        parts.append(StoredPart(Role.INPUT_SCALE, f"{name}.input_scale"))
    return StoredLayer(
        name=name,
        stored_NK=(weight.shape[0], weight.shape[1]),
        encoding=FP8_ENCODINGS.get(weight.dtype, Encoding("fp8")),
        parts=tuple(parts),
        activation=Activation(
            number="fp8",
            granularity="tensor" if measured else "token",
            mode="static" if measured else "dynamic",
        ),
        why=proof,
    )


def _require_rowwise(name: str, header: Header) -> None:
    """The recipe the metadata gives for the format, where it gives one, must be the one we read."""
    block: Mapping[str, Any] = json.loads(header.metadata.get(METADATA, "{}"))
    version = block.get("format_version", VERSIONS[-1])
    if version not in VERSIONS:
        raise FormatError(
            f"{METADATA} has format_version {version!r}", hint=f"known are: {', '.join(VERSIONS)}"
        )
    configs = block.get("quant_configs")
    told = configs.get(ROWWISE) if isinstance(configs, Mapping) else None
    recipe = told.get("scale_recipe", "rowwise") if isinstance(told, Mapping) else "rowwise"
    if recipe != "rowwise":
        raise FormatError(f"{name!r} is {ROWWISE} with scale_recipe {recipe!r}, not 'rowwise'")


def _require_stored(said: Mapping[str, str], layers: tuple[StoredLayer, ...]) -> None:
    stored = {item.name for item in layers}
    for name, stated in said.items():
        if stated != PLAIN and name not in stored:
            raise FormatError(f"{METADATA} calls {name!r} {stated}, no such weight is stored")


# the way out -------------------------------------------------------------------------------------

WHO = "bfl"


def _write(plan: Plan) -> Export:
    """FLUX.2's form: ComfyUI's nvfp4 layers under BFL's fused names."""
    naming = naming_of(plan, ("bfl",), WHO)
    weights = joined(plan, naming, WHO)
    said = {each.name: {"format": NVFP4} for each in weights if each.piece.encoding != DENSE}
    return exported(
        plan,
        tuple(spelled_layer(each, _spelling(each), WHO) for each in weights),
        naming,
        config=None,
        metadata={METADATA: json.dumps({"format_version": VERSIONS[0], "layers": said})},
    )


def _spelling(weight: Joined) -> Spelling | None:
    if weight.piece.encoding == DENSE:
        return DENSE_SPELLING
    return SPELLINGS[NVFP4] if weight.piece.encoding == Encoding(NVFP4) else None


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    # The metadata is ComfyUI's own, and may call every layer bf16.
    explains=frozenset({"comfy", "diffusers", "fp8"}),
    encodings=("nvfp4", "fp8"),
    namings=("bfl",),
    proof="from description",
    write=_write,
)
