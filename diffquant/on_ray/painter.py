"""A pipeline in a process of Ray's. It needs no folder of the one who asks, and leaves nothing behind:
pictures come and go as bytes."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffquant import loading
from diffquant.batch import MISFORTUNES, told
from diffquant.errors import UsageError
from diffquant.on_ray.place import settle
from diffquant.resolve import ModelFlags
from diffquant.run import Request, fill, generate, recorded, rounded, save, versions


@dataclass(frozen=True, slots=True, kw_only=True)
class Commission:
    """What every painter loads, and how it draws.

    folder    in which paths were typed; entered on machines that have it
    threads   of torch, on a CPU
    defaults  of the model's preset
    flags     what was typed, for the record inside every picture
    """

    model: ModelFlags
    run: loading.RunFlags
    folder: str
    threads: int
    defaults: Mapping[str, Any]
    flags: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A painter that is ready: where it is, what it runs in words and in full, with which versions."""

    host: str
    truth: tuple[str, ...]
    report: Mapping[str, Any]
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A picture to draw on a machine that has none of the files it starts from.

    name      of the picture, without its ending
    pictures  contents of the files the request names
    """

    name: str
    request: Request
    pictures: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Whole files by name, as they are to be written; or why there are none.

    note  what is otherwise than asked
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    error: str | None = None
    note: str | None = None


class Painter:
    """One pipeline, loaded by `open`."""

    def __init__(self, commission: Commission) -> None:
        self.commission = commission
        self._pipeline: Any = None
        self._report: Mapping[str, Any] = {}

    def open(self) -> Opened:
        """Load. Raises what `loading.load` raises."""
        settle(self.commission.folder, self.commission.threads)
        self._pipeline = loading.load(self.commission.model, self.commission.run)
        self._pipeline.set_progress_bar_config(disable=True)
        report = loading.report(self._pipeline)
        self._report = report.to_json()
        return Opened(
            host=socket.gethostname(),
            truth=(*report.truth_lines, *map(str, report.lora)),
            report=self._report,
            versions=versions(),
        )

    def draw(self, task: Task) -> Drawing:
        """Every picture of the request, or the misfortune of this one alone."""
        with TemporaryDirectory(prefix="diffquant-") as folder:
            try:
                request = fill(_unpacked(task, folder), self._pipeline, self.commission.defaults)
                result = generate(self._pipeline, request)
                named = replace(
                    result.request, image=task.request.image, mask_image=task.request.mask_image
                )
                whole = recorded(
                    replace(result, request=named),
                    flags=self.commission.flags,
                    report=self._report,
                )
                paths = save(whole, Path(folder) / "drawn", task.name)
            except MISFORTUNES as error:
                return Drawing(error=told(error))
            return Drawing(
                files={path.name: path.read_bytes() for path in paths},
                note=rounded(task.request, result.request),
            )


def packed(name: str, request: Request) -> Task:
    """The request with the contents of its files. Raises UsageError for one that cannot be read."""
    try:
        pictures = {path: Path(path).read_bytes() for path in _paths(request)}
    except OSError as error:
        raise UsageError(f"{error.filename!r} cannot be read: {error.strerror}") from error
    return Task(name=name, request=request, pictures=pictures)


def _unpacked(task: Task, folder: str) -> Request:
    """The request with paths of this machine."""
    here: dict[str, str] = {}
    for number, (path, content) in enumerate(task.pictures.items()):
        own = Path(folder) / f"{number}{Path(path).suffix}"
        own.write_bytes(content)
        here[path] = str(own)
    image, mask = task.request.image, task.request.mask_image
    return replace(
        task.request,
        image=image and tuple(here[path] for path in image),
        mask_image=mask and here[mask],
    )


def _paths(request: Request) -> tuple[str, ...]:
    mask = () if request.mask_image is None else (request.mask_image,)
    return (*(request.image or ()), *mask)
