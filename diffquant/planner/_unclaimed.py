"""Stored tensors that no layer of the format claims."""

from dataclasses import replace

from diffquant.families import Family
from diffquant.formats import Reading
from diffquant.headers import Header
from diffquant.patterns import matches


def without_surplus(reading: Reading, header: Header, family: Family) -> Reading:
    """Tensors no class of the family has are nobody's, and one of two that are the same."""
    nobodys = {
        name: reason
        for pattern, reason in family.surplus.items()
        for name in header.tensors
        if matches(pattern, name)
    }
    for name, same in family.tied.items():
        if name in header.tensors and same in header.tensors:
            nobodys[name] = f"the same numbers as {same!r}"
    if not nobodys:
        return reading
    layers = tuple(
        layer for layer in reading.layers if not any(part.tensor in nobodys for part in layer.parts)
    )
    return replace(reading, layers=layers, unused={**reading.unused, **nobodys})


def unmentioned(header: Header, reading: Reading) -> tuple[str, ...]:
    """Tensors the format says nothing about: dense linears and plain parameters."""
    mentioned = {part.tensor for layer in reading.layers for part in layer.parts}
    return tuple(
        name for name in header.tensors if name not in mentioned and name not in reading.unused
    )
