"""Layers of a plan as a table a person can read: one line where blocks repeat the same thing."""

import re
from collections.abc import Iterable, Sequence

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")

#: A layer's path, and what is told about it.
Row = tuple[str, tuple[str, ...]]


def grouped(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """One row per kind of layer, in order of appearance: blocks of a kind that are told alike share
    a row, their numbers written as ranges: `transformer_blocks.0-18.attn.to_q`."""
    kinds: dict[Row, list[str]] = {}
    for path, told in rows:
        kinds.setdefault((NUMBER.sub("{}", path, count=1), told), []).append(path)
    return [(_path(kind, paths), *told) for (kind, told), paths in kinds.items()]


def _path(kind: str, paths: Sequence[str]) -> str:
    if "{}" not in kind:
        return kind
    numbers = sorted(int(found[0]) for path in paths if (found := NUMBER.search(path)))
    return kind.replace("{}", ",".join(_ranges(numbers)))


def _ranges(numbers: Sequence[int]) -> Iterable[str]:
    """0 1 2 5 -> 0-2 5."""
    start = None
    for place, number in enumerate(numbers):
        if start is None:
            start = number
        if place + 1 == len(numbers) or numbers[place + 1] != number + 1:
            yield str(start) if start == number else f"{start}-{number}"
            start = None
