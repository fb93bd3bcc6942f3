"""`python -m benchmarks.long FILE.xml …`: what the long tests found, as docs/LONG.md.

`make long` runs them and then this; the files are pytest's `--junitxml`. It exits with 1 if a test
failed, and writes the page all the same: what fails is shown as failed.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from xml.etree import ElementTree

from benchmarks import _machine
from benchmarks._results import table

PAGE = Path(__file__).parents[1] / "docs" / "LONG.md"
OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}
HEAD = """# The long tests

What is too slow for every change runs with `make long`, by hand. Written by it; nothing here was typed.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One test as pytest ran it: its file, its function without what parametrizes it, seconds."""

    file: str
    test: str
    outcome: str
    seconds: float


def cases(path: Path) -> Iterator[Case]:
    """Every test in one `--junitxml` file."""
    for found in ElementTree.parse(path).iter("testcase"):
        told = (OUTCOMES[child.tag] for child in found if child.tag in OUTCOMES)
        yield Case(
            file=found.attrib["classname"].replace(".", "/") + ".py",
            test=found.attrib["name"].partition("[")[0],
            outcome=next(told, "passed"),
            seconds=float(found.attrib["time"]),
        )


def page(found: Iterable[Case]) -> str:
    """A row per test: its sentence, how many cases it has, what came of them, how long they took."""
    ordered = sorted(found, key=lambda case: (case.file, case.test))
    rows = [
        _row(list(group)) for _, group in groupby(ordered, key=lambda case: (case.file, case.test))
    ]
    seconds = sum(case.seconds for case in ordered)
    return (
        f"{HEAD}\n{table(('test', 'where', 'cases', 'seconds'), rows)}\n\n"
        f"<sub>{len(ordered)} cases, {seconds / 60:.0f} minutes. {_machine.description(1)}</sub>\n"
    )


def _row(group: list[Case]) -> tuple[str, ...]:
    counted = Counter(case.outcome for case in group)
    return (
        group[0].test.removeprefix("test_").replace("_", " "),
        f"`{group[0].file}`",
        ", ".join(f"{count} {outcome}" for outcome, count in sorted(counted.items())),
        f"{sum(case.seconds for case in group):.0f}",
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.xml")
    parser.add_argument("--output", type=Path, default=PAGE, metavar="FILE")
    options = parser.parse_args()
    found = [case for path in options.files for case in cases(path)]
    options.output.write_text(page(found), encoding="utf-8")
    return int(any(case.outcome == "failed" for case in found))


if __name__ == "__main__":
    sys.exit(main())
