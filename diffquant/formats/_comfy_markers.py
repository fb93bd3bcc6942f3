"""What a ComfyUI file says of its layers, gathered from the four places that may say it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffquant.errors import FormatError
from diffquant.formats._comfy_kinds import KINDS
from diffquant.formats._json import json_value
from diffquant.headers import Header, Tensor

METADATA = "_quantization_metadata"
GLOBAL = "quant_format"
MARKER = ".comfy_quant"
OLD_MARKER = "scaled_fp8"
FULL_PRECISION = "full_precision_matrix_mult"

#: What files put before the names that their metadata uses.
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.")
NARROW = frozenset({"F8_E4M3", "F8_E5M2", "I8", "U8"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """What a file says of one layer: the format's name, its options, and where it says so."""

    format: str
    where: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def option(self, key: str, default: Any = None) -> Any:
        """An option, at the top of the JSON or in its `params`."""
        inner = self.options.get("params")
        nested = inner.get(key, default) if isinstance(inner, Mapping) else default
        return self.options.get(key, nested)

    def number(self, key: str, default: int) -> int:
        """An option that counts something. Raises FormatError for what is no positive number."""
        found = self.option(key, default)
        if type(found) is not int or found < 1:
            raise FormatError(f"{self.where} says {key} is {found!r:.60}, a number was needed")
        return found

    def contradicts(self, other: "Marker") -> bool:
        shared = self.options.keys() & other.options.keys()
        differ = any(self.options[key] != other.options[key] for key in shared)
        return self.format != other.format or differ


def markers(header: Header) -> dict[str, Marker]:
    """Layer -> what is said of it. Raises FormatError when two places contradict each other."""
    found: dict[str, Marker] = {}
    for source in (_tensor_markers, _metadata_markers, _global_markers, _old_markers):
        for name, marker in source(header):
            other = found.setdefault(name, marker)
            if other.contradicts(marker):
                raise FormatError(
                    f"{name!r} is {other.format} in {other.where} and {marker.format} "
                    f"in {marker.where}, with options that differ"
                    if other.format == marker.format
                    else f"{name!r} is {other.format} in {other.where}, {marker.format} in "
                    f"{marker.where}"
                )
    return found


def _tensor_markers(header: Header) -> Iterator[tuple[str, Marker]]:
    for name in header.tensors:
        if name.endswith(MARKER):
            yield name.removesuffix(MARKER), tensor_marker(name, header)


def tensor_marker(name: str, header: Header) -> Marker:
    try:
        said = json.loads(header.read_small(name).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name!r} holds no JSON: {error}") from None
    return _marker(options_of(said), name, name)


def _metadata_markers(header: Header) -> Iterator[tuple[str, Marker]]:
    where = f"header metadata {METADATA}"
    for name, said in metadata_layers(header).items():
        stored = (f"{prefix}{name}" for prefix in PREFIXES)
        full = next((full for full in stored if f"{full}.weight" in header.tensors), name)
        yield full, _marker(options_of(said), where, name)


def metadata_layers(header: Header) -> Mapping[str, Any]:
    """The layers that the header's metadata speaks of, {} when it does not speak of any."""
    text = header.metadata.get(METADATA)
    if text is None:
        return {}
    block = json_value(text, f"header metadata {METADATA}")
    layers = block.get("layers") if isinstance(block, Mapping) else None
    return layers if isinstance(layers, Mapping) else {}


def options_of(said: Any) -> Mapping[str, Any]:
    """Some writers give the format's name alone."""
    return said if isinstance(said, Mapping) else {"format": said}


def _marker(options: Mapping[str, Any], where: str, name: str) -> Marker:
    stated = options.get("format")
    if not isinstance(stated, str):
        raise FormatError(f"{where} gives no format for {name!r}")
    return Marker(format=stated, where=where, options=options)


def _global_markers(header: Header) -> Iterator[tuple[str, Marker]]:
    stated = header.metadata.get(GLOBAL, "")
    if stated not in KINDS:
        return
    for tensor in narrow(header):
        name = tensor.name.removesuffix(".weight")
        if f"{name}.weight_scale" in header.tensors:
            yield name, Marker(format=stated, where=f"header metadata {GLOBAL}")


def _old_markers(header: Header) -> Iterator[tuple[str, Marker]]:
    marker = old_marker(header)
    if marker is None:
        return
    two = header.tensors[marker].shape == (2,)
    for tensor in narrow(header):
        kind = "scaled_int8" if tensor.dtype == "I8" else "scaled_fp8"
        said = Marker(format=kind, where=repr(marker), options={FULL_PRECISION: two})
        yield tensor.name.removesuffix(".weight"), said


def old_marker(header: Header) -> str | None:
    names = (f"{prefix}{OLD_MARKER}" for prefix in PREFIXES)
    return next((name for name in names if name in header.tensors), None)


def narrow(header: Header) -> Iterator[Tensor]:
    """Weights, all but those of norms, that are stored in eight bits or less."""
    for name, tensor in header.tensors.items():
        if name.endswith(".weight") and tensor.dtype in NARROW and len(tensor.shape) > 1:
            yield tensor
