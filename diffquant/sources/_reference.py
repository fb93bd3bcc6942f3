"""What was typed, taken apart: a path on this disk, a bundled model, or a place on the hub."""

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import unquote, urlsplit

from diffquant.errors import SourceError
from diffquant.sources._folders import is_weights

MODELS = Path(__file__).parents[1] / "models"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A source taken apart: a path on this disk, or a repository and a place inside it."""

    origin: str
    path: Path | None = None
    repository: str = ""
    inside: str = ""
    selector: str | None = None
    revision: str | None = None


_SUFFIXES = re.compile(r"(?P<body>[^@:]+)(:(?P<selector>[^@:/]+))?(@(?P<revision>[^@:]+))?")
_REPOSITORY = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/(?P<inside>.+))?")
FORMS = "a path, org/repo, org/repo/folder/file.safetensors or org/repo@revision"


def referenced(source: str) -> Reference:
    if re.match(r"\w+://", source):
        return _from_url(source)
    if source and Path(source).expanduser().exists():
        return Reference(origin=source, path=Path(source).expanduser())
    parts = _SUFFIXES.fullmatch(source)
    if parts is None:
        raise SourceError(f"{source!r} is no source", hint=f"a source is {FORMS}")
    body, selector, revision = parts["body"], parts["selector"], parts["revision"]
    path = _on_disk(body)
    if path is not None and revision is not None:
        raise SourceError(
            f"{source!r}: the local path {body!r} has no revisions", hint=f"leave out `@{revision}`"
        )
    if path is not None:
        return Reference(origin=body, path=path, selector=selector)
    place = _REPOSITORY.fullmatch(body.rstrip("/"))
    if place is None or (place["inside"] is None and is_weights(body)):
        near = get_close_matches(body, bundled_names(), n=1) or _nearest_paths(Path(body))
        raise SourceError(
            f"{source!r} is no file or directory here, no bundled model and no repository name",
            hint=f"did you mean '{near[0]}'?" if near else f"a source is {FORMS}",
        )
    return Reference(
        origin=source,
        repository=place["repository"],
        inside=place["inside"] or "",
        selector=selector,
        revision=revision,
    )


def _on_disk(body: str) -> Path | None:
    """The path that `body` means, bundled models included; None when it must be a repository."""
    path = Path(body).expanduser()
    if path.exists():
        return path
    name, _, rest = body.partition("/")
    is_bundled = name in bundled_names()
    if is_bundled:
        path = MODELS / name / rest
    if is_bundled and path.exists():
        return path
    if is_bundled or body.startswith((".", "/", "~")):
        near = _nearest_paths(path)
        raise SourceError(
            f"no file or directory '{path}'", hint=f"did you mean '{near[0]}'?" if near else None
        )
    return None


def _nearest_paths(path: Path) -> list[Path]:
    """Paths that are here and spelled alike, where the path leaves the disk."""
    while not path.parent.exists():
        path = path.parent
    if not path.parent.is_dir():
        return [path.parent]
    return [path.parent / name for name in get_close_matches(path.name, os.listdir(path.parent))]


def _from_url(source: str) -> Reference:
    url = urlsplit(source)
    hosts = {"huggingface.co", "www.huggingface.co", "hf.co", urlsplit(endpoint()).netloc}
    parts = [unquote(part) for part in url.path.strip("/").split("/")]
    is_place = len(parts) == 2 or (len(parts) > 3 and parts[2] in ("tree", "blob", "resolve"))
    if url.netloc not in hosts or not is_place or parts[0] in ("datasets", "spaces"):
        raise SourceError(
            f"{source!r} is no page of a model on the hub",
            hint="like https://huggingface.co/org/repo or …/org/repo/blob/main/file.safetensors",
        )
    return Reference(
        origin=source,
        repository="/".join(parts[:2]),
        inside="/".join(parts[4:]),
        revision=parts[3] if len(parts) > 2 else None,
    )


def bundled_names() -> tuple[str, ...]:
    """Models that come with the package."""
    if not MODELS.is_dir():
        return ()
    folders = (entry for entry in MODELS.iterdir() if entry.is_dir())
    return tuple(sorted(entry.name for entry in folders if entry.name[0] not in "._"))


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
