"""Pictures and videos as files that can be drawn again, their record inside."""

import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from diffquant import video
from diffquant.errors import UsageError
from diffquant.run._result import Result
from diffquant.video import Film

#: Endings of pictures and videos that somebody means who types them for a picture.
OTHERS = frozenset(
    {".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif", ".mp4", ".mov", ".webm"}
)
METADATA_KEY = "diffquant"
LONGEST_STEM = 60  # characters of the prompt in a file name


def save(result: Result, output_path: Path, output_file_name: str | None = None) -> list[Path]:
    """Write each picture as PNG, each video as its name's ending says, the record inside; nothing is
    ever overwritten.

    The name is made of prompt and seed unless given; a taken one becomes name-2.png, name-3.png …
    """
    output_path.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for index, seed in enumerate(result.request.seeds):
        name = output_file_name or f"{slug(result.request.prompt or '')}-{seed}"
        record = {**result.record, "image": index, "image_seed": seed}
        if result.videos:
            paths += _write_video(result.films[index], record, output_path / name)
        else:
            paths.append(_write_png(result.images[index], record, output_path / _as_png(name)))
    return paths


def require_name(output_file_name: str | None, *, is_video: bool) -> None:
    """Raises UsageError for a name whose ending nothing of that kind is written with."""
    if is_video:
        video.ending(output_file_name)
    elif output_file_name is not None:
        _as_png(output_file_name)


def read_metadata(path: Path) -> dict[str, Any]:
    """What `save` wrote into a file. Raises UsageError for one that holds no such record."""
    try:
        text = _record_text(path)
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {str(path)!r}") from error
    except OSError as error:
        raise UsageError(f"{str(path)!r} is not a picture") from error
    if text is None:
        raise UsageError(
            f"{str(path)!r} holds no record of how it was made",
            hint="pictures written by `diffquant generate` do, unless another program rewrote them",
        )
    record: dict[str, Any] = json.loads(text)
    return record


def _record_text(path: Path) -> str | None:
    if path.suffix.lower() in video.WRITERS:
        if not path.exists():
            raise FileNotFoundError(path)
        return video.read_record(path)
    with Image.open(path) as image:
        text: str | None = getattr(image, "text", {}).get(METADATA_KEY)
    return text


def slug(prompt: str) -> str:
    """'A red apple!' -> 'a-red-apple'; letters of every script stay."""
    words = "-".join(re.findall(r"\w+", prompt.lower()))
    return words[:LONGEST_STEM].strip("-") or "picture"


def _as_png(name: str) -> str:
    suffix = Path(name).suffix.lower()
    if suffix in OTHERS:
        raise UsageError(
            f"pictures are written as PNG, not {suffix!r}", hint=f"{Path(name).stem}.png"
        )
    return name if suffix == ".png" else f"{name}.png"


def _write_png(image: Image.Image, record: Mapping[str, Any], wanted: Path) -> Path:
    """Atomic: the name is reserved first, and shows either nothing or the whole picture."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt(METADATA_KEY, json.dumps(record, ensure_ascii=False))
    return _placed(wanted, lambda stream: image.save(stream, "PNG", pnginfo=text))


def _write_video(film: Film, record: Mapping[str, Any], wanted: Path) -> list[Path]:
    """One file, or for a name that ends in .png one picture per frame."""
    kind = video.ending(wanted.name)
    if film.sound is not None and kind not in video.SOUNDING:
        record = {**record, "sound": f"left out: {kind} holds none"}
    if kind == video.FRAMES:
        return [
            _write_png(
                frame, {**record, "frame": index}, wanted.with_stem(f"{wanted.stem}-{index:04}")
            )
            for index, frame in enumerate(film.frames)
        ]
    text = json.dumps({METADATA_KEY: True, **record})
    write, path = video.WRITERS[kind], wanted.with_name(f"{wanted.name.removesuffix(kind)}{kind}")
    return [_placed(path, lambda stream: write(film, text, stream))]


def _placed(wanted: Path, write: Callable[[Any], None]) -> Path:
    """Write to one side, then take the reserved name."""
    path = _reserve(wanted)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as stream:
        write(stream)
    os.chmod(stream.name, path.stat().st_mode)
    os.replace(stream.name, path)
    return path


def _reserve(wanted: Path) -> Path:
    """Create the first free name of wanted, wanted-2, wanted-3 …"""
    for number in itertools.count(1):
        stem = wanted.stem if number == 1 else f"{wanted.stem}-{number}"
        path = wanted.with_name(stem + wanted.suffix)
        try:
            path.open("x").close()
        except FileExistsError:
            continue
        return path
    raise AssertionError("unreachable")
