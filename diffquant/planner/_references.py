"""Stored tensors as a plan speaks of them."""

from collections.abc import Iterable, Mapping

from diffquant.formats import StoredPart
from diffquant.headers import Header
from diffquant.plan import Part, TensorRef

TORCH_NAMES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}


def reference(header: Header, tensor: str) -> TensorRef:
    """Where the tensor lies."""
    return TensorRef(header.tensors[tensor].file, tensor)


def references(header: Header, parts: Iterable[StoredPart]) -> tuple[Part, ...]:
    """The parts of a stored layer with where each lies."""
    return tuple(Part(part.role, reference(header, part.tensor), part.layout) for part in parts)


def torch_name(dtype: str) -> str:
    """What torch calls a header's dtype; what it has no plain word for keeps the header's."""
    return TORCH_NAMES.get(dtype, dtype)
