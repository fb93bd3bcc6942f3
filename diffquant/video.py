"""Frames -> a file that tells how it was made: MP4 through PyAV, GIF and WebP through Pillow, or PNGs.

Which one, the ending of the file's name says.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffquant.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    Frames = Sequence[Image]

METADATA_KEY = "diffquant"
DEFAULT_ENDING = ".mp4"
DESCRIPTION = 0x010E  # EXIF ImageDescription; WebP has no comment of its own
QUALITY = {"crf": "17", "preset": "medium"}  # of x264: what the eye takes for lossless

#: frames, frames per second, the record as JSON, an open stream in bytes
Writer = Callable[["Frames", int, str, Any], None]


def _mp4(frames: "Frames", fps: int, record: str, stream: Any) -> None:
    import av
    import numpy

    width, height = (size - size % 2 for size in frames[0].size)  # yuv420p halves both
    with av.open(stream, "w", format="mp4", options={"movflags": "use_metadata_tags"}) as container:
        container.metadata["comment"] = record
        track = container.add_stream("libx264", rate=fps, options=QUALITY)
        track.width, track.height, track.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            pixels = numpy.asarray(frame.crop((0, 0, width, height)))
            container.mux(track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(track.encode())


def _gif(frames: "Frames", fps: int, record: str, stream: Any) -> None:
    _animate(frames, fps, stream, "GIF", comment=record.encode())


def _webp(frames: "Frames", fps: int, record: str, stream: Any) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[DESCRIPTION] = record
    _animate(frames, fps, stream, "WEBP", exif=exif, quality=90)


def _animate(frames: "Frames", fps: int, stream: Any, kind: str, **told: Any) -> None:
    first, *rest = frames
    first.save(
        stream, kind, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, **told
    )


WRITERS: Mapping[str, Writer] = {".mp4": _mp4, ".gif": _gif, ".webp": _webp}
#: A name that ends in this asks for one numbered picture per frame.
FRAMES = ".png"


def ending(name: str | None) -> str:
    """The ending that decides, checked before anything is drawn.

    Raises UsageError for one that nothing writes, and for MP4 where PyAV is missing.
    """
    found = (Path(name).suffix.lower() if name else "") or DEFAULT_ENDING
    if found not in (*WRITERS, FRAMES):
        known = ", ".join((*WRITERS, FRAMES))
        raise UsageError(
            f"a video is not written as {found!r}", hint=f"--output-file-name with one of {known}"
        )
    if found == ".mp4" and find_spec("av") is None:
        raise UsageError(
            "an MP4 needs PyAV, which is not installed",
            hint="pip install 'diffquant[video]', or --output-file-name clip.webp (.gif, .png)",
        )
    return found


def read_record(path: Path) -> str | None:
    """The JSON a video was written with; None where there is none."""
    if path.suffix.lower() == ".mp4":
        return _from_mp4(path)
    from PIL import Image

    with Image.open(path) as image:
        text = image.info.get("comment") or image.getexif().get(DESCRIPTION)
    told = text.decode() if isinstance(text, bytes) else text
    return told if told and told.startswith("{") and METADATA_KEY in json.loads(told) else None


def _from_mp4(path: Path) -> str | None:
    if find_spec("av") is None:
        raise UsageError(
            f"{str(path)!r} is read through PyAV, which is not installed",
            hint="pip install 'diffquant[video]'",
        )
    import av

    try:
        with av.open(path) as container:
            told: str | None = container.metadata.get("comment")
    except av.FFmpegError as error:
        raise UsageError(f"{str(path)!r} is not a video: {error}") from error
    return told
