"""What a person reads while a command runs: on stderr, readable without colour."""

import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

import click

from diffquant import ranks
from diffquant.errors import DiffquantError

if TYPE_CHECKING:
    from rich.progress import Progress

MOMENT = 5.0  # seconds


def say(text: str) -> None:
    """One line of talk."""
    click.echo(text, err=True)


def note(text: str) -> None:
    """Something a person should know though nothing is wrong."""
    click.echo(f"{click.style('note:', fg='yellow')} {text}", err=True)


@contextmanager
def only(speaks: bool) -> Iterator[None]:
    """Say nothing, on stdout or stderr, unless this process is the one that speaks."""
    with ExitStack() as stack:
        if not speaks:
            void = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(void))
            stack.enter_context(redirect_stderr(void))
        yield


def refuse(error: Exception) -> int:
    """Tell an error in the house's two lines; returns the exit code."""
    what, hint, code = _told(error)
    rank = ranks.here()
    if not rank.is_first:
        # What the first says too is said by then, and torchrun has ended the rest of them.
        time.sleep(MOMENT)
        what = f"process {rank.number}: {what}"
    click.echo(f"{click.style('error:', fg='red', bold=True)} {what}", err=True)
    if hint:
        click.echo(f"{click.style('hint:', fg='cyan')} {hint}", err=True)
    return code


def table(rows: Iterable[Sequence[str]], *, indent: str = "  ") -> str:
    """Columns aligned with two spaces between; the last one is as long as it is."""
    kept = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*kept, strict=True)][:-1]
    lines = (
        indent + "  ".join([*map(str.ljust, row[:-1], widths), row[-1]]).rstrip() for row in kept
    )
    return "\n".join(lines)


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """`name   value` lines."""
    return table(((name, value) for name, value in pairs), indent="")


def size(count: int) -> str:
    """Bytes in the unit a person would use."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"


def count(number: int, thing: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


@contextmanager
def progress() -> Iterator["Progress"]:
    """Bars on stderr that vanish when done; nothing at all where stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        yield bars


def quiet() -> None:
    """Leave the talking to us: libraries report errors only."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def quiet_bars() -> None:
    """No bars but ours. Imports the libraries, so call it when they are needed anyway."""
    from diffquant.attach import hush

    hush()


def _told(error: Exception) -> tuple[str, str | None, int]:
    if isinstance(error, DiffquantError):
        return error.what, error.hint, error.exit_code
    if isinstance(error, click.NoSuchOption):
        return f"there is no option {error.option_name!r}", _nearest_option(error), 2
    if isinstance(error, click.ClickException):
        return _lowered(error.format_message()), _help_hint(error), error.exit_code
    return _lowered(str(error)), None, 1


def _nearest_option(error: click.NoSuchOption) -> str | None:
    near = sorted(error.possibilities or ())
    return f"did you mean {' or '.join(near)}?" if near else _help_hint(error)


def _help_hint(error: Any) -> str | None:
    context = getattr(error, "ctx", None)
    return f"{context.command_path} --help" if context else None


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(".")
