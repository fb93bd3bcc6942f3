"""Every converter that is found keeps the one contract of what can be typed to it."""

import subprocess
import sys
from dataclasses import fields

import click
import pytest
from click.testing import CliRunner

from diffquant.cli.convert import COMMAND, CONVERTERS
from diffquant.converters._options import Writing
from diffquant.errors import UsageError

NAMES = CONVERTERS.names()
WRITERS = [
    name
    for name in NAMES
    if "output_dir" in {parameter.name for parameter in CONVERTERS.load(name).params}
]


def options(name: str) -> dict[str | None, click.Parameter]:
    return {parameter.name: parameter for parameter in CONVERTERS.load(name).params}


@pytest.mark.parametrize("name", NAMES)
def test_it_says_in_one_line_and_in_full_what_it_does(name: str) -> None:
    command = CONVERTERS.load(name)
    assert command.short_help and command.short_help.endswith(".")
    listed = CliRunner().invoke(COMMAND, ["--help"], terminal_width=80).stdout
    assert any(
        line.split() == [name.replace("_", "-"), *command.short_help.split()]
        for line in listed.splitlines()
    )
    shown = CliRunner().invoke(command, ["--help"])
    assert shown.exit_code == 0
    assert " ".join((command.help or "").split())[:40] in " ".join(shown.stdout.split())


@pytest.mark.parametrize("name", WRITERS)
def test_what_writes_weights_takes_the_whole_contract(name: str) -> None:
    missing = {each.name for each in fields(Writing)} - set(options(name))
    assert not missing


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(WRITERS)))
def test_what_writes_something_else_says_where_and_replaces_nothing_unasked(name: str) -> None:
    assert {"output", "overwrite"} <= set(options(name))


def test_a_contract_that_cannot_be_kept_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="--no-check decodes nothing that --max-error"):
        Writing(output_dir="x", max_error=0.1, no_check=True)  # type: ignore[arg-type]


def test_a_converter_runs_by_itself_and_refuses_in_two_lines() -> None:
    words = ["-m", "diffquant.converters.transcode", "nowhere", "out", "--to", "modelopt"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    error, hint = done.stderr.strip().splitlines()[-2:]
    assert error.startswith("error: ") and hint.startswith("hint: ")
