"""Pictures as bytes, and the shelf that holds those whose address was asked for."""

import io
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image, PngImagePlugin

from diffquant.run import METADATA_KEY, Result
from diffquant.serve.bodies import Delivery, Format

SHELF_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded picture."""

    data: bytes
    format: Format

    @property
    def media_type(self) -> str:
        return f"image/{self.format}"


def encoded(result: Result, delivery: Delivery) -> list[Picture]:
    """Every picture of a result. A PNG holds the record that `diffquant generate` would write."""
    seeds = enumerate(result.request.seeds)
    return [
        encode(image, delivery, {**result.record, "image": index, "image_seed": seed})
        for image, (index, seed) in zip(result.images, seeds, strict=True)
    ]


def encode(
    image: Image.Image, delivery: Delivery, record: Mapping[str, Any] | None = None
) -> Picture:
    """One picture in the format that was asked for; only a PNG has room for the record."""
    stream = io.BytesIO()
    if delivery.format == "png":
        text = PngImagePlugin.PngInfo()
        if record is not None:
            text.add_itxt(METADATA_KEY, json.dumps(record, ensure_ascii=False))
        image.save(stream, "PNG", pnginfo=text)
    else:
        image.save(stream, delivery.format.upper(), quality=delivery.quality)
    return Picture(stream.getvalue(), delivery.format)


class Shelf:
    """The latest pictures by job, in memory: nothing is written, so nothing is left behind."""

    def __init__(self, most: int = SHELF_BYTES) -> None:
        self.most = most
        self._held: OrderedDict[str, list[Picture]] = OrderedDict()
        self._bytes = 0

    def put(self, job: str, pictures: list[Picture]) -> None:
        """Keep pictures, letting the oldest jobs go where there is no room."""
        self._held[job] = pictures
        self._bytes += _size(pictures)
        while self._bytes > self.most and len(self._held) > 1:
            _, gone = self._held.popitem(last=False)
            self._bytes -= _size(gone)

    def find(self, job: str, variant: int) -> Picture | None:
        held = self._held.get(job, [])
        return held[variant] if 0 <= variant < len(held) else None


def _size(pictures: list[Picture]) -> int:
    return sum(len(picture.data) for picture in pictures)
