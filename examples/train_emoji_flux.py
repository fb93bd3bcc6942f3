"""Train the bundled emoji model: a small, real FLUX pipeline that draws emoji from their names.

    python examples/train_emoji_flux.py --output DIR             about 50 minutes on two cores
    python examples/train_emoji_flux.py --output DIR --resume    go on after an interruption
    python examples/train_emoji_flux.py --evaluate DIR           the share recognised
    python examples/train_emoji_flux.py --output DIR --smoke     the whole path, tiny, in seconds

The glyphs come from the Noto Color Emoji font (Debian `fonts-noto-color-emoji`, SIL OFL 1.1); their
captions from the Unicode character names and from the `emoji` package. Everything is trained from
scratch: first the autoencoder, then the transformer together with both text encoders.

B glyphs in a batch, V captions of one glyph, T text tokens, L packed latent tokens of C channels.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import emoji
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import disable_progress_bars as huggingface_progress_bars_off
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.utils import logging as transformers_logging

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_STRIKE = 109  # the only bitmap size in the font, in pixels per em
PICTURE_SIZE = 64  # pixels
TEXT_TOKENS = 16
LATENT_CHANNELS = 8

# The settings this model is meant to be sampled with; the bundled preset carries the same numbers.
SAMPLING: dict[str, Any] = {
    "height": PICTURE_SIZE,
    "width": PICTURE_SIZE,
    "num_inference_steps": 12,
    "max_sequence_length": TEXT_TOKENS,
}
EVERYDAY_PROMPTS = (
    "red apple", "fire", "crown", "airplane", "hamburger", "octopus", "rainbow", "soccer ball",
    "slice of pizza", "cat face", "dog face", "rocket", "tree", "cactus", "house", "car",
    "key", "umbrella", "guitar", "snowman", "bee", "ghost", "robot face", "birthday cake",
)  # fmt: skip

console = Console(stderr=True, highlight=False, soft_wrap=True)


# ---------------------------------------------------------------------------------------- glyphs


@dataclass(frozen=True, slots=True, kw_only=True)
class Glyph:
    """One emoji: a single codepoint and the wordings that shall draw it, all normalised."""

    codepoint: int
    name: str
    aliases: tuple[str, ...]


# Signs rather than things: arrows, buttons, letters, clock faces, zodiac, blank shapes, skin tones,
# moon phases, "no ..." signs. Many differ in a detail that 64 pixels do not show.
SIGNS = (
    (0x0000, 0x2319), (0x23CF, 0x23EF), (0x23F8, 0x25FF), (0x2611, 0x2611), (0x2622, 0x2638),
    (0x2640, 0x2653), (0x2668, 0x267F), (0x2695, 0x2695), (0x269B, 0x269C), (0x26A7, 0x26AB),
    (0x26CE, 0x26CE), (0x2705, 0x2705), (0x2714, 0x2721), (0x2733, 0x2734), (0x2747, 0x274E),
    (0x2754, 0x2755), (0x2795, 0x2B1C), (0x2B55, 0x2B55), (0x3030, 0x3299),
    (0x1F170, 0x1F251), (0x1F311, 0x1F314), (0x1F316, 0x1F318), (0x1F3A6, 0x1F3A6),
    (0x1F3E7, 0x1F3E7), (0x1F3FB, 0x1F3FF), (0x1F49F, 0x1F4A0), (0x1F4B1, 0x1F4B2),
    (0x1F4B4, 0x1F4B4), (0x1F4B6, 0x1F4B7), (0x1F4B9, 0x1F4B9), (0x1F4DB, 0x1F4DB),
    (0x1F4EA, 0x1F4EA), (0x1F4EC, 0x1F4ED), (0x1F4F2, 0x1F4F6), (0x1F500, 0x1F506),
    (0x1F508, 0x1F509), (0x1F515, 0x1F515), (0x1F518, 0x1F524), (0x1F52F, 0x1F549),
    (0x1F54E, 0x1F567), (0x1F595, 0x1F595), (0x1F6AB, 0x1F6AB), (0x1F6AD, 0x1F6B1),
    (0x1F6B3, 0x1F6B3), (0x1F6B7, 0x1F6BC), (0x1F6BE, 0x1F6BE), (0x1F6C2, 0x1F6C5),
    (0x1F6D0, 0x1F6D0), (0x1F6D7, 0x1F6D7), (0x1F7E0, 0x1F7F0), (0x1F9B0, 0x1F9B3),
)  # fmt: skip
# People told apart by a gesture, a dress or a machine part, and trains told apart by their front.
VARIATIONS = (
    (0x1F46A, 0x1F46D), (0x1F46F, 0x1F473), (0x1F481, 0x1F482), (0x1F486, 0x1F487),
    (0x1F48F, 0x1F48F), (0x1F491, 0x1F491), (0x1F574, 0x1F574), (0x1F590, 0x1F590),
    (0x1F5C2, 0x1F5C4), (0x1F5D2, 0x1F5D3), (0x1F645, 0x1F647), (0x1F64B, 0x1F64E),
    (0x1F687, 0x1F68B), (0x1F68D, 0x1F68E), (0x1F694, 0x1F694), (0x1F696, 0x1F696),
    (0x1F698, 0x1F698), (0x1F69D, 0x1F6A0), (0x1F6CC, 0x1F6CC), (0x1F935, 0x1F939),
    (0x1F93C, 0x1F93E), (0x1F9AE, 0x1F9AF), (0x1F9B8, 0x1F9B9), (0x1F9BB, 0x1F9BF),
    (0x1F9CC, 0x1F9CF), (0x1F9D1, 0x1F9D7), (0x1FAC2, 0x1FAC5), (0x1FAF0, 0x1FAF5),
)  # fmt: skip
LAST_EMOJI = 0x1FAFF

# Two glyphs nearer than this (root mean square Lab distance of their pixels) look the same at 64
# pixels; the one that Unicode adopted first stays.
NEAR_DUPLICATE = 12.0
MOST_GLYPHS = 860

EVERYDAY_WORDS = {
    "tree": 0x1F333, "flower": 0x1F33C, "earth": 0x1F30D, "world": 0x1F30D, "moon": 0x1F315,
    "plane": 0x2708, "burger": 0x1F354, "bread loaf": 0x1F35E, "donut": 0x1F369, "phone": 0x1F4F1,
    "wine": 0x1F377, "clock": 0x23F0, "light": 0x1F4A1, "happy face": 0x1F600, "heart": 0x2764,
    "money": 0x1F4B0, "ball": 0x26BD, "spaceship": 0x1F680, "ufo": 0x1F6F8, "boat": 0x26F5,
    "diamond": 0x1F48E, "ice cream cone": 0x1F366, "dinosaur": 0x1F996, "smile": 0x1F60A,
}  # fmt: skip


def everyday_glyphs(font_path: Path = FONT) -> list[Glyph]:
    """The glyphs this model learns, by codepoint. The font decides what can be drawn at all."""
    font = open_font(font_path)
    codepoints = [c for c in range(LAST_EMOJI + 1) if is_a_thing(c)]
    pictures = {c: picture for c in codepoints if (picture := render(c, font)) is not None}
    kept = without_near_duplicates(pictures)
    return with_unambiguous_aliases(kept)


def is_a_thing(codepoint: int) -> bool:
    if any(first <= codepoint <= last for first, last in SIGNS + VARIATIONS):
        return False
    return unicodedata.name(chr(codepoint), "") != "" and emoji_entry(codepoint) is not None


def emoji_entry(codepoint: int) -> dict[str, Any] | None:
    """What the `emoji` package knows of it; older symbols are listed with a variation selector."""
    data = emoji.EMOJI_DATA
    return data.get(chr(codepoint)) or data.get(chr(codepoint) + "\ufe0f")


def open_font(path: Path) -> ImageFont.FreeTypeFont:
    # The Raqm layout engine refuses bitmap-only fonts.
    return ImageFont.truetype(str(path), FONT_STRIKE, layout_engine=ImageFont.Layout.BASIC)


def render(codepoint: int, font: ImageFont.FreeTypeFont) -> np.ndarray | None:
    """(64, 64, 3) uint8 on white, or None where the font draws nothing."""
    left, top, right, bottom = font.getbbox(chr(codepoint))
    side = int(max(right - left, bottom - top))
    if side <= 0:
        return None
    square = Image.new("RGB", (side, side), "white")
    origin = ((side - right - left) / 2, (side - bottom - top) / 2)
    ImageDraw.Draw(square).text(origin, chr(codepoint), font=font, embedded_color=True)
    small = square.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)
    picture = np.asarray(small)
    return None if picture.min() > 250 else picture


def render_all(glyphs: Sequence[Glyph], font_path: Path = FONT) -> np.ndarray:
    """(number of glyphs, 64, 64, 3) uint8."""
    font = open_font(font_path)
    pictures = [render(glyph.codepoint, font) for glyph in glyphs]
    assert all(picture is not None for picture in pictures), "a glyph vanished from the font"
    return np.stack([picture for picture in pictures if picture is not None])


def without_near_duplicates(pictures: dict[int, np.ndarray]) -> list[int]:
    """Codepoints, ascending: the oldest emoji that differ, as many as are wanted."""
    by_age = sorted(pictures, key=lambda c: ((emoji_entry(c) or {})["E"], c))
    lab = torch.from_numpy(to_lab(np.stack([pictures[c] for c in by_age]))).flatten(1)
    distances = torch.cdist(lab, lab) / PICTURE_SIZE
    kept: list[int] = []
    for index in range(len(by_age)):
        if len(kept) < MOST_GLYPHS and (distances[index, kept] > NEAR_DUPLICATE).all():
            kept.append(index)
    return sorted(by_age[index] for index in kept)


def with_unambiguous_aliases(codepoints: Sequence[int]) -> list[Glyph]:
    """Every wording names one glyph: names win over aliases, earlier codepoints over later ones."""
    names: dict[str, int] = {}
    for codepoint in codepoints:
        names.setdefault(name_of(codepoint), codepoint)
    aliases: dict[str, int] = {w: c for w, c in EVERYDAY_WORDS.items() if w not in names}
    for codepoint in codepoints:
        for alias in known_aliases(codepoint):
            if alias not in names:
                aliases.setdefault(alias, codepoint)
    return [
        Glyph(
            codepoint=codepoint,
            name=name,
            aliases=tuple(alias for alias, owner in aliases.items() if owner == codepoint),
        )
        for name, codepoint in sorted(names.items(), key=lambda item: item[1])
    ]


def name_of(codepoint: int) -> str:
    """The Unicode name, unless it says a colour that the picture does not have.

    In old symbols "black" and "white" mean filled and outlined: the red heart is HEAVY BLACK HEART.
    """
    formal = normalise(unicodedata.name(chr(codepoint)))
    short = normalise(cldr_name(codepoint))
    misleading = {"black", "white", "heavy"} & (set(formal.split()) - set(short.split()))
    return short if misleading else formal


def cldr_name(codepoint: int) -> str:
    return str((emoji_entry(codepoint) or {})["en"]).strip(":").replace("_", " ")


def known_aliases(codepoint: int) -> list[str]:
    """Everyday wordings beside the name, such as "pizza" for SLICE OF PIZZA."""
    listed = (emoji_entry(codepoint) or {}).get("alias", [])
    wordings = [cldr_name(codepoint), *(alias.strip(":").replace("_", " ") for alias in listed)]
    return [w for w in dict.fromkeys(map(normalise, wordings)) if is_a_wording(w)]


def is_a_wording(alias: str) -> bool:
    """Not "v", "100", "cow2" and the like, which name a keyboard shortcut rather than a picture."""
    return len(alias) > 2 and not any(c.isdigit() for c in alias) and alias != "shit"


# ------------------------------------------------------------------------------------- wordings


def wording_normalizer() -> normalizers.Normalizer:
    """Turns "The red Apple!" into "red apple". Stored in both tokenizers: prompts need no care."""
    return normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"['’]"), ""),
            normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " "),
            normalizers.Replace(Regex(r"\b(?:a|an|the)\b"), " "),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )


def normalise(wording: str) -> str:
    return str(wording_normalizer().normalize_str(wording))


def caption_table(glyphs: Sequence[Glyph]) -> list[dict[str, float]]:
    """For each glyph its captions and how often each is shown; every row sums to 1."""
    taken = {w for glyph in glyphs for w in (glyph.name, *glyph.aliases)}
    claims = Counter(w for glyph in glyphs for w in set(shortened(glyph.name)))
    rows = []
    for glyph in glyphs:
        row: Counter[str] = Counter({"": 0.10})  # the empty caption is what guidance needs
        # A shortened wording that would fit two glyphs teaches their average: leave it out.
        drops = [w for w in shortened(glyph.name) if w not in taken and claims[w] == 1]
        templates = [form.format(glyph.name) for form in TEMPLATES]
        for wordings, share in ((glyph.aliases, 0.25), (drops, 0.10), (templates, 0.10)):
            for wording in wordings:
                row[wording] += share / len(wordings)
        row[glyph.name] += 1.0 - sum(row.values())
        rows.append(dict(row))
    return rows


TEMPLATES = ("a {}", "the {}", "a picture of a {}", "a drawing of a {}", "{} emoji")


def shortened(name: str) -> list[str]:
    """The name with one word dropped, each in turn."""
    words = name.split()
    drops = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
    return [w for w in dict.fromkeys(drops) if len(w) > 2]


def byte_pair_tokenizer(
    captions: Iterable[str], vocabulary: int, start: str | None, end: str, pad: str
) -> PreTrainedTokenizerFast:
    """A byte-level BPE, so that no text is unknown to it.

    Neither a `CLIPTokenizer` nor a `T5Tokenizer`: those put their own normalizer back on loading.
    """
    special = list(dict.fromkeys(token for token in (start, end, pad) if token))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = wording_normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}" if start else f"$A {end}",
        special_tokens=[(token, index) for index, token in enumerate(special)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=end,
        pad_token=pad,
        unk_token=end,
        model_max_length=TEXT_TOKENS,
    )


# --------------------------------------------------------------------------------------- models


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Widths and depths of the four networks."""

    vae_channels: tuple[int, int, int]
    vae_norm_groups: int
    text_width: int
    vocabulary: int
    heads: int
    rope_axes: tuple[int, int, int]  # sums to the width of one head
    single_blocks: int
    vae_batch: int
    batch: int


FULL = Sizes(
    vae_channels=(32, 64, 64),
    vae_norm_groups=8,
    text_width=128,
    vocabulary=1900,
    heads=2,
    rope_axes=(16, 56, 56),
    single_blocks=2,
    vae_batch=16,
    batch=64,
)
TINY = Sizes(
    vae_channels=(8, 16, 16),
    vae_norm_groups=4,
    text_width=32,
    vocabulary=400,
    heads=1,
    rope_axes=(8, 12, 12),
    single_blocks=1,
    vae_batch=4,
    batch=8,
)


def new_pipeline(glyphs: Sequence[Glyph], sizes: Sizes) -> FluxPipeline:
    """Untrained, float32."""
    captions = [caption for row in caption_table(glyphs) for caption in row if caption]
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = byte_pair_tokenizer(captions, sizes.vocabulary, start, end, pad=end)
    tokenizer_2 = byte_pair_tokenizer(captions, sizes.vocabulary, None, "</s>", pad="<pad>")
    return FluxPipeline(
        # shift=1 because training draws sigma itself; dynamic shifting is for large pictures
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=new_autoencoder(sizes),
        text_encoder=new_clip(tokenizer, sizes.text_width),
        tokenizer=tokenizer,
        text_encoder_2=new_t5(tokenizer_2, sizes.text_width),
        tokenizer_2=tokenizer_2,
        transformer=new_transformer(sizes),
    )


def new_autoencoder(sizes: Sizes) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=sizes.vae_channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=sizes.vae_norm_groups,
        sample_size=PICTURE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def new_clip(tokenizer: PreTrainedTokenizerFast, width: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        # must be the tokenizer's; 2 would switch on a legacy way to find the pooled token
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_t5(tokenizer: PreTrainedTokenizerFast, width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def new_transformer(sizes: Sizes) -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=sizes.single_blocks,
        attention_head_dim=sum(sizes.rope_axes),
        num_attention_heads=sizes.heads,
        joint_attention_dim=sizes.text_width,
        pooled_projection_dim=sizes.text_width,
        guidance_embeds=False,
        axes_dims_rope=sizes.rope_axes,
    )
    # Every block starts as the identity and the output at zero, as in the DiT paper.
    for name, parameter in transformer.named_parameters():
        if "norm" in name and ".linear." in name or name.startswith("proj_out."):
            torch.nn.init.zeros_(parameter)
    return transformer


# -------------------------------------------------------------------------------------- training


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stretch of training, bounded by wall-clock seconds."""

    name: str
    seconds: float
    adam_rate: float
    muon_rate: float = 0.0  # 0: everything by AdamW
    sigma_offset: float = 0.0  # noise levels are sigmoid(1.2 * normal + offset)
    flat: float = 0.0  # the share of the stage at the full rate; a cosine to zero follows

    def rate_factor(self, progress: float, step: int) -> float:
        warm = min(1.0, (step + 1) / 30)
        if progress <= self.flat:
            return warm
        decayed = (progress - self.flat) / (1.0 - self.flat)
        return warm * (0.005 + 0.995 * 0.5 * (1.0 + math.cos(math.pi * min(decayed, 1.0))))


@dataclass(kw_only=True)
class Progress:
    """Where training stands; the seconds survive an interruption, so the schedule ends on time."""

    stage: str
    seconds: float = 0.0
    step: int = 0


class Journal:
    """One file holds all that a killed run needs to go on; it is replaced in one move."""

    def __init__(self, path: Path, every_seconds: float = 120.0) -> None:
        self.path = path
        self.every_seconds = every_seconds
        self.saved_at = time.monotonic()

    def load(self) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(self.path, weights_only=True)
        return state

    def due(self) -> bool:
        return time.monotonic() - self.saved_at > self.every_seconds

    def save(self, state: dict[str, Any]) -> None:
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)
        self.saved_at = time.monotonic()


def run_stage(
    stage: Stage,
    progress: Progress,
    step: Callable[[float], float],
    save: Callable[[], None],
    journal: Journal,
) -> None:
    """Call `step(rate factor) -> loss` until the stage's seconds are spent."""
    losses: list[float] = []
    before = time.monotonic()
    while progress.seconds < stage.seconds:
        factor = stage.rate_factor(progress.seconds / stage.seconds, progress.step)
        losses.append(step(factor))
        now = time.monotonic()
        progress.seconds += now - before
        before = now
        progress.step += 1
        if progress.step % 50 == 0:
            report(stage, progress, losses)
            losses.clear()
        if journal.due():
            save()
    save()


def report(stage: Stage, progress: Progress, losses: Sequence[float]) -> None:
    console.print(
        f"{stage.name:<12} {progress.seconds:6.0f} of {stage.seconds:.0f} s  step {progress.step}"
        f"  {progress.seconds / progress.step:.3f} s a step  loss {np.mean(losses):.4f}"
    )


def train_autoencoder(
    vae: AutoencoderKL,
    pictures: Tensor,
    stage: Stage,
    batch: int,
    journal: Journal,
    resumed: dict[str, Any] | None,
) -> None:
    """Train in place. pictures: (number, 3, 64, 64) in [-1, 1]."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=stage.adam_rate, betas=(0.9, 0.98))
    progress = Progress(stage=stage.name)
    if resumed:
        vae.load_state_dict(resumed["vae"])
        optimizer.load_state_dict(resumed["optimizer"])
        progress = Progress(**resumed["progress"])

    def step(factor: float) -> float:
        optimizer.param_groups[0]["lr"] = stage.adam_rate * factor
        chosen = pictures[torch.randint(len(pictures), (batch,))]
        flipped = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, chosen.flip(-1), chosen)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(flipped).latent_dist
            drawn = vae.decode(posterior.sample()).sample
        loss = autoencoder_loss(drawn.float(), flipped, posterior)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    def save() -> None:
        state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
        journal.save({**state, "progress": asdict(progress)})

    vae.train()
    run_stage(stage, progress, step, save, journal)
    vae.eval()


def autoencoder_loss(drawn: Tensor, wanted: Tensor, posterior: Any) -> Tensor:
    """L1 for sharp edges, L2 for flat colour, a breath of KL so that the latents stay bounded."""
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    return F.l1_loss(drawn, wanted) + 2.0 * F.mse_loss(drawn, wanted) + 5e-4 * kl


@torch.no_grad()
def latents_of(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """(number, L, C), packed as FluxPipeline does. Puts their scale and shift in the config."""
    chunks = [vae.encode(chunk).latent_dist.mode() for chunk in pictures.split(32)]
    latents = torch.cat(chunks)
    shift, scale = latents.mean().item(), 1.0 / latents.std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    number, channels, height, width = latents.shape
    normal = (latents - shift) * scale
    return FluxPipeline._pack_latents(normal, number, channels, height, width)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """dB, peak 255, over all pictures together."""
    errors = []
    for chunk in pictures.split(32):
        drawn = vae.decode(vae.encode(chunk).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append((drawn - chunk).square().mean(dim=(1, 2, 3)))
    return 10.0 * math.log10(4.0 / torch.cat(errors).mean().item())


class MasterWeights:
    """float32 masters of bfloat16 networks, and their running mean, which is what gets shipped.

    bfloat16 keeps 8 bits: a step at the end of the cosine would round away without the masters.
    """

    def __init__(self, networks: torch.nn.ModuleDict) -> None:
        self.names = [name for name, _ in networks.named_parameters()]
        self.masters = [p.detach().clone().float() for p in networks.parameters()]
        self.means = [m.clone() for m in self.masters]
        networks.to(torch.bfloat16)
        self.weights = list(networks.parameters())

    def take_gradients(self) -> None:
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)

    @torch.no_grad()
    def publish(self, decay: float) -> None:
        """Copy the masters to the networks and into the running mean."""
        torch._foreach_copy_(self.weights, self.masters)
        torch._foreach_lerp_(self.means, self.masters, 1.0 - decay)

    def state(self) -> dict[str, list[Tensor]]:
        return {"masters": self.masters, "means": self.means}

    @torch.no_grad()
    def load(self, state: dict[str, list[Tensor]]) -> None:
        torch._foreach_copy_(self.masters, state["masters"])
        torch._foreach_copy_(self.means, state["means"])
        torch._foreach_copy_(self.weights, self.masters)


def optimizers_for(weights: MasterWeights, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks and encoders, AdamW for the embeddings and the rest."""
    matrices, others = [], []
    for name, master in zip(weights.names, weights.masters, strict=True):
        inside = "blocks." in name or "layers." in name or ".block." in name
        is_matrix = master.ndim == 2 and inside and "relative_attention_bias" not in name
        (matrices if is_matrix and stage.muon_rate else others).append(master)
    chosen: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=stage.adam_rate, betas=(0.9, 0.98), weight_decay=0.01)
    ]
    if matrices:
        muon = torch.optim.Muon(matrices, lr=stage.muon_rate, adjust_lr_fn="match_rms_adamw")
        chosen.append(muon)
    for optimizer in chosen:
        for group in optimizer.param_groups:
            group["full_rate"] = group["lr"]
    return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Captions:
    """Every caption of every glyph, tokenized once: (glyphs, V, T) ids and (glyphs, V) shares."""

    clip_ids: Tensor
    t5_ids: Tensor
    shares: Tensor

    def draw(self, glyphs: Tensor) -> tuple[Tensor, Tensor]:
        """One caption for each glyph of a batch: CLIP ids (B, T), T5 ids (B, T)."""
        variants = torch.multinomial(self.shares[glyphs], 1).squeeze(1)
        return self.clip_ids[glyphs, variants], self.t5_ids[glyphs, variants]


def tokenize_captions(pipeline: FluxPipeline, glyphs: Sequence[Glyph]) -> Captions:
    rows = caption_table(glyphs)
    most = max(len(row) for row in rows)
    texts = [caption for row in rows for caption in [*row, *[""] * (most - len(row))]]
    shares = [[*row.values(), *[0.0] * (most - len(row))] for row in rows]

    def ids(tokenizer: PreTrainedTokenizerFast) -> Tensor:
        encoded = tokenizer(
            texts,
            padding="max_length",
            max_length=TEXT_TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        tokens: Tensor = encoded.input_ids
        return tokens.view(len(rows), most, TEXT_TOKENS)

    return Captions(
        clip_ids=ids(pipeline.tokenizer),
        t5_ids=ids(pipeline.tokenizer_2),
        shares=torch.tensor(shares),
    )


def train_transformer(
    pipeline: FluxPipeline,
    glyphs: Sequence[Glyph],
    latents: Tensor,
    stages: Sequence[Stage],
    batch: int,
    journal: Journal,
    resumed: dict[str, Any] | None,
    on_stage_end: Callable[[], None],
) -> None:
    """Flow matching: the transformer learns noise - latent. Both text encoders learn with it.

    latents: (number of glyphs, L, C). The pipeline is left with the running mean of the weights.
    """
    networks = torch.nn.ModuleDict(
        {
            "transformer": pipeline.transformer,
            "clip": pipeline.text_encoder,
            "t5": pipeline.text_encoder_2,
        }
    ).train()
    weights = MasterWeights(networks)
    captions = tokenize_captions(pipeline, glyphs)
    if resumed:
        weights.load(resumed["weights"])
    for stage in stages_left(stages, resumed):
        optimizers = optimizers_for(weights, stage)
        progress = Progress(stage=stage.name)
        if resumed and resumed["progress"]["stage"] == stage.name:
            progress = Progress(**resumed["progress"])
            for optimizer, state in zip(optimizers, resumed["optimizers"], strict=True):
                optimizer.load_state_dict(state)

        step = transformer_step(networks, weights, captions, latents, optimizers, stage, batch)
        save = transformer_save(journal, pipeline.vae, weights, optimizers, progress)
        run_stage(stage, progress, step, save, journal)
        ship_means(pipeline, networks, weights)
        on_stage_end()
        with torch.no_grad():
            torch._foreach_copy_(weights.weights, weights.masters)
    ship_means(pipeline, networks, weights)


def stages_left(stages: Sequence[Stage], resumed: dict[str, Any] | None) -> Sequence[Stage]:
    names = [stage.name for stage in stages]
    if not resumed or resumed["progress"]["stage"] not in names:
        return stages
    return stages[names.index(resumed["progress"]["stage"]) :]


def transformer_step(
    networks: torch.nn.ModuleDict,
    weights: MasterWeights,
    captions: Captions,
    latents: Tensor,
    optimizers: Sequence[torch.optim.Optimizer],
    stage: Stage,
    batch: int,
) -> Callable[[float], float]:
    queue = torch.empty(0, dtype=torch.long)

    def step(factor: float) -> float:
        nonlocal queue
        while len(queue) < batch:  # whole passes: every glyph is shown equally often
            queue = torch.cat([queue, torch.randperm(len(latents))])
        glyphs, queue = queue[:batch], queue[batch:]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_rate"] * factor
        loss = flow_loss(networks, latents[glyphs], *captions.draw(glyphs), stage.sigma_offset)
        loss.backward()
        weights.take_gradients()
        for optimizer in optimizers:
            optimizer.step()
        weights.publish(decay=0.998)
        return loss.item()

    return step


def flow_loss(
    networks: torch.nn.ModuleDict,
    clean_BLC: Tensor,
    clip_ids_BT: Tensor,
    t5_ids_BT: Tensor,
    sigma_offset: float,
) -> Tensor:
    batch, tokens, _ = clean_BLC.shape
    side = math.isqrt(tokens)
    noise_BLC = torch.randn_like(clean_BLC)
    # The pipeline hands sigma over in bfloat16: train on the values it will see.
    sigma_B = torch.sigmoid(1.2 * torch.randn(batch) + sigma_offset).bfloat16()
    mix_B11 = sigma_B.float().view(-1, 1, 1)
    noisy_BLC = (1.0 - mix_B11) * clean_BLC + mix_B11 * noise_BLC
    velocity_BLC = networks["transformer"](
        hidden_states=noisy_BLC.bfloat16(),
        encoder_hidden_states=networks["t5"](t5_ids_BT).last_hidden_state,
        pooled_projections=networks["clip"](clip_ids_BT).pooler_output,
        timestep=sigma_B,
        img_ids=FluxPipeline._prepare_latent_image_ids(
            batch, side, side, torch.device("cpu"), torch.bfloat16
        ),
        txt_ids=torch.zeros(t5_ids_BT.shape[1], 3, dtype=torch.bfloat16),
        return_dict=False,
    )[0]
    return F.mse_loss(velocity_BLC.float(), noise_BLC - clean_BLC)


def transformer_save(
    journal: Journal,
    vae: AutoencoderKL,
    weights: MasterWeights,
    optimizers: Sequence[torch.optim.Optimizer],
    progress: Progress,
) -> Callable[[], None]:
    def save() -> None:
        journal.save(
            {
                "vae": vae.state_dict(),
                "weights": weights.state(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "progress": asdict(progress),
            }
        )

    return save


@torch.no_grad()
def ship_means(
    pipeline: FluxPipeline, networks: torch.nn.ModuleDict, weights: MasterWeights
) -> None:
    torch._foreach_copy_(weights.weights, weights.means)
    pipeline.to(torch.bfloat16)


# ---------------------------------------------------------------------------------------- folder


def save_folder(pipeline: FluxPipeline, glyphs: Sequence[Glyph], folder: Path) -> None:
    """Write what `FluxPipeline.from_pretrained` reads, with the glyphs, a card and the licence."""
    pipeline.save_pretrained(folder)
    restore_clip_prefix(folder / "text_encoder" / "model.safetensors")
    name_tokenizers_for_every_release(folder)
    load_encoders_in_float32_unless_told(folder)
    listed = [
        {"codepoint": f"{g.codepoint:X}", "name": g.name, "aliases": list(g.aliases)}
        for g in glyphs
    ]
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in listed)
    (folder / "glyphs.json").write_text(f"[\n{rows}\n]\n")
    (folder / "README.md").write_text(MODEL_CARD.format(count=len(glyphs), **SAMPLING))
    (folder / "LICENSE").write_text(LICENSE_NOTE)


def restore_clip_prefix(path: Path) -> None:
    """transformers 5 drops `text_model.` on disk; transformers 4 needs it and 5 reads both."""
    tensors = load_file(path)
    named = {
        name if name.startswith("text_model.") else f"text_model.{name}": tensor
        for name, tensor in tensors.items()
    }
    save_file(named, path, metadata={"format": "pt"})


def name_tokenizers_for_every_release(folder: Path) -> None:
    """transformers 5 writes `TokenizersBackend`, a class that release 4 does not have."""
    index_path = folder / "model_index.json"
    index = json.loads(index_path.read_text())
    for component in ("tokenizer", "tokenizer_2"):
        index[component] = ["transformers", "PreTrainedTokenizerFast"]
        config_path = folder / component / "tokenizer_config.json"
        config = json.loads(config_path.read_text())
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config_path.write_text(json.dumps(config, indent=2) + "\n")
    index_path.write_text(json.dumps(index, indent=2) + "\n")


def load_encoders_in_float32_unless_told(folder: Path) -> None:
    """Without `dtype=`, diffusers loads in float32 but transformers 5 in what its config names.

    Named bfloat16, the encoders would not match the transformer of a plain `from_pretrained`.
    """
    for component in ("text_encoder", "text_encoder_2"):
        path = folder / component / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")


def read_glyphs(folder: Path) -> list[Glyph]:
    return [
        Glyph(codepoint=int(row["codepoint"], 16), name=row["name"], aliases=tuple(row["aliases"]))
        for row in json.loads((folder / "glyphs.json").read_text())
    ]


MODEL_CARD = """---
license: ofl-1.1
library_name: diffusers
pipeline_tag: text-to-image
---
# Emoji FLUX

A FLUX pipeline of 14 MB that draws {count} emoji at 64x64 from their names, on a CPU, in a
second.
All parts are the real classes of `diffusers` and `transformers`; all weights were trained from
scratch by `examples/train_emoji_flux.py` of diffquant, in under an hour on two CPU cores.

```python
import torch
from diffusers import FluxPipeline

pipeline = FluxPipeline.from_pretrained(FOLDER, dtype=torch.bfloat16)
pipeline(
    "a red apple",
    height={height},
    width={width},
    num_inference_steps={num_inference_steps},
    max_sequence_length={max_sequence_length},
).images[0]
```

These arguments are needed: the pipeline's own defaults (1024 pixels, 512 text tokens) ruin the
picture. `guidance_scale` does nothing, the model has no guidance embedding.

`glyphs.json` lists what it was trained on. Capitals, punctuation and articles do not matter: the
tokenizers drop them. It knows nothing but these emoji: "blue apple" is not one of them.

Data: bitmaps of Noto Color Emoji (Copyright 2013-2024 Google LLC, SIL Open Font License 1.1),
captions from the Unicode character names and the `emoji` Python package. See LICENSE.
"""

LICENSE_NOTE = """The weights in this folder were trained on bitmaps of the font
Noto Color Emoji and reproduce its glyphs approximately.

Copyright 2013-2024 Google LLC (Noto Color Emoji, https://github.com/googlefonts/noto-emoji)

The font is licensed under the SIL Open Font License, Version 1.1, available with a FAQ at
https://openfontlicense.org. The text follows. As far as these weights are a derivative of the font,
they are distributed under the same licence.

-----------------------------------------------------------
SIL OPEN FONT LICENSE Version 1.1 - 26 February 2007
-----------------------------------------------------------

PREAMBLE
The goals of the Open Font License (OFL) are to stimulate worldwide
development of collaborative font projects, to support the font creation
efforts of academic and linguistic communities, and to provide a free and
open framework in which fonts may be shared and improved in partnership
with others.

The OFL allows the licensed fonts to be used, studied, modified and
redistributed freely as long as they are not sold by themselves. The
fonts, including any derivative works, can be bundled, embedded,
redistributed and/or sold with any software provided that any reserved
names are not used by derivative works. The fonts and derivatives,
however, cannot be released under any other type of license. The
requirement for fonts to remain under this license does not apply
to any document created using the fonts or their derivatives.

DEFINITIONS
"Font Software" refers to the set of files released by the Copyright
Holder(s) under this license and clearly marked as such. This may
include source files, build scripts and documentation.

"Reserved Font Name" refers to any names specified as such after the
copyright statement(s).

"Original Version" refers to the collection of Font Software components as
distributed by the Copyright Holder(s).

"Modified Version" refers to any derivative made by adding to, deleting,
or substituting -- in part or in whole -- any of the components of the
Original Version, by changing formats or by porting the Font Software to a
new environment.

"Author" refers to any designer, engineer, programmer, technical
writer or other person who contributed to the Font Software.

PERMISSION & CONDITIONS
Permission is hereby granted, free of charge, to any person obtaining
a copy of the Font Software, to use, study, copy, merge, embed, modify,
redistribute, and sell modified and unmodified copies of the Font
Software, subject to the following conditions:

1) Neither the Font Software nor any of its individual components,
in Original or Modified Versions, may be sold by itself.

2) Original or Modified Versions of the Font Software may be bundled,
redistributed and/or sold with any software, provided that each copy
contains the above copyright notice and this license. These can be
included either as stand-alone text files, human-readable headers or
in the appropriate machine-readable metadata fields within text or
binary files as long as those fields can be easily viewed by the user.

3) No Modified Version of the Font Software may use the Reserved Font
Name(s) unless explicit written permission is granted by the corresponding
Copyright Holder. This restriction only applies to the primary font name as
presented to the users.

4) The name(s) of the Copyright Holder(s) or the Author(s) of the Font
Software shall not be used to promote, endorse or advertise any
Modified Version, except to acknowledge the contribution(s) of the
Copyright Holder(s) and the Author(s) or with their explicit written
permission.

5) The Font Software, modified or unmodified, in part or in whole,
must be distributed entirely under this license, and must not be
distributed under any other license. The requirement for fonts to
remain under this license does not apply to any document created
using the Font Software.

TERMINATION
This license becomes null and void if any of the above conditions are
not met.

DISCLAIMER
THE FONT SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND,
EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO ANY WARRANTIES OF
MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT
OF COPYRIGHT, PATENT, TRADEMARK, OR OTHER RIGHT. IN NO EVENT SHALL THE
COPYRIGHT HOLDER BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY,
INCLUDING ANY GENERAL, SPECIAL, INDIRECT, INCIDENTAL, OR CONSEQUENTIAL
DAMAGES, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING
FROM, OUT OF THE USE OR INABILITY TO USE THE FONT SOFTWARE OR FROM
OTHER DEALINGS IN THE FONT SOFTWARE.
"""


# ------------------------------------------------------------------------------------ evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class Recognition:
    """How many pictures lie nearest to the glyph they were asked for, of all trained glyphs."""

    asked: int
    mistaken: tuple[tuple[str, str], ...]  # (caption, name of the glyph it looks like)

    @property
    def top1(self) -> float:
        """A share, 0 to 1."""
        return 1.0 - len(self.mistaken) / self.asked


def evaluate(
    pipeline: FluxPipeline,
    captions: Sequence[str],
    glyphs: Sequence[Glyph],
    *,
    seed: int = 0,
    font_path: Path = FONT,
    **sampling: Any,
) -> Recognition:
    """Draw each caption and look which of all glyphs is nearest (L2 in Lab).

    Captions are names or aliases of `glyphs`. `sampling` overrides `SAMPLING`.
    """
    owner = {w: i for i, glyph in enumerate(glyphs) for w in (glyph.name, *glyph.aliases)}
    drawn = draw(pipeline, captions, seed=seed, **sampling)
    nearest = nearest_glyphs(drawn, render_all(glyphs, font_path))
    mistaken = tuple(
        (caption, glyphs[index].name)
        for caption, index in zip(captions, nearest, strict=True)
        if index != owner[normalise(caption)]
    )
    return Recognition(asked=len(captions), mistaken=mistaken)


def evaluation_captions(glyphs: Sequence[Glyph], count: int = 200) -> list[str]:
    """Names of `count` glyphs, evenly spaced over the codepoints."""
    chosen = np.linspace(0, len(glyphs) - 1, min(count, len(glyphs))).round().astype(int)
    return [glyphs[index].name for index in chosen]


def draw(
    pipeline: FluxPipeline, prompts: Sequence[str], *, seed: int = 0, **sampling: Any
) -> np.ndarray:
    """(number, 64, 64, 3) uint8. Prompt i starts from seed + i, whatever it is batched with."""
    pipeline.set_progress_bar_config(disable=True)
    batches = []
    for first in range(0, len(prompts), 40):
        chunk = list(prompts[first : first + 40])
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(chunk))]
        pictures = pipeline(
            prompt=chunk, generator=generators, output_type="np", **{**SAMPLING, **sampling}
        ).images
        batches.append((pictures * 255.0).round().astype(np.uint8))
    return np.concatenate(batches)


def nearest_glyphs(drawn: np.ndarray, references: np.ndarray) -> list[int]:
    """For each drawn picture the index of the nearest reference; both (number, 64, 64, 3) uint8."""
    drawn_lab = torch.from_numpy(to_lab(drawn)).flatten(1)
    reference_lab = torch.from_numpy(to_lab(references)).flatten(1)
    return torch.cdist(drawn_lab, reference_lab).argmin(dim=1).tolist()


def to_lab(pictures: np.ndarray) -> np.ndarray:
    """sRGB uint8 (..., 3) to CIE Lab float32 (D65, L from 0 to 100): distances as seen."""
    srgb = pictures.astype(np.float32) / 255.0
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
         [0.0193339, 0.1191920, 0.9503041]], dtype=np.float32,
    )  # fmt: skip
    white = to_xyz.sum(axis=1)
    x, y, z = np.moveaxis((linear @ to_xyz.T) / white, -1, 0)
    fx, fy, fz = (np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116) for t in (x, y, z))
    lab: np.ndarray = np.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], axis=-1)
    return lab.astype(np.float32)


def write_contact_sheet(pipeline: FluxPipeline, prompts: Sequence[str], path: Path) -> None:
    """A PNG of eight pictures to a row at twice their size, each with its prompt below."""
    pictures = draw(pipeline, prompts)
    cell, label, columns = 2 * PICTURE_SIZE, 22, 8
    rows = math.ceil(len(prompts) / columns)
    sheet = Image.new("RGB", (columns * (cell + 8), rows * (cell + label)), "white")
    text = ImageDraw.Draw(sheet)
    for index, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        left, top = index % columns * (cell + 8), index // columns * (cell + label)
        large = Image.fromarray(picture).resize((cell, cell), Image.Resampling.BICUBIC)
        sheet.paste(large, (left + 4, top))
        text.text((left + 4, top + cell + 4), prompt, fill="black")
    sheet.save(path)


# ------------------------------------------------------------------------------------------- run


def train(options: argparse.Namespace) -> None:
    """Font -> glyphs -> autoencoder -> latents -> transformer -> folder."""
    torch.manual_seed(options.seed)
    sizes = TINY if options.smoke else FULL
    glyphs = everyday_glyphs(options.font)[: 16 if options.smoke else None]
    console.print(f"{len(glyphs)} glyphs")
    pictures = torch.from_numpy(render_all(glyphs, options.font)).permute(0, 3, 1, 2)
    pictures = (pictures.float() / 127.5 - 1.0).contiguous()
    pipeline = new_pipeline(glyphs, sizes)
    console.print(", ".join(f"{name} {size:,}" for name, size in parameter_counts(pipeline)))

    options.output.mkdir(parents=True, exist_ok=True)
    journal = Journal(options.output.with_name(options.output.name + ".checkpoint"))
    resumed = journal.load() if options.resume and journal.path.exists() else None
    vae_stage, *stages = schedule(options)
    if resumed is None or resumed["progress"]["stage"] == vae_stage.name:
        train_autoencoder(pipeline.vae, pictures, vae_stage, sizes.vae_batch, journal, resumed)
        resumed = None
    else:
        pipeline.vae.load_state_dict(resumed["vae"])
        pipeline.vae.eval()
    latents = latents_of(pipeline.vae, pictures)
    console.print(f"autoencoder {reconstruction_psnr(pipeline.vae, pictures):.1f} dB")

    def save() -> None:
        save_folder(pipeline, glyphs, options.output)
        console.print(f"saved {options.output}")

    train_transformer(pipeline, glyphs, latents, stages, sizes.batch, journal, resumed, save)
    save()


def parameter_counts(pipeline: FluxPipeline) -> list[tuple[str, int]]:
    networks = ("transformer", "vae", "text_encoder", "text_encoder_2")
    return [
        (name, sum(p.numel() for p in getattr(pipeline, name).parameters())) for name in networks
    ]


def schedule(options: argparse.Namespace) -> list[Stage]:
    """The autoencoder, a broad sweep by AdamW, the long run by Muon, then a polish if asked for."""
    minute = 0.05 if options.smoke else 60.0
    stages = [
        Stage(name="autoencoder", seconds=options.vae_minutes * minute, adam_rate=1.5e-3),
        Stage(
            name="sweep",
            seconds=options.sweep_minutes * minute,
            adam_rate=1.5e-3,
            sigma_offset=0.4,
            flat=1.0,
        ),
        Stage(
            name="long run",
            seconds=options.transformer_minutes * minute,
            adam_rate=1e-3,
            muon_rate=2e-3,
            sigma_offset=0.8,
            flat=0.3,
        ),
    ]
    if options.polish_minutes:
        polish = Stage(
            name="polish",
            seconds=options.polish_minutes * minute,
            adam_rate=3e-4,
            muon_rate=6e-4,
            sigma_offset=0.8,
        )
        stages.append(polish)
    return stages


def load_pipeline(folder: Path) -> FluxPipeline:
    return FluxPipeline.from_pretrained(folder, dtype=torch.bfloat16)


def print_recognition(folder: Path, options: argparse.Namespace) -> None:
    glyphs = read_glyphs(folder)
    captions = evaluation_captions(glyphs)
    overrides = {"num_inference_steps": options.steps} if options.steps else {}
    if options.true_cfg_scale > 1:
        overrides |= {"true_cfg_scale": options.true_cfg_scale}
    result = evaluate(load_pipeline(folder), captions, glyphs, font_path=options.font, **overrides)
    for caption, lookalike in result.mistaken:
        console.print(f"  {caption!r} looks like {lookalike!r}")
    sys.stdout.write(
        f"recognised {result.asked - len(result.mistaken)} of {result.asked} captions"
        f" among {len(glyphs)} glyphs: {100 * result.top1:.1f} %\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    quieten_libraries()
    options = command_line().parse_args(arguments)
    if options.output is None and options.evaluate is None:
        command_line().error("nothing to do: give --output DIR to train or --evaluate DIR to judge")
    if options.output is not None:
        train(options)
    folder = options.evaluate or options.output
    if options.evaluate or options.smoke:
        print_recognition(folder, options)
    if options.contact_sheet:
        write_contact_sheet(load_pipeline(folder), EVERYDAY_PROMPTS, options.contact_sheet)


def quieten_libraries() -> None:
    """Their progress bars and casting advice would bury the losses."""
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    huggingface_progress_bars_off()


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train or judge the small FLUX pipeline that draws emoji from their names."
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="train, and save the model here")
    parser.add_argument("--resume", action="store_true", help="go on from DIR.checkpoint")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, a few seconds in all")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="print the share recognised")
    parser.add_argument("--contact-sheet", type=Path, metavar="FILE", help="draw 24 prompts as PNG")
    parser.add_argument("--vae-minutes", type=float, default=7.0, metavar="MIN")
    parser.add_argument("--sweep-minutes", type=float, default=6.0, metavar="MIN")
    parser.add_argument("--transformer-minutes", type=float, default=35.0, metavar="MIN")
    parser.add_argument("--polish-minutes", type=float, default=0.0, metavar="MIN")
    parser.add_argument("--steps", type=int, metavar="N", help="sampling steps when judging")
    parser.add_argument("--true-cfg-scale", type=float, default=1.0, metavar="X")
    parser.add_argument("--font", type=Path, default=FONT, metavar="TTF")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
