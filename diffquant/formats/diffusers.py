"""Plain checkpoints: every tensor is what it seems. The format of what is not quantized.

Proof is the absence of anything a quantizer leaves behind: narrow weights, scales, packed codes.
"""

from diffquant.errors import FormatError
from diffquant.formats import Export, Format, Hints, Reading
from diffquant.formats._outgoing import (
    DENSE_SPELLING,
    exported,
    joined,
    naming_of,
    spelled_layer,
)
from diffquant.headers import Header
from diffquant.plan import Plan
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
    ".weight._data",
    ".qzeros",
    "_weight_qdata",
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


def _write(plan: Plan) -> Export:
    """Raises FormatError when anything is quantized, or a layer is more than a linear."""
    changed = next((layer for layer in plan.layers if not layer.is_ordinary), None)
    if changed is not None:
        raise FormatError(
            f"{changed.path!r} is {'+'.join(changed.encodings)}, a plain checkpoint has no such layers",
            hint="diffquant convert dequantize decodes them",
        )
    naming = naming_of(plan, ("diffusers",), "diffusers")
    layers = tuple(
        spelled_layer(each, DENSE_SPELLING, "diffusers")
        for each in joined(plan, naming, "diffusers")
    )
    return exported(plan, layers, naming, config={})


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    encodings=("dense",),
    proof="true files",
    write=_write,
)
