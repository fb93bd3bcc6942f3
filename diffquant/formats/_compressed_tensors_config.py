"""What a compressed-tensors configuration says: which layers, and how each side of their products.

`config_groups` has one entry per way of quantizing; see `compressed_tensors` for the tensors.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffquant.errors import FormatError
from diffquant.formats._json import blocks
from diffquant.headers import Header
from diffquant.plan import Layout, Role
from diffquant.sources import Checkpoint

METHOD = "compressed-tensors"
KEYS = ("quantization_config", "compression_config")

DIVIDES = (("tensor_scale", "divide"),)
SCALE_ROLES: Mapping[str, Role] = {
    "tensor": Role.TENSOR_SCALE,
    "channel": Role.CHANNEL_SCALE,
    "group": Role.BLOCK_SCALE,
    "tensor_group": Role.BLOCK_SCALE,
    "block": Role.BLOCK_SCALE,
}
#: Values of `format` that store something else than this reader knows.
REFUSED = ("marlin-24", "sparse-24-bitmask", "sparse-bitmask", "mxfp6-pack-quantized")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """How one side of a product is quantized, as the configuration spells it.

    group     columns per scale; block: rows and columns per scale
    dynamic   scales come from the values; "local": those of groups do, the one above is stored
    exponents  scales are powers of two
    """

    type: str
    bits: int
    strategy: str
    group: int | None
    block: tuple[int, int] | None
    dynamic: bool | str
    symmetric: bool
    exponents: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One of the configuration's groups; `inputs` is None for weight-only ones."""

    name: str
    targets: tuple[str, ...]
    weights: Arguments
    inputs: Arguments | None


def declared(checkpoint: Checkpoint, header: Header) -> tuple[str, Mapping[str, Any]] | None:
    """The configuration that says it is ours, and where it says so."""
    for key in KEYS:
        for where, block in blocks(checkpoint, header, key):
            if block.get("quant_method") == METHOD:
                return where, block
    return None


def require_known(where: str, block: Mapping[str, Any]) -> None:
    """Raises FormatError for what would change the numbers and is not read."""
    sparse = block.get("sparsity_config")
    formats = [block.get("format"), sparse.get("format") if isinstance(sparse, Mapping) else None]
    for name in formats:
        if name in REFUSED:
            raise FormatError(f"{where} stores {name}, which is not read")
    if block.get("transform_config"):
        raise FormatError(f"{where} transforms inputs (transform_config), which is not read")


def groups_of(where: str, block: Mapping[str, Any]) -> Iterator[Group]:
    groups = block.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise FormatError(f"{where} has {groups!r:.60} as config_groups, an object was needed")
    for name, group in groups.items():
        at = f"{where} {name}"
        if not isinstance(group, Mapping):
            raise FormatError(f"{at} is {group!r:.60}, an object was needed")
        if group.get("format") in REFUSED:
            raise FormatError(f"{at} stores {group['format']}, which is not read")
        weights, inputs = group.get("weights"), group.get("input_activations")
        if weights is None:
            continue
        yield Group(
            name=name,
            targets=_strings(at, group.get("targets")),
            weights=_arguments(f"{at} weights", weights),
            inputs=None if inputs is None else _arguments(f"{at} input_activations", inputs),
        )


def _strings(where: str, found: Any) -> tuple[str, ...]:
    if not isinstance(found, list | tuple) or not all(isinstance(each, str) for each in found):
        raise FormatError(f"{where} has {found!r:.60} as targets, a list of names was needed")
    return tuple(found)


def _arguments(where: str, block: Any) -> Arguments:
    if not isinstance(block, Mapping):
        raise FormatError(f"{where} is {block!r:.60}, an object was needed")
    bits, group, cell = (block.get(key) for key in ("num_bits", "group_size", "block_structure"))
    if type(bits) is not int or (group is not None and type(group) is not int):
        raise FormatError(f"{where} has num_bits {bits!r:.20} and group_size {group!r:.20}")
    grouped = "channel" if group == -1 else "group"
    return Arguments(
        type=str(block.get("type", "int")),
        bits=bits,
        strategy=str(block.get("strategy") or ("tensor" if group is None else grouped)),
        group=group,
        block=_cell(where, cell),
        dynamic=block.get("dynamic") or False,
        symmetric=block.get("symmetric") is not False,
        exponents="uint8" in str(block.get("scale_dtype")),
    )


def _cell(where: str, found: Any) -> tuple[int, int] | None:
    """Rows and columns of a block: [128, 128], in older files "128x128"."""
    sides = found.split("x") if isinstance(found, str) else found
    if sides is None:
        return None
    try:
        rows, columns = (int(side) for side in sides)
    except (TypeError, ValueError):
        rows = columns = 0
    if min(rows, columns) < 1:
        raise FormatError(f"{where} has {found!r:.60} as block_structure, [N, K] was needed")
    return rows, columns


def group_of(layer: str, groups: Sequence[Group], where: str) -> Group:
    """The group whose target hits: by name, by expression, by class. A lone group needs no target,
    for some writers spell its layers as their own runtime does."""
    linear = ("Linear", "LinearBase")
    for hits in (
        lambda target: target == layer,
        lambda target: target.startswith("re:") and _expression(target, where).match(layer),
        lambda target: target in linear,
        lambda target: len(groups) == 1,
    ):
        found = [group for group in groups if any(map(hits, group.targets))]
        if found:
            return found[0]
    raise FormatError(f"{layer!r} is stored quantized, and no target in {where} hits it")


def _expression(target: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(target.removeprefix("re:"))
    except re.error as error:
        raise FormatError(f"{where} has the target {target!r:.60}: {error}") from None


def words(bits: int, axis: str) -> Layout:
    return Layout("words", (("axis", axis), ("bits", str(bits)), ("numbers", "offset")))
