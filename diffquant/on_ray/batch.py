"""A file of requests over many machines: every picture once, though machines die on the way.

This process alone names, skips and writes pictures, under the names `diffquant.batch` gives them: so a
run goes on where any other was cut off, with Ray or without. Painters only draw. What one drew when it
died is drawn again by another, and since nothing was written there is nothing twice.
"""

import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffquant.batch import Line, Outcome, finished, name_of, told
from diffquant.errors import RunError, UsageError
from diffquant.on_ray.crew import Crew, Heard
from diffquant.on_ray.painter import Drawing, Opened, packed
from diffquant.run import versions

TRIES = 3  # losses over one line, or before anyone was ready, until it is blamed
PATIENCE = 60.0  # seconds of silence until a person is told what is waited for


def draw(
    lines: Sequence[Line],
    crew: Crew,
    folder: Path,
    *,
    replicas: int,
    digests: Mapping[str, str],
    tell: Callable[[str], None],
) -> Iterator[Outcome]:
    """Draws every line that is not drawn yet, telling each outcome as it comes.

    digests  of the plans as this machine's headers tell them, by component

    Raises RunError where painters read other weights than that, or none of them gets ready, and what
    loading raises.
    """
    for line in lines:
        if line.fault is not None:
            yield Outcome(number=line.number, state="failed", error=line.fault)
    run = _Run([line for line in lines if line.fault is None], crew, folder, digests, tell)
    try:
        run.hire_up_to(replicas)
        while not run.is_done:
            heard = crew.hear(PATIENCE)
            if heard is None:
                run.tell_silence()
            else:
                yield from run.turn(heard)
                run.hire_up_to(replicas)
    finally:
        run.dismiss_all()


def write(folder: Path, files: Mapping[str, bytes]) -> tuple[Path, ...]:
    """Each file aside first, then renamed: its name shows the whole of it or nothing."""
    paths = []
    for name, content in files.items():
        aside = folder / f".{name}.{uuid.uuid4().hex}.part"
        try:
            aside.write_bytes(content)
            paths.append(aside.replace(folder / name))
        finally:
            aside.unlink(missing_ok=True)
    return tuple(paths)


class _Run:
    """Who draws what, and what still waits. Lines that ask for the same picture share a name."""

    def __init__(
        self,
        lines: Sequence[Line],
        crew: Crew,
        folder: Path,
        digests: Mapping[str, str],
        tell: Callable[[str], None],
    ) -> None:
        self.crew = crew
        self.folder = folder
        self.digests = digests
        self.tell = tell
        self._unnamed = list(lines)
        self._lines: dict[str, list[Line]] = {}
        self._waiting: deque[str] = deque()
        self._loading: set[int] = set()
        self._idle: list[int] = []
        self._drawing: dict[int, str] = {}
        self._losses: Counter[str] = Counter()
        self._lost_before_ready = 0
        self._left_out = 0
        self._was_ready = False

    @property
    def is_done(self) -> bool:
        return not (self._unnamed or self._lines)

    @property
    def _here(self) -> int:
        return len(self._loading) + len(self._idle) + len(self._drawing)

    def hire_up_to(self, replicas: int) -> None:
        """As many as were asked for, and no more than there is work for."""
        work = len(self._unnamed) + len(self._waiting) + len(self._drawing)
        for _ in range(min(replicas - self._left_out, work) - self._here):
            self._loading.add(self.crew.hire())

    def turn(self, heard: Heard) -> Iterator[Outcome]:
        """Take in one answer, and hand out what waits."""
        if heard.lost is not None:
            yield from self._lost(heard.member, heard.lost)
        elif heard.error is not None:
            self._raised(heard.member, heard.error)
        elif isinstance(heard.answer, Opened):
            yield from self._opened(heard.member, heard.answer)
        elif isinstance(heard.answer, Drawing):
            yield from self._drawn(heard.member, heard.answer)
        yield from self._hand_out()

    def tell_silence(self) -> None:
        if self._loading and not self._was_ready:
            self.tell(
                f"no pipeline is ready yet, {len(self._loading)} are being loaded or wait for room "
                "in the cluster"
            )

    def dismiss_all(self) -> None:
        for member in (*self._loading, *self._idle, *self._drawing):
            self.crew.dismiss(member)

    def _opened(self, member: int, opened: Opened) -> Iterator[Outcome]:
        self._require_same_weights(opened)
        self._tell_versions(opened)
        self._loading.remove(member)
        self._idle.append(member)
        if not self._was_ready:
            self._was_ready = True
            for line in opened.truth:
                self.tell(line)
            yield from self._named(opened.report)

    def _named(self, report: Mapping[str, Any]) -> Iterator[Outcome]:
        """Give each line its name; what has been drawn before is kept."""
        for line in self._unnamed:
            name = name_of(line.request, report)
            if name in self._lines:
                self._lines[name].append(line)
            elif kept := finished(self.folder, name, line.request):
                yield Outcome(number=line.number, state="kept", paths=kept)
            else:
                self._lines[name] = [line]
                self._waiting.append(name)
        self._unnamed = []

    def _drawn(self, member: int, drawing: Drawing) -> Iterator[Outcome]:
        name = self._drawing.pop(member)
        self._idle.append(member)
        if drawing.error is not None:
            yield from self._failed(name, drawing.error)
            return
        try:
            paths = write(self.folder, drawing.files)
        except OSError as error:
            yield from self._failed(name, told(error))
            return
        first, *same = self._lines.pop(name)
        yield Outcome(number=first.number, state="drawn", paths=paths, note=drawing.note)
        for line in same:
            yield Outcome(number=line.number, state="kept", paths=paths)

    def _failed(self, name: str, error: str) -> Iterator[Outcome]:
        for line in self._lines.pop(name):
            yield Outcome(number=line.number, state="failed", error=error)

    def _lost(self, member: int, why: str) -> Iterator[Outcome]:
        """A process or a machine is gone: what it drew is drawn by another."""
        name = self._drawing.pop(member, None)
        self._loading.discard(member)
        self.crew.dismiss(member)
        if name is None:
            self.tell(f"a pipeline was lost while it was loaded: {why}")
            self._count_loss(why)
            return
        number = self._lines[name][0].number
        self._losses[name] += 1
        if self._losses[name] < TRIES:
            self.tell(f"a pipeline was lost over line {number}, which is drawn again: {why}")
            self._waiting.appendleft(name)
        else:
            yield from self._failed(name, f"{TRIES} pipelines were lost over it, the last: {why}")

    def _count_loss(self, why: str) -> None:
        self._lost_before_ready += not self._was_ready
        if self._lost_before_ready >= TRIES:
            raise RunError(
                f"{TRIES} pipelines were lost before one was ready, the last: {why}",
                hint="leave --engine ray out to see whether the model fits this machine",
            )

    def _raised(self, member: int, error: Exception) -> None:
        """A machine that cannot load leaves the work to the others, where there are any."""
        if member not in self._loading:
            raise error
        self._loading.remove(member)
        self.crew.dismiss(member)
        self._left_out += 1
        if not self._here:
            raise error
        self.tell(f"a machine cannot load the pipeline and is left out: {told(error)}")

    def _hand_out(self) -> Iterator[Outcome]:
        while self._waiting and self._idle:
            name = self._waiting.popleft()
            try:
                task = packed(name, self._lines[name][0].request)
            except UsageError as error:
                yield from self._failed(name, told(error))
                continue
            member = self._idle.pop()
            self._drawing[member] = name
            self.crew.ask(member, task)

    def _require_same_weights(self, opened: Opened) -> None:
        found = {name: part["digest"] for name, part in opened.report["components"].items()}
        for name, digest in self.digests.items():
            if found.get(name) != digest:
                raise RunError(
                    f"the {name} that {opened.host} reads is not the one that is here",
                    hint="the same files at the same path on every machine, or a source on the hub",
                )

    def _tell_versions(self, opened: Opened) -> None:
        here = versions()
        others = [
            f"{name} {version} (here {here.get(name)})"
            for name, version in opened.versions.items()
            if name != "threads" and version != here.get(name)
        ]
        if others:
            self.tell(f"{opened.host} has {', '.join(others)}: its pictures may differ")
