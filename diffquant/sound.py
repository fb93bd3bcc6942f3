"""What a pipeline lets be heard beside its frames -> the sound of each video."""

from typing import TYPE_CHECKING, Any

from diffquant.errors import RunError
from diffquant.video import CHANNELS, Sound

if TYPE_CHECKING:
    from torch import Tensor


def sounds(pipeline: Any, drawn: Any) -> tuple[Sound, ...]:
    """One for each video, in the order of the frames; empty where nothing is heard.

    drawn   what the pipeline's call gave: its `audio` is [B, channels, S] or [B, S]

    Raises RunError for a pipeline that does not say how fast samples follow each other, or that has
    more channels than a video is written with.
    """
    waves: Tensor | None = getattr(drawn, "audio", None)
    if waves is None:
        return ()
    if waves.dim() == 2:
        waves = waves.unsqueeze(1)
    if waves.shape[1] not in CHANNELS:
        raise RunError(f"the sound has {waves.shape[1]} channels, one or two were needed")
    rate = sample_rate(pipeline)
    return tuple(Sound(samples=wave.numpy(), rate=rate) for wave in waves.float().cpu())


def sample_rate(pipeline: Any) -> int:
    """Samples per second: what the vocoder's config says it gives, else what the pipeline itself
    says."""
    vocoder = getattr(getattr(pipeline, "vocoder", None), "config", None)
    told = getattr(vocoder, "output_sampling_rate", None)
    rate = told or getattr(pipeline, "audio_sample_rate", None)
    if not rate:
        raise RunError(f"{type(pipeline).__name__} does not tell the sample rate of its sound")
    return int(rate)
