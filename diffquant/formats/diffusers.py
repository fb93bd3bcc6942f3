"""Plain checkpoints: every tensor is what it seems. The format of what is not quantized.

Proof is the absence of anything a quantizer leaves behind: narrow weights, scales, packed codes.
"""

from diffquant.formats import Format, Hints, Reading
from diffquant.headers import Header
from diffquant.sources import Checkpoint

WIDE = frozenset({"F64", "F32", "F16", "BF16"})

#: Endings of tensors that only quantized files have.
TRACES = (
    ".weight_scale",
    ".weight_scale_2",
    ".weight_scale_inv",
    ".input_scale",
    ".scale_weight",
    ".pre_quant_scale",
    ".comfy_quant",
    ".qweight",
    ".wscales",
    ".weight_packed",
    ".SCB",
    ".absmax",
    ".svdquant_lora_a",
    "_quantizer._amax",
    "scaled_fp8",
)


def trace(header: Header) -> str | None:
    """The first tensor that looks quantized, with its dtype; None when the file is plain."""
    for name, tensor in header.tensors.items():
        narrow = name.endswith(".weight") and tensor.dtype not in WIDE
        if narrow or name.endswith(TRACES):
            return f"{name!r} ({tensor.dtype})"
    return None


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    if not header.tensors or trace(header) is not None:
        return None
    dtypes = sorted({tensor.dtype for tensor in header.tensors.values()})
    return f"all {len(header.tensors)} tensors are plain {', '.join(dtypes)}"


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    return Reading(layers=())


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    encodings=("dense",),
    proof="true files",
)
