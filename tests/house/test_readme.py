"""The README tells the truth: generated blocks are fresh, links exist, Python blocks run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def block(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert found is not None, f"README.md has no block {name!r}"
    return found[1].strip()


def test_the_matrix_is_what_the_registries_say() -> None:
    from diffquant.cli.formats import matrix

    assert block("matrix") == matrix()


def test_the_command_block_is_the_help() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "diffquant", "--help"], capture_output=True, text=True, check=True
    )
    assert block("help") == f"```\n{shown.stdout.strip()}\n```"


def test_every_python_block_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for text in blocks:
        ran = subprocess.run(
            [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr


def found(pattern: str) -> list[tuple[Path, str]]:
    """Every page and what of it the pattern catches, each once."""
    return [
        (page, text)
        for page in PAGES
        for text in sorted(set(re.findall(pattern, page.read_text("utf-8"))))
    ]


@pytest.mark.parametrize(("page", "link"), found(r"\]\(([^)#:]+)\)"))
def test_every_link_leads_somewhere(page: Path, link: str) -> None:
    assert (page.parent / link).exists()


@pytest.mark.parametrize(
    ("page", "path"), found(r"`((?:tests|diffquant|presets|converters|examples)/[\w./-]*)`")
)
def test_every_path_that_is_named_exists(page: Path, path: str) -> None:
    assert (ROOT / path).exists(), page
