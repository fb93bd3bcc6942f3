"""vLLM-Omni's SVDQuant folders: Nunchaku's tensor names with every tensor in its natural order.

config.json holds `quantization_config: {quant_method: svdquant, precision: nvfp4, rank, act_unsigned,
activation_bits, modules_to_not_convert}`. Tensors are those of `_svdquant.py`, nvfp4 only; qweight has
the even column in bits 0-3, and wscales [K / 16, N] and proj_down [K, R] are transposed.

Source: vLLM-Omni's documented contract. Its converter from Nunchaku files copies `smooth_factor` and
`wcscales` as they are; whether such files exist in public is not known, and a note says so.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffquant.errors import FormatError
from diffquant.formats import Format, Hints, Reading
from diffquant.formats._svdquant import (
    ROWS,
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


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    if _declared(checkpoint).get("quant_method") != "svdquant":
        return None
    return f"{WHERE} says quant_method svdquant, {_declared(checkpoint).get('precision', 'nvfp4')}"


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    declared = _declared(checkpoint)
    precision = declared.get("precision", "nvfp4")
    if precision != "nvfp4" or declared.get("act_unsigned"):
        asked = f"precision {precision}" if precision != "nvfp4" else "act_unsigned"
        raise FormatError(
            f"{WHERE} asks for {asked}, which vLLM-Omni stores in no documented order"
        )
    layers = tuple(svdquant_layer(name, header, ROWS, WHERE) for name in svdquant_names(header))
    if declared.get("activation_bits", 4) == 16:
        layers = tuple(replace(layer, activation=None) for layer in layers)
    require_precision(hints.precision or precision, layers, WHERE)
    require_rank(hints.rank or declared.get("rank"), ranks(layers, header), WHERE)
    return Reading(
        layers=layers,
        unused=unused(header),
        notes=(
            "smooth_factor and wcscales are taken in natural order, as vLLM-Omni documents it; a file "
            "converted from Nunchaku's may hold them in Nunchaku's",
        ),
    )


def _declared(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The quantization block; its `default` where components are configured one by one."""
    block = checkpoint.config.get("quantization_config")
    if isinstance(block, Mapping) and isinstance(block.get("default"), Mapping):
        block = block["default"]
    return block if isinstance(block, Mapping) else {}


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    encodings=("nvfp4",),
    proof="from description",
)
