"""GPTQ: what AutoGPTQ, GPTQModel and their relatives write, `quant_method: gptq`.

    X.qweight   I32 [K * bits / 32, N]   codes 0 .. 2^bits - 1 along K, 4 or 8 bits
    X.qzeros    I32 [G, N * bits / 32]   zero points along N, one less than is meant
    X.scales    F16 [G, N]               weight = (code - zero) * scale
    X.g_idx     I32 [K]                  the group of every column; out of order after `desc_act`

`checkpoint_format: gptq_v2` stores zero points as they are. Which of the two it is no tensor tells, so the
configuration must: in config.json, in the header, or in quantize_config.json beside the weights. One that
does not speak of it is of the first kind, for writers named the format when there came to be a second.

Source: AutoGPTQ 0.7.1, whose own modules wrote and decoded the cases it is tested with.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from diffquant.errors import FormatError
from diffquant.formats import Format, Hints, Reading
from diffquant.formats._grouped_words import GPTQ, GPTQ_V2, read
from diffquant.formats._json import blocks, json_object, said_by
from diffquant.headers import Header
from diffquant.sources import Checkpoint

METHOD = "gptq"
SIDE = "quantize_config.json"
PACKINGS = {"gptq": GPTQ, "gptq_v2": GPTQ_V2}


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    for where, _ in _declared(checkpoint, header):
        return f"{where} says quant_method {METHOD}"
    return None


def _declared(checkpoint: Checkpoint, header: Header) -> Iterator[tuple[str, Mapping[str, Any]]]:
    found = blocks(checkpoint, header, "quantization_config")
    yield from said_by(found, METHOD)
    if SIDE in checkpoint.sidecars and not found:
        block = json_object(checkpoint.sidecars[SIDE].read_text("utf-8"), SIDE)
        if block.get("quant_method", METHOD) == METHOD and "bits" in block:
            yield SIDE, block


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    where, block = next(iter(_declared(checkpoint, header)))
    told = block.get("checkpoint_format") or METHOD
    if told not in PACKINGS or block.get("is_marlin_format"):
        kind = "marlin" if block.get("is_marlin_format") else told
        raise FormatError(
            f"{where} says the codes are packed as {kind}, {' and '.join(PACKINGS)} are read"
        )
    return read(header, PACKINGS[told], where, block)


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    explains=frozenset({"diffusers"}),
    encodings=("int4", "int8"),
    proof="owner's library",
)
