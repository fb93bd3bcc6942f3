"""Train a LoRA on the bundled emoji model: everything it draws, in blue ink. No network, no font.

    python examples/train_emoji_lora.py --output blue-ink.safetensors     minutes on two cores
    python examples/train_emoji_lora.py --output x.safetensors --smoke    the whole path in seconds
    diffquant generate --prompt 'red apple' --lora blue-ink.safetensors

The pictures to learn from are the model's own drawings, recoloured. Trained on the BF16 weights and
loaded beside the FP8 ones: the two differ by far less than what is learned.

B pictures, L packed latent tokens of C channels, T text tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from diffquant import sources

SIDE = 64
TEXT_TOKENS = 16
PAPER, INK = "#ffffff", "#0a2a6b"
#: The linears of both kinds of blocks that see pictures.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How long and how much."""

    captions: int = 160
    draw_steps: int = 12
    steps: int = 500
    batch: int = 16
    rank: int = 8
    rate: float = 2e-3


SMOKE = Settings(captions=4, draw_steps=1, steps=2, batch=2, rank=2)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    words.add_argument("--output", type=Path, required=True)
    words.add_argument("--smoke", action="store_true")
    typed = words.parse_args()
    settings = SMOKE if typed.smoke else Settings()
    torch.manual_seed(0)
    root = sources.checkpoint("emoji_flux").root.parent
    pipeline = FluxPipeline.from_pretrained(root, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    glyphs = json.loads((root / "glyphs.json").read_text("utf-8"))
    spread = glyphs[:: max(len(glyphs) // settings.captions, 1)][: settings.captions]
    captions = [glyph["name"] for glyph in spread]
    loss = train(pipeline, captions, blue_ink(pipeline, captions, settings), settings)
    save(pipeline, typed.output)
    print(f"{typed.output}: rank {settings.rank}, loss {loss:.4f} at the end")


@torch.inference_mode()
def blue_ink(pipeline: FluxPipeline, captions: Sequence[str], settings: Settings) -> Tensor:
    """The model's own drawings of the captions, recoloured, as latents [B, L, C]."""
    drawn = [
        pipeline(
            caption,
            height=SIDE,
            width=SIDE,
            num_inference_steps=settings.draw_steps,
            max_sequence_length=TEXT_TOKENS,
            generator=torch.Generator().manual_seed(index),
        ).images[0]
        for index, caption in enumerate(track(captions, "drawing"))
    ]
    pictures = torch.stack([pixels(recoloured(picture)) for picture in drawn])
    config = pipeline.vae.config
    latents = pipeline.vae.encode(pictures).latent_dist.mode()
    normal = (latents - config.shift_factor) * config.scaling_factor
    return FluxPipeline._pack_latents(normal, *normal.shape)


def recoloured(picture: Image.Image) -> Image.Image:
    """Every colour becomes ink of its darkness on white paper."""
    return ImageOps.colorize(ImageOps.autocontrast(picture.convert("L")), INK, PAPER)


def pixels(picture: Image.Image) -> Tensor:
    """[3, H, W] between -1 and 1."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def train(
    pipeline: FluxPipeline, captions: Sequence[str], latents: Tensor, settings: Settings
) -> float:
    """Flow matching on the adapter alone; the mean loss of the last tenth."""
    transformer = pipeline.transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=TARGETS)
    )
    learned = [weight for weight in transformer.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=settings.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.rate, total_steps=settings.steps
    )
    prompts = encoded(pipeline, captions)
    losses = []
    for _ in track(range(settings.steps), "training"):
        chosen = torch.randint(len(latents), (settings.batch,))
        loss = flow_loss(pipeline, latents[chosen], *(part[chosen] for part in prompts))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    last = losses[-max(settings.steps // 10, 1) :]
    return sum(last) / len(last)


@torch.no_grad()
def encoded(pipeline: FluxPipeline, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """What both text encoders make of the captions: [B, T, D] and [B, D]."""
    words, pooled, _ = pipeline.encode_prompt(
        list(captions), list(captions), max_sequence_length=TEXT_TOKENS
    )
    return words, pooled


def flow_loss(pipeline: FluxPipeline, clean: Tensor, words: Tensor, pooled: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity, noise - clean, at a random time each."""
    noise, time = torch.randn_like(clean), torch.rand(len(clean))
    mixed = torch.lerp(clean, noise, time[:, None, None])
    half = SIDE // pipeline.vae_scale_factor // 2
    guidance = torch.full_like(time, 3.5) if pipeline.transformer.config.guidance_embeds else None
    predicted: Any = pipeline.transformer(
        hidden_states=mixed,
        timestep=time,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=words,
        txt_ids=torch.zeros(words.shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, half, half, "cpu", torch.float32),
        return_dict=False,
    )[0]
    return F.mse_loss(predicted, noise - clean)


def save(pipeline: FluxPipeline, path: Path) -> None:
    """As diffusers and every other tool spells it, in bfloat16."""
    state = get_peft_model_state_dict(pipeline.transformer)
    tensors = {f"transformer.{name}": tensor.bfloat16() for name, tensor in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
