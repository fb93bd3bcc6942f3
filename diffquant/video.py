"""Frames -> a file that tells how it was made: MP4 through PyAV, GIF and WebP through Pillow, or PNGs.

Which one, the ending of the file's name says. Of these MP4 alone holds sound.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffquant.errors import UsageError

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image

METADATA_KEY = "diffquant"
DEFAULT_ENDING = ".mp4"
DESCRIPTION = 0x010E  # EXIF ImageDescription; WebP has no comment of its own
QUALITY = {"crf": "17", "preset": "medium"}  # of x264: what the eye takes for lossless

SOUND_BITS = 192_000  # of AAC, per second
CHANNELS = {1: "mono", 2: "stereo"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sound:
    """What a video sounds like.

    samples  [channels, S] float32 between -1 and 1, one channel or two
    rate     samples per second
    """

    samples: "numpy.ndarray[Any, Any]"
    rate: int

    def __str__(self) -> str:
        return f"{self.rate} Hz {CHANNELS[len(self.samples)]}"

    def to_json(self) -> dict[str, Any]:
        """Rate, channels, and for how many seconds there are samples."""
        channels, count = self.samples.shape
        return {
            "sample_rate": self.rate,
            "channels": channels,
            "seconds": round(count / self.rate, 3),
        }

    def lasting(self, seconds: float) -> "Sound":
        """Cut, or silence put behind, to end with the frames: a model counts both in steps of its
        own."""
        import numpy

        wanted = round(seconds * self.rate)
        cut = self.samples[:, :wanted]
        padded = numpy.pad(cut, ((0, 0), (0, wanted - cut.shape[1])))
        return Sound(samples=padded, rate=self.rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Film:
    """Frames of one size, how many are shown per second, and what is heard meanwhile."""

    frames: Sequence["Image"]
    fps: int
    sound: Sound | None = None


#: the film, its record as JSON, an open stream in bytes
Writer = Callable[[Film, str, Any], None]


def _mp4(film: Film, record: str, stream: Any) -> None:
    import av
    import numpy

    width, height = (size - size % 2 for size in film.frames[0].size)  # yuv420p halves both
    with av.open(stream, "w", format="mp4", options={"movflags": "use_metadata_tags"}) as container:
        container.metadata["comment"] = record
        track = container.add_stream("libx264", rate=film.fps, options=QUALITY)
        track.width, track.height, track.pix_fmt = width, height, "yuv420p"
        # Before the frames: the container holds back what comes first, and sound is the smaller.
        for packet in _aac(film, container):
            container.mux(packet)
        for frame in film.frames:
            pixels = numpy.asarray(frame.crop((0, 0, width, height)))
            container.mux(track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(track.encode())


def _aac(film: Film, container: Any) -> Iterator[Any]:
    """Packets of the sound, in a track of its own; none where there is no sound."""
    if film.sound is None:
        return
    import av
    import numpy

    sound = film.sound.lasting(len(film.frames) / film.fps)
    layout = CHANNELS[len(sound.samples)]
    track = container.add_stream("aac", rate=sound.rate, layout=layout)
    track.bit_rate = SOUND_BITS
    samples = numpy.ascontiguousarray(sound.samples, dtype=numpy.float32)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
    frame.sample_rate = sound.rate
    frame.pts = 0  # else the encoder's own delay is heard as one
    yield from track.encode(frame)
    yield from track.encode()


def _gif(film: Film, record: str, stream: Any) -> None:
    _animate(film, stream, "GIF", comment=record.encode())


def _webp(film: Film, record: str, stream: Any) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[DESCRIPTION] = record
    _animate(film, stream, "WEBP", exif=exif, quality=90)


def _animate(film: Film, stream: Any, kind: str, **told: Any) -> None:
    first, *rest = film.frames
    pause = round(1000 / film.fps)  # milliseconds
    first.save(stream, kind, save_all=True, append_images=rest, duration=pause, loop=0, **told)


WRITERS: Mapping[str, Writer] = {".mp4": _mp4, ".gif": _gif, ".webp": _webp}
#: A name that ends in this asks for one numbered picture per frame.
FRAMES = ".png"
SOUNDING = frozenset({".mp4"})


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
