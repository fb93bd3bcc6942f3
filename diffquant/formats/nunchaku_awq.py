"""Nunchaku's AWQ text encoder (T5): 4-bit weights in groups of 128, activations untouched.

    X.qweight        I16 [N / 4, K]     Nunchaku's AWQ packing
    X.scales         F16 [K / 128, N]   weight = code * scales + scaled_zeros
    X.scaled_zeros   F16 [K / 128, N]

The rows of groups may be padded. Proof is `model_class: NunchakuT5EncoderModel` in the metadata, or a
layer with scaled zeros beside 16-bit codes. Sources: Nunchaku's reader; the packing as for its
modulation layers.
"""

from collections.abc import Iterator

from diffquant.errors import FormatError
from diffquant.formats import Format, Hints, Reading, StoredLayer, StoredPart
from diffquant.formats._json import json_object
from diffquant.formats._svdquant import AWQ, awq_encoding
from diffquant.headers import Header
from diffquant.plan import Role
from diffquant.sources import Checkpoint

GROUP = 128
MODEL_CLASS = "NunchakuT5EncoderModel"
ROLES = {"qweight": Role.CODES, "scales": Role.BLOCK_SCALE, "scaled_zeros": Role.ZERO_POINT}


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    if header.metadata.get("model_class") == MODEL_CLASS:
        return f"header metadata model_class {MODEL_CLASS}"
    for name in _names(header):
        return f"{name}.qweight (I16) with scaled_zeros is Nunchaku's AWQ packing"
    return None


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    layers = tuple(_layer(name, header) for name in _names(header))
    if not layers:
        raise FormatError(
            f"the header says {MODEL_CLASS}, and no layer has qweight and scaled_zeros"
        )
    text = header.metadata.get("config")
    config = {} if text is None else json_object(text, "header metadata config")
    return Reading(layers=layers, config=config)


def _names(header: Header) -> Iterator[str]:
    for name, tensor in header.tensors.items():
        stem, _, ending = name.rpartition(".")
        if (
            ending == "qweight"
            and tensor.dtype == "I16"
            and f"{stem}.scaled_zeros" in header.tensors
        ):
            yield stem


def _layer(name: str, header: Header) -> StoredLayer:
    rows, columns = header.tensors[f"{name}.qweight"].shape
    if f"{name}.scales" not in header.tensors:
        raise FormatError(f"{name!r} has scaled_zeros and no scales")
    shape_NK = (4 * rows, columns)
    return StoredLayer(
        name=name,
        stored_NK=shape_NK,
        encoding=awq_encoding(header.tensors[f"{name}.scales"], shape_NK, GROUP),
        parts=tuple(StoredPart(role, f"{name}.{ending}", AWQ) for ending, role in ROLES.items()),
        why=f"AWQ in groups of {GROUP}",
    )


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    encodings=("int4",),
    proof="from description",
)
