"""GGUF: files of llama.cpp's family that hold diffusion transformers, weights in ggml's blocks.

    X.weight    a ggml type, [N, K]    blocks of columns with their own scales, weight-only
    X.bias, norms, tables              F32, F16 or BF16, as they are

Names are those of the model's first publisher (Black Forest Labs, Wan …) as ComfyUI-GGUF and
stable-diffusion.cpp write them, the latter behind `model.diffusion_model.`, or diffusers' own where
no others exist. `general.architecture` says flux, wan, qwen_image …, and nothing is read from it:
tensors tell. Sizes are stored fastest axis first; `headers/gguf.py` turns them around.

A file without a block is a plain checkpoint. Text encoders in llama.cpp's names are refused.
Sources: docs/gguf.md of ggml; the writers of ComfyUI-GGUF; the gguf package.
"""

from collections import Counter
from collections.abc import Iterator
from functools import cache
from math import prod

from diffquant.encodings import ENCODINGS
from diffquant.encodings._ggml import SIZES
from diffquant.errors import FormatError
from diffquant.formats import Format, Hints, Reading, StoredLayer, StoredPart
from diffquant.headers import Header, Tensor
from diffquant.plan import Encoding, Layout, Role
from diffquant.sources import Checkpoint

GGML = "GGML_"
#: How llama.cpp's names begin: blocks of language models, of T5 encoders, of vision towers.
LANGUAGE_MODELS = ("blk.", "enc.blk.", "v.blk.")


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    found = Counter(_type(tensor) for tensor in _blocks(header))
    if not found:
        return None
    counted = ", ".join(f"{count} {name}" for name, count in found.most_common())
    architecture = header.metadata.get("general.architecture")
    named = f"general.architecture {architecture!r}" if architecture else "no general.architecture"
    return f"GGUF tensors are blocks of ggml ({counted}; {named})"


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    _require_transformer(checkpoint, header)
    return Reading(layers=tuple(_layer(tensor) for tensor in _blocks(header)))


def _blocks(header: Header) -> Iterator[Tensor]:
    return (tensor for tensor in header.tensors.values() if tensor.dtype.startswith(GGML))


def _type(tensor: Tensor) -> str:
    return tensor.dtype.removeprefix(GGML)


def _require_transformer(checkpoint: Checkpoint, header: Header) -> None:
    found = next((name for name in header.tensors if name.startswith(LANGUAGE_MODELS)), None)
    if found is not None:
        architecture = header.metadata.get("general.architecture", "unnamed")
        raise FormatError(
            f"{checkpoint.origin!r} is a language model of llama.cpp ({architecture}, {found!r}), "
            "transformers of pipelines were wanted",
            hint="leave it out: the base pipeline has its own text encoder as safetensors",
        )


def _layer(tensor: Tensor) -> StoredLayer:
    """Raises FormatError for a type that has no encoding, and for blocks that lie across rows."""
    encoding = _encodings().get(tensor.dtype)
    if encoding is None:
        raise FormatError(
            f"{tensor.name!r} is stored as {_type(tensor)}, which is not decoded",
            hint="these ggml types are: "
            + ", ".join(sorted(dtype.removeprefix(GGML) for dtype in _encodings())),
        )
    rows, columns = tensor.shape[0], prod(tensor.shape[1:])
    values, width = SIZES[tensor.dtype]
    if columns % values:
        raise FormatError(
            f"{tensor.name!r} has rows of {columns} columns, which {_type(tensor)} blocks of "
            f"{values} do not divide",
            hint="ComfyUI-GGUF writes SD1 and SDXL so, and neither is a diffusion transformer",
        )
    layout = Layout("blocks", (("bytes", str(width)), ("values", str(values))))
    return StoredLayer(
        name=tensor.name.removesuffix(".weight"),
        stored_NK=(rows, columns),
        encoding=encoding,
        parts=(StoredPart(Role.CODES, tensor.name, layout),),
        why=f"stored as {_type(tensor)}",
    )


@cache
def _encodings() -> dict[str, Encoding]:
    """What each ggml type is stored as."""
    return {
        dtype: Encoding(name)
        for name, codec in ENCODINGS.load_all().items()
        for dtype in codec.code_dtypes
        if dtype.startswith(GGML)
    }


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    encodings=tuple(sorted(encoding.name for encoding in _encodings().values())),
    proof="owner's library",
)
