"""RESULTS.md: one part per section, replaced when that section runs again and kept when it does not."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

HEAD = """# Results

Written by `python -m benchmarks`; nothing here was typed by hand. A ratio is a time as a multiple of
another time of the same run, taken in turns: *least* compares the fastest rounds, *median* is the
median over the rounds, and a goal is met by the median. Where the two are far apart something
disturbed the machine; a median below 1 of weight-only arithmetic means that it disturbed bf16, not
that decoding is free. Each section says when and on what.
"""


def store(path: Path, parts: Iterable[tuple[int, str, str]]) -> None:
    """Put (order, name, text) parts into the file, beside those it has."""
    held = read(path)
    held.update({name: (order, text) for order, name, text in parts})
    ordered = sorted(held.items(), key=lambda item: item[1][0])
    body = [f"<!-- {order} {name} -->\n{text.strip()}\n" for name, (order, text) in ordered]
    path.write_text("\n".join([HEAD, *body]), encoding="utf-8")


def read(path: Path) -> dict[str, tuple[int, str]]:
    """name -> (order, text) of the parts there are."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.findall(r"<!-- (\d+) (\w+) -->\n(.*?)(?=<!-- \d+ \w+ -->|\Z)", text, re.DOTALL)
    return {name: (int(order), part) for order, name, part in found}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
