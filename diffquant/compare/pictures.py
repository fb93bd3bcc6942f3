"""Two pictures in the report: one over the other behind a slider, and their difference, amplified."""

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from math import isfinite

import torch
from PIL import Image
from torch import Tensor

from diffquant.compare.comparison import Pair
from diffquant.compare.metrics import WHITE
from diffquant.compare.verdict import FIGURES

#: Side in pixels below which a picture is shown with its pixels as squares.
SMALL = 200
#: Colours of a difference, from none to the largest, as RGB.
RAMP = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))
#: The difference of which this part of the pixels stays below is shown as the largest.
BRIGHT = 0.995
GAINS = (1, 2, 4, 8, 16, 32, 64, 128)


def article(pair: Pair, index: int, candidate: str, reference: str) -> str:
    """One prompt and seed: the slider, the difference, the figures. `index` numbers the reference's
    pictures, see `references`; the names are shown on the two halves."""
    theirs, ours = _middle(pair.reference_frames), _middle(pair.candidate_frames)
    height, width = ours.shape[-2:]
    small = " small" if min(height, width) < SMALL else ""
    prompt, seed = escape(pair.request.prompt or ""), pair.request.seeds[0]
    gain = _gain(theirs, ours)
    return (
        f'<article class="card pair{small}" style="--shape:{width}/{height}">'
        f"<h3>{prompt}<span>seed {seed}{_which(pair.candidate_frames)}</span></h3>"
        '<div class="views"><div class="view slide">'
        f'<div style="background-image:var(--picture{index})"></div>'
        f'<div class="over-it" style="background-image:{_url(ours)}"></div>'
        '<div class="knob"></div>'
        f'<span class="tag left">{escape(reference)}</span>'
        f'<span class="tag right">{escape(candidate)}</span>'
        f'<input type="range" min="0" max="100" value="50" step="0.5" '
        f'aria-label="Share of the reference shown, {prompt}"></div>'
        f'<div class="view"><div role="img" aria-label="Difference, amplified {gain} times" '
        f'style="background-image:{_url(_difference(theirs, ours, gain))}"></div>'
        f'<span class="tag right">difference × {gain}</span></div></div>'
        f'<div class="figures">{"".join(_figures(pair))}</div></article>'
    )


def references(pairs: Sequence[Pair]) -> str:
    """The reference's pictures, once each, for all candidates."""
    urls = (
        f"--picture{index}:{_url(_middle(pair.reference_frames))};"
        for index, pair in enumerate(pairs)
    )
    return f":root{{{''.join(urls)}}}"


def _figures(pair: Pair) -> Iterator[str]:
    alike = pair.likeness
    psnr = f"{alike.psnr_db:.1f} dB" if isfinite(alike.psnr_db) else "identical"
    named = [
        ("PSNR", psnr),
        ("SSIM", f"{alike.ssim:.4f}"),
        ("MS-SSIM", None if alike.ms_ssim is None else f"{alike.ms_ssim:.4f}"),
        ("MAE", f"{alike.mae:.2f}/255"),
        ("flicker", None if alike.flicker is None else f"{alike.flicker:.2f}/255"),
        ("worst frame", f"{min(alike.frames):.1f} dB" if alike.frames else None),
        *((FIGURES[name].title, FIGURES[name].shown(said)) for name, said in pair.learned.items()),
    ]
    for name, value in named:
        if value is not None:
            yield f"<span>{name} <b>{value}</b></span>"
    for flaw in (*(f"reference: {flaw}" for flaw in pair.reference_flaws), *pair.flaws):
        yield f'<span class="bad">{escape(flaw)}</span>'


def _middle(frames: Tensor) -> Tensor:
    return frames[len(frames) // 2]


def _which(frames: Tensor) -> str:
    """The frame that is shown, where there are several."""
    count = len(frames)
    return f" · frame {count // 2 + 1} of {count}" if count > 1 else ""


def _gain(reference: Tensor, ours: Tensor) -> int:
    """The largest power of two at which almost every difference still has room."""
    gap = (reference.float() - ours.float()).abs().mean(0).flatten()
    bright = float(gap.sort().values[int(BRIGHT * (gap.numel() - 1))])
    return next((gain for gain in reversed(GAINS) if bright * gain <= WHITE), 1)


def _difference(reference: Tensor, ours: Tensor, gain: int) -> Tensor:
    """Mean absolute difference over the channels, amplified, in colour: uint8 [3, H, W]."""
    gap = (reference.float() - ours.float()).abs().mean(0) * gain / WHITE
    ramp = torch.tensor(RAMP, dtype=torch.float32)
    place = gap.clamp(0, 1) * (len(RAMP) - 1)
    below = place.long().clamp(max=len(RAMP) - 2)
    part = (place - below).unsqueeze(-1)
    mixed = ramp[below] * (1 - part) + ramp[below + 1] * part
    return mixed.round().to(torch.uint8).permute(2, 0, 1)


def _url(picture: Tensor) -> str:
    """uint8 [3, H, W] as a CSS url that holds the picture itself."""
    stream = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(
        stream, "PNG", optimize=True
    )
    return f"url(data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()})"
