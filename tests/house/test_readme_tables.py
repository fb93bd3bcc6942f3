"""Tables of the README that are measured, not written."""

import re
from pathlib import Path

from tests.unit.test_silent_failures import table

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


def test_silent_failures_are_noticed_as_the_readme_says(tmp_path: Path) -> None:
    name = "silent-failures"
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert found is not None
    assert found[1].strip() == table(tmp_path)
