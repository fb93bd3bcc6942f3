"""Pictures that come in: judged by their headers, decoded, and kept only as long as their job.

They come as files of a form, or as text that holds them: data:image/png;base64,… Addresses are not
followed.

A file is named after a digest of its pixels, so that a record inside a picture tells what it was
made from and nothing about this server.
"""

import base64
import binascii
import hashlib
import io
import re
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageOps

from diffquant.run import Request
from diffquant.serve.jobs import Job
from diffquant.serve.refusals import Refused
from diffquant.serve.settings import Limits

READ = ("PNG", "JPEG", "WEBP")
NAMED = 16  # hexadecimal digits of the digest in a name
INLINE = re.compile(r"data:[\w.+/-]*;base64,", re.ASCII)


class Uploads:
    """A private folder with the pictures of one request. It goes with `drop`, or with its job."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._folder = tempfile.TemporaryDirectory(prefix="diffquant-upload-")

    def picture(self, data: bytes, field: str) -> str:
        """The path of a picture, turned as its EXIF says. Raises Refused, 400, for what is none."""
        return self._kept(ImageOps.exif_transpose(decoded(data, field, self.limits)).convert("RGB"))

    def mask(self, data: bytes, field: str) -> str:
        """The path of a mask that is white where to paint: where OpenAI's is transparent, or where
        one without transparency is white."""
        image = decoded(data, field, self.limits)
        if "A" in image.getbands() or "transparency" in image.info:
            return self._kept(ImageOps.invert(image.convert("RGBA").getchannel("A")))
        return self._kept(image.convert("L"))

    def belong_to(self, job: Job) -> None:
        """Go when the job has ended, however it does."""
        job.outcome.add_done_callback(lambda _: self.drop())

    def drop(self) -> None:
        """Remove everything."""
        self._folder.cleanup()

    def _kept(self, image: Image.Image) -> str:
        digest = hashlib.sha256(image.tobytes()).hexdigest()[:NAMED]
        path = Path(self._folder.name) / f"upload-{digest}.png"
        image.save(path, "PNG", compress_level=1)
        return str(path)


def decoded(data: bytes, field: str, limits: Limits) -> Image.Image:
    """A picture, whole. Its size is known before its pixels take memory."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=READ)
            _require_small(image.size, field, limits)
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Warning) as error:
        raise Refused(
            400,
            f"{field} is no picture that can be read: {', '.join(READ)} can",
            param=field,
            code="invalid_image",
        ) from error
    return image


def inline(text: str, field: str) -> bytes:
    """What a data: URL holds. Raises Refused, 400, for any other text: nothing is fetched."""
    start = INLINE.match(text)
    if start is None:
        raise Refused(
            400,
            f"{field} is text, and nothing is fetched: send a file, or data:image/png;base64,…",
            param=field,
            code="invalid_image",
        )
    try:
        return base64.b64decode(text[start.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(
            400, f"{field} is no base64: {error}", param=field, code="invalid_image"
        ) from error


def told(request: Request) -> Request:
    """The request as others may read it: uploaded pictures by name, without their folder."""
    image = None if request.image is None else names(request.image)
    mask = None if request.mask_image is None else names([request.mask_image])[0]
    return replace(request, image=image, mask_image=mask)


def names(paths: Iterable[str]) -> tuple[str, ...]:
    """What is told of uploaded files."""
    return tuple(Path(path).name for path in paths)


def _require_small(size: tuple[int, int], field: str, limits: Limits) -> None:
    width, height = size
    if width * height > limits.uploaded:
        raise Refused(
            400,
            f"{field} is {width}x{height}, at most {limits.uploaded} pixels are taken",
            param=field,
            code="limit_exceeded",
        )
