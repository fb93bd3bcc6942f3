"""Rules about names that no linter knows."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFTOVERS = frozenset({"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"})
SOURCES = sorted(
    path for top in ("diffquant", "converters", "presets") for path in (ROOT / top).rglob("*.py")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_is_named_for_a_leftover(path: Path) -> None:
    words = {path.stem.strip("_"), *path.stem.split("_"), path.parent.name}
    assert not words & LEFTOVERS, "a module named for a leftover is a missing module"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path) -> None:
    first = path.read_text(encoding="utf-8").lstrip()
    assert first.startswith(('"""', 'r"""')), "a module opens with a docstring"
