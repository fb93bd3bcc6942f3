"""The progress bars of the converters, of bytes and of things: on stderr, where that is a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from diffquant import writing

#: what is being done, done, of
Tell = Callable[[str, int, int], None]


def untold(what: str, done: int, of: int) -> None:
    """For whoever shows no bars."""


@contextmanager
def bar(*, shown: bool = True) -> Iterator["Bar"]:
    """Bars of bytes."""
    with _progress(DownloadColumn(), shown=shown) as bars:
        yield Bar(bars)


@contextmanager
def counted() -> Iterator[Tell]:
    """A bar for each thing that is done many times: drawings, layers."""
    with _progress(MofNCompleteColumn()) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done, total=of)

        yield tell


def _progress(amount: ProgressColumn, *, shown: bool = True) -> Progress:
    """Bars that vanish when the block is left; none at all where nobody would see them."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        amount,
        TimeElapsedColumn(),
    )
    silent = not (shown and console.is_terminal)
    return Progress(*columns, console=console, transient=True, disable=silent)


def told(bars: "Bar | None", what: str) -> writing.Progress | None:
    """A row of those bars, where there are any."""
    return None if bars is None else bars.told(what)


class Bar:
    """One row for each thing that is being done, in bytes."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def told(self, what: str) -> writing.Progress:
        """What the function that does it calls: bytes done, bytes in all, the tensor's name."""

        def moved(done: int, total: int, name: str) -> None:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=total)
            self._bars.update(self._tasks[what], completed=done, total=total)

        return moved
