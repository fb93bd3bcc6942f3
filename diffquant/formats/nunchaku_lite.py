"""diffusers' `nunchaku_lite` folders: Nunchaku's packing under the names of stock diffusers modules.

config.json holds

    quantization_config: {quant_method: nunchaku_lite, compute_dtype,
      svdq_w4a4: {precision: int4 | nvfp4, group_size, rank, targets: [module, …]},
      awq_w4a16: {precision: int4, group_size: 64, targets: [module, …]}}

Tensors are those of `_svdquant.py`. Unlike Nunchaku's own files nothing is fused or interleaved, no
bias has 1 added, and no layer behind GELU is shifted: activations are always signed. Exports that say
`runtime_tensor_layout: logical` are row-major instead of packed.

Source: diffusers 0.42.1, read.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from diffquant.errors import FormatError
from diffquant.formats import Format, Hints, Reading, StoredLayer
from diffquant.formats._json import json_object
from diffquant.formats._svdquant import (
    PACKED,
    ROWS,
    Layouts,
    awq_layer,
    awq_names,
    ranks,
    require_precision,
    require_rank,
    svdquant_layer,
    svdquant_names,
    unused,
)
from diffquant.headers import Header
from diffquant.sources import Checkpoint

WHERE = "config.json quantization_config"
#: `runtime_tensor_layout` -> the order of every part; packed when it is not said.
ORDERS: Mapping[str, Layouts] = {"nunchaku_packed": PACKED, "logical": ROWS}


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    if _declared(checkpoint).get("quant_method") != "nunchaku_lite":
        return None
    return f"{WHERE} says quant_method nunchaku_lite"


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    declared = _declared(checkpoint)
    svdq, awq = _section(declared, "svdq_w4a4"), _section(declared, "awq_w4a16")
    order = _order(checkpoint, declared)
    quantized = tuple(
        svdquant_layer(name, header, order, f"{WHERE} svdq_w4a4") for name in svdquant_names(header)
    )
    plain = tuple(
        awq_layer(name, header, f"{WHERE} awq_w4a16", modulation=False)
        for name in awq_names(header)
    )
    if plain and order is ROWS:
        raise FormatError(
            f"{plain[0].name!r} is AWQ in a row-major export, whose order is not known"
        )
    _require_targets(svdq, quantized, "svdq_w4a4")
    _require_targets(awq, plain, "awq_w4a16")
    require_precision(svdq.get("precision"), quantized, f"{WHERE} svdq_w4a4")
    require_precision(hints.precision, quantized, "the name, or --quantization-precision,")
    require_rank(hints.rank or svdq.get("rank"), ranks(quantized, header), f"{WHERE} svdq_w4a4")
    return Reading(layers=quantized + plain, unused=unused(header), naming="diffusers")


def _declared(checkpoint: Checkpoint) -> Mapping[str, Any]:
    return _section(checkpoint.config, "quantization_config")


def _section(block: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = block.get(key)
    return found if isinstance(found, Mapping) else {}


def _order(checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Layouts:
    """What config.json, or any JSON file beside the weights, says about the order of tensors."""
    said = next((word for word in _said(checkpoint, declared)), "nunchaku_packed")
    if said not in ORDERS:
        raise FormatError(
            f"runtime_tensor_layout is {said!r}, known are {', '.join(sorted(ORDERS))}"
        )
    return ORDERS[said]


def _said(checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Iterator[str]:
    blocks = [declared]
    for name, path in checkpoint.sidecars.items():
        if not name.endswith(".index.json"):
            blocks.append(json_object(path.read_text("utf-8", "replace"), name))
    for block in blocks:
        if "runtime_tensor_layout" in block:
            yield str(block["runtime_tensor_layout"])


def _require_targets(
    section: Mapping[str, Any], layers: tuple[StoredLayer, ...], where: str
) -> None:
    """Raises FormatError when the configured targets and the stored layers are not the same."""
    targets = section.get("targets")
    if not isinstance(targets, list):
        return
    stored = {layer.name for layer in layers}
    for name in map(str, targets):
        if name not in stored:
            raise FormatError(f"{WHERE} {where} targets {name!r}, and the file has no such layer")
    for name in sorted(stored - set(map(str, targets))):
        raise FormatError(f"{name!r} is stored quantized, and {WHERE} {where} does not target it")


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    encodings=("int4", "nvfp4"),
    proof="from description",
)
