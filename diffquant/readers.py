"""Which other tools read a format. The table is `readers.toml`; nothing is answered from anywhere else.

A tool without a row for a format and its encodings is "not known": nobody looked, or nobody could.
"""

import tomllib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("readers.toml")
NOT_KNOWN = "not known"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """What one version of a tool does with a file; `source` tells where that was seen.

    answer  yes | partly | no | not known
    """

    tool: str
    version: str
    answer: str
    why: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the table; no encodings means it holds for all."""

    format: str
    tool: str
    answer: str
    why: str
    source: str
    encodings: tuple[str, ...] = ()

    def concerns(self, format: str, encodings: Collection[str]) -> bool:
        """Whether it speaks of a file of that format that holds these encodings."""
        held = not self.encodings or not set(self.encodings).isdisjoint(encodings)
        return self.format == format and held


def readers(format: str, encodings: Collection[str]) -> tuple[Reader, ...]:
    """Every tool of the table, in its order; of several rows for one tool, the most careful answer."""
    tools, rows = _table()
    return tuple(
        _reader(name, version, [row for row in rows if row.tool == key], format, encodings)
        for key, (name, version) in tools.items()
    )


def rows() -> tuple[Row, ...]:
    """The table."""
    return _table()[1]


def _reader(
    name: str, version: str, rows: list[Row], format: str, encodings: Collection[str]
) -> Reader:
    found = [row for row in rows if row.concerns(format, encodings)]
    if not found:
        return Reader(tool=name, version=version, answer=NOT_KNOWN)
    row = min(found, key=lambda row: ("no", "partly", "yes").index(row.answer))
    return Reader(tool=name, version=version, answer=row.answer, why=row.why, source=row.source)


@cache
def _table() -> tuple[dict[str, tuple[str, str]], tuple[Row, ...]]:
    table = tomllib.loads(TABLE.read_text("utf-8"))
    tools = {key: (tool["name"], tool["version"]) for key, tool in table["tools"].items()}
    return tools, tuple(_rows(table["reads"]))


def _rows(entries: list[dict[str, object]]) -> Iterator[Row]:
    for entry in entries:
        encodings = entry.pop("encodings", [])
        assert isinstance(encodings, list)
        yield Row(encodings=tuple(encodings), **entry)  # type: ignore[arg-type]
