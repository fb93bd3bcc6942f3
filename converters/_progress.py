"""The one progress bar of the converters: on stderr, where stderr is a terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from diffquant import writing


@contextmanager
def bar(*, shown: bool = True) -> Iterator["Bar"]:
    """Bars that vanish when the block is left; none at all where nobody would see them."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        DownloadColumn(),
        TimeElapsedColumn(),
    )
    silent = not (shown and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=silent) as bars:
        yield Bar(bars)


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
