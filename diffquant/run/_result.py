"""What a request gave."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from diffquant.run._request import DEFAULT_FPS, Request
from diffquant.video import Film, Sound


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one request gave.

    request       as it ran, every value known
    seconds       from the call to the last pixel
    step_seconds  of each denoising step
    videos        the frames of each video, where the pipeline makes videos; there are no images then
    sounds        one for each video, of a pipeline that lets something be heard
    """

    request: Request
    images: tuple[Image.Image, ...]
    seconds: float
    step_seconds: tuple[float, ...]
    record: Mapping[str, Any] = field(default_factory=dict)
    videos: tuple[tuple[Image.Image, ...], ...] = ()
    sounds: tuple[Sound, ...] = ()

    @property
    def films(self) -> tuple[Film, ...]:
        """The videos as they are written."""
        fps = self.request.fps or DEFAULT_FPS
        heard = self.sounds or (None,) * len(self.videos)
        return tuple(
            Film(frames=frames, fps=fps, sound=sound)
            for frames, sound in zip(self.videos, heard, strict=True)
        )
