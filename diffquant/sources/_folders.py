"""A directory of a source, and the one that is on this disk."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from diffquant.errors import OfflineError, SourceError

INDEX = "model_index.json"
CONFIG = "config.json"
COMPONENT = "transformer"
WEIGHTS = (".safetensors", ".gguf")


class Folder(Protocol):
    """A directory of a source.

    origin      how messages call it
    root        where it lies, or will lie, on this disk
    is_partial  only what an earlier download left here can be seen
    """

    @property
    def origin(self) -> str: ...
    @property
    def root(self) -> Path: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def is_partial(self) -> bool: ...
    def names(self) -> list[str]: ...
    def folders(self) -> list[str]: ...
    def inside(self, name: str) -> "Folder": ...
    def size(self, name: str) -> int | None: ...
    def is_sidecar(self, name: str) -> bool: ...
    def path(self, name: str) -> Path: ...


@dataclass(frozen=True, slots=True)
class LocalFolder:
    root: Path
    origin: str

    @property
    def revision(self) -> None:
        return None

    @property
    def is_partial(self) -> bool:
        return False

    def names(self) -> list[str]:
        # a broken link counts: it is named in the error instead of vanishing
        return sorted(entry.name for entry in self.root.iterdir() if not entry.is_dir())

    def folders(self) -> list[str]:
        return sorted(entry.name for entry in self.root.iterdir() if entry.is_dir())

    def inside(self, name: str) -> "LocalFolder":
        return LocalFolder(self.root / name, f"{self.origin.rstrip('/')}/{name}")

    def size(self, name: str) -> int | None:
        path = self.root / name
        return path.stat().st_size if path.exists() else None

    def is_sidecar(self, name: str) -> bool:
        return name.endswith(".json")

    def path(self, name: str) -> Path:
        return self.root / name


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises SourceError with line and column."""
    try:
        found = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise SourceError(
            f"'{path}' is not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}",
            hint="correct it, or download it again",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"'{path}' cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise SourceError(
            f"'{path}' holds a JSON {type(found).__name__} where an object was needed"
        )
    return found


def not_here(what: str, place: str) -> OfflineError:
    name = "/".join(place.split("/")[:2])
    return OfflineError(
        f"{what} is not on this machine, and the hub is out of reach or ruled out (offline)",
        hint=f"`hf download {name}` with a network, or name the path of a copy",
    )


def is_weights(name: str) -> bool:
    return name.endswith(WEIGHTS)
