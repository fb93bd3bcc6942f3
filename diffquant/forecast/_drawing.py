"""What is drawn, as numbers: its size in tokens and pixels, and what that takes beside weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffquant.forecast._holdings import Holding
from diffquant.sources import PipelineFolder

#: Where nobody says how large a picture is to be.
SIDE, TEXT_TOKENS = 1024, 512
#: Pixels per latent and frames per latent frame, where a VAE's config does not tell.
SPATIAL, TEMPORAL = 8, 4
#: Latents per token, along each side: every family here packs or patches two by two.
PATCH = 2
#: Measured on FLUX-shaped models and AutoencoderKL, CPU (tests/unit/test_forecast.py holds them to
#: 15 %): what a token takes in a block, in values per output of its widest linear, and what a
#: pixel takes in a decoder, in values per channel of its last but one level.
PER_OUTPUT, PER_CHANNEL = 9.0, 6.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """What one request draws.

    tokens    of the picture or video and of the prompt, as the transformer sees them
    pixels    of all that a decoder has at work at once
    channels  of the decoder where it has the most values
    """

    width: int
    height: int
    frames: int
    images: int
    tokens: int
    pixels: int
    channels: int

    def __str__(self) -> str:
        clip = f" x {self.frames} frames" if self.frames > 1 else ""
        several = f", {self.images} at once" if self.images > 1 else ""
        return f"{self.width}x{self.height}{clip}{several}"


def canvas(asked: Mapping[str, Any], pipeline: PipelineFolder) -> Canvas:
    """The request, its open values at what most models are made for.

    asked  of a request's fields those that are known: width, height, num_frames …
    """
    config = _vae_config(pipeline)
    spatial, temporal = _reductions(config)
    width, height = (int(asked.get(side) or SIDE) for side in ("width", "height"))
    frames, images = int(asked.get("num_frames") or 1), int(asked.get("num_images_per_prompt") or 1)
    cell = spatial * PATCH
    latents = 1 + (frames - 1) // temporal
    text = int(asked.get("max_sequence_length") or TEXT_TOKENS)
    tokens = images * (-(-width // cell) * -(-height // cell) * latents + text)
    return Canvas(
        width=width,
        height=height,
        frames=frames,
        images=images,
        tokens=tokens,
        # Video decoders work through one latent frame at a time.
        pixels=width * height * images * min(frames, temporal),
        channels=_channels(config),
    )


def denoising_bytes(drawn: Canvas, held: Holding, compute: int) -> int:
    """Activations of one transformer."""
    return int(PER_OUTPUT * drawn.tokens * held.widest) * compute


def decoding_bytes(drawn: Canvas, compute: int) -> int:
    """Feature maps of the VAE, and every frame it made."""
    made = 3 * drawn.width * drawn.height * drawn.images * drawn.frames * 4
    return int(PER_CHANNEL * drawn.pixels * drawn.channels) * compute + made


def _vae_config(pipeline: PipelineFolder) -> Mapping[str, Any]:
    path = pipeline.root / "vae" / "config.json"
    found: Mapping[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    return found


def _reductions(config: Mapping[str, Any]) -> tuple[int, int]:
    """Pixels per latent along each side, frames per latent frame."""
    spatial = config.get("scale_factor_spatial") or config.get("spatial_compression_ratio")
    temporal = config.get("scale_factor_temporal") or config.get("temporal_compression_ratio")
    if spatial is None and "block_out_channels" in config:
        spatial = 2 ** (len(config["block_out_channels"]) - 1)
    return int(spatial or SPATIAL), int(temporal or TEMPORAL)


def _channels(config: Mapping[str, Any]) -> int:
    """Of the level before the last, which the last one takes in at full size."""
    levels = config.get("block_out_channels")
    if levels is None and "base_dim" in config:
        levels = [config["base_dim"] * factor for factor in config.get("dim_mult", (1, 2))]
    return int(levels[min(1, len(levels) - 1)]) if levels else 256
