"""AWQ: what AutoAWQ writes in its GEMM version, `quant_method: awq`.

    X.qweight   I32 [K, N / 8]   codes 0 .. 15 along N, rows 0 2 4 6 1 3 5 7 of eight in a word
    X.qzeros    I32 [G, N / 8]   zero points in the same order
    X.scales    F16 [G, N]       weight = (code - zero) * scale

Smoothing went into the layers before. The GEMV versions pack otherwise and are refused.

Source: AutoAWQ 0.2.9, whose own modules wrote and decoded the cases it is tested with.
"""

from diffquant.errors import FormatError
from diffquant.formats import Format, Hints, Reading
from diffquant.formats._grouped_words import AWQ, read
from diffquant.formats._json import blocks, said_by
from diffquant.headers import Header
from diffquant.sources import Checkpoint

METHOD, VERSION = "awq", "gemm"
KEY = "quantization_config"


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    for where, _ in said_by(blocks(checkpoint, header, KEY), METHOD):
        return f"{where} says quant_method {METHOD}"
    return None


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    where, block = next(said_by(blocks(checkpoint, header, KEY), METHOD))
    version = str(block.get("version") or VERSION).lower()
    if version != VERSION:
        raise FormatError(f"{where} says the codes are packed for {version}, {VERSION} is read")
    return read(header, AWQ, where, block)


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    explains=frozenset({"diffusers"}),
    encodings=("int4",),
    proof="owner's library",
)
