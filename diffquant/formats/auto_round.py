"""AutoRound: integers in the packing of another tool, `quant_method: auto-round`.

    packing_format                        tensors
    auto_round:auto_gptq                  those of `gptq`, zero points one less than is meant
    auto_round, auto_round:gptqmodel      those of `gptq`, zero points as they are
    auto_round:auto_awq                   those of `awq`

What follows a further colon names a kernel. Layers may differ in bits (`extra_config`): shapes tell.
Other packings (llm_compressor, mlx, fp8, MX and NVFP4) are refused by name.

Source: auto-round 0.16.1, whose own modules wrote and decoded the cases it is tested with.
"""

from diffquant.errors import FormatError
from diffquant.formats import Format, Hints, Reading
from diffquant.formats._grouped_words import AWQ, GPTQ, GPTQ_V2, read
from diffquant.formats._json import blocks
from diffquant.headers import Header
from diffquant.sources import Checkpoint

METHOD = "auto-round"
KEY = "quantization_config"
PACKINGS = {
    ("auto_round",): GPTQ_V2,
    ("auto_round", "gptqmodel"): GPTQ_V2,
    ("auto_round", "auto_gptq"): GPTQ,
    ("auto_round", "auto_awq"): AWQ,
}


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    for where, block in blocks(checkpoint, header, KEY):
        if block.get("quant_method") == METHOD:
            return (
                f"{where} says quant_method {METHOD}, packing_format {block.get('packing_format')}"
            )
    return None


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    found = blocks(checkpoint, header, KEY)
    where, block = next(each for each in found if each[1].get("quant_method") == METHOD)
    told = str(block.get("packing_format"))
    packing = PACKINGS.get(tuple(told.split(":")[:2]))
    if packing is None or block.get("data_type", "int") != "int":
        known = ", ".join(":".join(each) for each in PACKINGS)
        raise FormatError(
            f"{where} says {block.get('data_type', 'int')} packed as {told}, int packed as one of "
            f"{known} is read"
        )
    return read(header, packing, where, block)


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    explains=frozenset({"diffusers"}),
    encodings=("int4", "int8"),
    proof="owner's library",
)
