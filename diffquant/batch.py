"""A file of requests -> pictures, line by line: what is drawn stays, a bad line stops nothing.

A line of a .jsonl file is an object of request fields, `{"prompt": "a fox", "seed": 7}`; a line of
any other text file is a prompt. Fields a line leaves out are those that were typed.

The name of a picture ends in a digest of all that decides it: the request as the line and the typed
fields have it, and the plans of the models. So a run that was cut off goes on where it was, and two
machines that share a folder never disagree about a name.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from diffquant.errors import DiffquantError, RunError, UsageError
from diffquant.run import (
    OnStep,
    Request,
    fill,
    generate,
    read_metadata,
    recorded,
    rounded,
    save,
    slug,
)

DIGITS = 10  # hexadecimal, of the digest in a name

#: A pipeline's own complaints and an exhausted device are one line's misfortune alone.
MISFORTUNES = (DiffquantError, ValueError, RuntimeError, OSError)

State = Literal["drawn", "kept", "failed"]
OnLine = Callable[["Line"], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of the file, counted from 1: a request, or why it is none."""

    number: int
    request: Request = Request()
    fault: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a line; `kept` pictures were there before.

    note  what is otherwise than asked
    """

    number: int
    state: State
    paths: tuple[Path, ...] = ()
    error: str | None = None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """One line of the log."""
        return {
            "line": self.number,
            "state": self.state,
            "paths": [str(path) for path in self.paths],
            **({} if self.error is None else {"error": self.error}),
            **({} if self.note is None else {"note": self.note}),
        }


def read(path: Path, typed: Request) -> tuple[Line, ...]:
    """Every line that is not blank. Raises UsageError where there is none, or no such file."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"--input-file {str(path)!r}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--input-file {str(path)!r} cannot be read: {error}") from error
    spoken = _object if path.suffix == ".jsonl" else _prompt
    numbered = enumerate(text.splitlines(), start=1)
    lines = tuple(spoken(number, line, typed) for number, line in numbered if line.strip())
    if not lines:
        raise UsageError(
            f"--input-file {str(path)!r} is empty", hint='a line is like {"prompt": "a red apple"}'
        )
    return lines


def draw(
    pipeline: Any,
    lines: Sequence[Line],
    folder: Path,
    *,
    defaults: Mapping[str, Any],
    flags: Mapping[str, Any],
    report: Mapping[str, Any],
    on_line: OnLine | None = None,
    on_step: OnStep | None = None,
) -> Iterator[Outcome]:
    """Draws every line that is not drawn yet, in order, telling each outcome as it comes."""
    for line in lines:
        if on_line is not None:
            on_line(line)
        if line.fault is not None:
            yield Outcome(number=line.number, state="failed", error=line.fault)
            continue
        name = name_of(line.request, report)
        if kept := finished(folder, name, line.request):
            yield Outcome(number=line.number, state="kept", paths=kept)
            continue
        try:
            request = fill(line.request, pipeline, defaults)
            result = recorded(generate(pipeline, request, on_step), flags=flags, report=report)
            paths = save(result, folder, name)
        except MISFORTUNES as error:
            yield Outcome(number=line.number, state="failed", error=told(error))
            continue
        note = rounded(line.request, result.request)
        yield Outcome(number=line.number, state="drawn", paths=tuple(paths), note=note)


def name_of(request: Request, report: Mapping[str, Any]) -> str:
    """`a-red-apple-42-1f3c9a0b7e`: prompt, seed, and the digest of what decides the picture."""
    models = {name: part["digest"] for name, part in report.get("components", {}).items()}
    decides = {key: report.get(key) for key in ("dtype", "numerics", "lora")}
    if settings := report.get("settings"):
        decides["settings"] = {name: part["digest"] for name, part in settings.items()}
    text = json.dumps([request.typed, models, decides], sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
    return f"{slug(request.prompt or '')}-{request.seeds[0]}-{digest}"


def finished(folder: Path, name: str, request: Request) -> tuple[Path, ...]:
    """The pictures of that name when all are there and whole; leftovers of a run that was cut off
    are removed."""
    found = sorted(path for path in folder.glob(f"{name}*") if not path.name.endswith(".part"))
    whole = [path for path in found if _is_whole(path)]
    if len(whole) >= len(request.seeds):
        return tuple(whole)
    for path in found:
        path.unlink()
    return ()


def told(error: Exception) -> str:
    """Why a line failed, as one line of text."""
    if isinstance(error, DiffquantError) and error.hint:
        return f"{error.what} (hint: {error.hint})"
    return str(error) or type(error).__name__


def _is_whole(path: Path) -> bool:
    try:
        return bool(read_metadata(path))
    except UsageError:
        return False


def _prompt(number: int, line: str, typed: Request) -> Line:
    return Line(number=number, request=replace(typed, prompt=line.strip()))


def _object(number: int, line: str, typed: Request) -> Line:
    try:
        said = json.loads(line)
        if not isinstance(said, dict):
            raise RunError(f"a JSON {type(said).__name__} where an object was needed")
        request = replace(typed, **{key: _value(key, value) for key, value in said.items()})
        if not request.prompt:
            raise RunError("there is no prompt")
    except json.JSONDecodeError as error:
        return Line(number=number, fault=f"no JSON: {error.msg} at column {error.colno}")
    except DiffquantError as error:
        return Line(number=number, fault=told(error))
    return Line(number=number, request=request)


def _value(key: str, value: Any) -> Any:
    known = {item.name for item in fields(Request)}
    if key not in known:
        near = get_close_matches(key, known, n=1)
        raise RunError(f"unknown field {key!r}", hint=near[0] if near else None)
    if key == "image" and isinstance(value, str | list):
        return (value,) if isinstance(value, str) else tuple(value)
    wanted = get_args(get_type_hints(Request)[key])
    fits = (*wanted, int) if float in wanted else wanted
    if isinstance(value, bool) or not isinstance(value, fits):
        raise RunError(f"{key} is {value!r}, {wanted[0].__name__} was needed")
    return value
