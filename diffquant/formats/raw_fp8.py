"""Raw FP8: weights cast to float8 and nothing else. There is no scale, the codes are the weights.

    X.weight    F8_E4M3 or F8_E5M2 [N, K]    no scale beside it; inputs are not quantized

Nothing in such a file tells it from one whose scales were lost, so there is no evidence: a person
says it (--raw-fp8), and the file must then hold float8 weights and no scale at all. Norms and
biases are often float8 too; those are cast back like any plain tensor.
"""

from diffquant.errors import FormatError
from diffquant.formats import Format, Hints, Reading, StoredLayer, StoredPart
from diffquant.formats._comfy_kinds import FP8_ENCODINGS
from diffquant.formats.diffusers import TRACES, WIDE
from diffquant.headers import Header, Tensor
from diffquant.plan import Encoding, Role
from diffquant.sources import Checkpoint

FLAG = "--raw-fp8"


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    return None


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    for tensor in header.tensors.values():
        _require_raw(tensor)
    layers = tuple(
        _layer(tensor)
        for name, tensor in header.tensors.items()
        if name.endswith(".weight") and tensor.dtype in FP8_ENCODINGS and len(tensor.shape) == 2
    )
    if not layers:
        raise FormatError(f"{FLAG} was typed, and no weight of {checkpoint.origin!r} is float8")
    return Reading(layers=layers)


def _require_raw(tensor: Tensor) -> None:
    if tensor.name.endswith(TRACES):
        raise FormatError(
            f"{FLAG} was typed, and {tensor.name!r} is stored: the file is no raw cast",
            hint=f"leave {FLAG} out and give the folder with its config.json",
        )
    if tensor.dtype not in WIDE and tensor.dtype not in FP8_ENCODINGS:
        raise FormatError(f"{FLAG} was typed, and {tensor.name!r} is {tensor.dtype}, not float8")


def _layer(tensor: Tensor) -> StoredLayer:
    encoding = FP8_ENCODINGS[tensor.dtype]
    return StoredLayer(
        name=tensor.name.removesuffix(".weight"),
        stored_NK=(tensor.shape[0], tensor.shape[1]),
        encoding=Encoding(encoding.name, (*encoding.options, ("scale", "none"))),
        parts=(StoredPart(Role.CODES, tensor.name),),
        why=f"{FLAG} was typed",
    )


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    encodings=("fp8",),
    proof="from description",
)
