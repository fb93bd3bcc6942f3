"""GGUF files of tests, written byte by byte: tensors as they are or in ggml's blocks, random or true.

The gguf package, where it is installed, judges decoding; these files need nothing but torch.
"""

import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from diffquant.encodings import ENCODINGS, Recipe
from diffquant.encodings._ggml import SIZES
from diffquant.families import Naming, located, spelled
from diffquant.headers.gguf import TYPES
from diffquant.plan import Encoding, Role

NUMBERS = {dtype: number for number, (dtype, _, _) in TYPES.items()}
PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ALIGNMENT, STRING = 32, 8
#: Where the float16 numbers of a block are.
HALVES = {
    "ggml_q2_k": (80, 82),
    "ggml_q3_k": (108,),
    "ggml_q4_1": (0, 2),
    "ggml_q4_k": (0, 2),
    "ggml_q5_1": (0, 2),
    "ggml_q5_k": (0, 2),
    "ggml_q6_k": (208,),
    "ggml_mxfp4": (),
    "ggml_nvfp4": (),
}

#: dtype as headers spell it, shape, bytes
Stored = tuple[str, tuple[int, ...], bytes]


def plain(tensor: Tensor) -> Stored:
    """A tensor as it is."""
    data = tensor.contiguous().view(torch.uint8)
    return PLAIN[tensor.dtype], tuple(tensor.shape), data.numpy().tobytes()


def q8_0(weight: Tensor) -> Stored:
    """A weight [N, K] in Q8_0."""
    return "GGML_Q8_0", tuple(weight.shape), encoded("ggml_q8_0", weight).numpy().tobytes()


def encoded(name: str, weight: Tensor) -> Tensor:
    """Codes of a weight [N, K], by our own writer."""
    encode = ENCODINGS.load(name).encode
    assert encode is not None
    return encode(weight.float(), Encoding(name), Recipe(granularity="group"))[Role.CODES]


def random_codes(name: str, n: int, k: int, size: float = 0.01) -> Tensor:
    """Codes of random blocks, uint8 [N, bytes of a row], whose float16 numbers are of that size."""
    values, width = SIZES[name.upper()]
    source = torch.Generator().manual_seed(n + k)
    blocks = torch.randint(0, 256, (n * k // values, width), dtype=torch.uint8, generator=source)
    for at in HALVES.get(name, (0,)):
        numbers = (torch.rand(len(blocks), 1, generator=source) + 0.5) * size
        blocks[:, at : at + 2] = numbers.half().view(torch.uint8)
    return blocks.view(n, -1)


def random_blocks(name: str, n: int, k: int) -> Stored:
    return name.upper(), (n, k), random_codes(name, n, k).numpy().tobytes()


def write(path: Path, tensors: Mapping[str, Stored], **metadata: str) -> Path:
    """A GGUF file of version 3; `metadata` as `general.<key>`, strings all."""
    pairs = b"".join(
        _string(f"general.{key}") + struct.pack("<I", STRING) + _string(value)
        for key, value in metadata.items()
    )
    infos, data = b"", b""
    for name, (dtype, shape, content) in tensors.items():
        axes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        infos += _string(name) + axes + struct.pack("<IQ", NUMBERS[dtype], len(data))
        values, width = SIZES[dtype]
        assert len(content) == prod(shape) // values * width, name
        data += _padded(content)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + pairs + infos
    path.write_bytes(_padded(head) + data)
    return path


def respelled(state: Mapping[str, Tensor], naming: Naming) -> dict[str, Tensor]:
    """A module's tensors under another naming, joined along N where that joins modules."""
    renamed: dict[str, Tensor] = {}
    for name in state:
        (stored, *_) = spelled(naming, name)
        if stored not in renamed:
            renamed[stored] = _stacked(stored, state, naming)
    return renamed


def _stacked(stored: str, state: Mapping[str, Tensor], naming: Naming) -> Tensor:
    stem, dot, leaf = stored.rpartition(".")
    lone = leaf not in ("weight", "bias")
    rule = located(naming, stored if lone else stem)
    assert rule is not None
    rows = torch.cat([state[row if lone else row + dot + leaf] for row in rule.rows])
    if rule.chunks is None:
        return rows
    chunks = rows.chunk(len(rule.chunks))
    return torch.cat([chunks[chunk] for chunk in rule.chunks])


def quantized(state: Mapping[str, Tensor]) -> dict[str, Stored]:
    """What ComfyUI-GGUF makes of a module's tensors: matrices in blocks, all others in float32."""
    return {
        name: q8_0(tensor) if _is_matrix(name, tensor) else plain(tensor.float())
        for name, tensor in state.items()
    }


def _is_matrix(name: str, tensor: Tensor) -> bool:
    values, _ = SIZES["GGML_Q8_0"]
    return name.endswith(".weight") and tensor.dim() == 2 and tensor.shape[1] % values == 0


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _padded(content: bytes) -> bytes:
    return content.ljust(-(-len(content) // ALIGNMENT) * ALIGNMENT, b"\0")
