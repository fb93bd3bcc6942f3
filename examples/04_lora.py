"""Load a LoRA beside an FP8 transformer, weigh it, take it away. No network needed."""

import sys

import torch
from PIL import Image

import diffquant
from diffquant import sources

PROMPTS = ("red apple", "rocket", "cat face", "tree", "hamburger", "guitar")
file = sources.checkpoint("emoji_flux_blue_ink").files[0]
pipeline = diffquant.load()
sheet = Image.new("RGB", (64 * len(PROMPTS), 64 * 4), "white")


def draw(row: int) -> None:
    for column, prompt in enumerate(PROMPTS):
        drawn = pipeline(
            prompt, height=64, width=64, num_inference_steps=STEPS, max_sequence_length=16,
            generator=torch.Generator().manual_seed(42),
        )  # fmt: skip
        sheet.paste(drawn.images[0], (64 * column, 64 * row))


STEPS = int(sys.argv[2]) if len(sys.argv) > 2 else 12
draw(0)
pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="ink")
for row, strength in enumerate((0.5, 1.0), start=1):
    pipeline.set_adapters(["ink"], [strength])
    draw(row)
pipeline.unload_lora_weights()
draw(3)
name = sys.argv[1] if len(sys.argv) > 1 else "lora-sheet.png"
sheet.save(name)
print(f"{name}: without, half, all, and without again; by command: --lora emoji_flux_blue_ink:0.5")
