"""One sheet: the same prompts and noise through the BF16 transformer and through its FP8 version."""

import sys

import torch
from PIL import Image

import diffquant

PROMPTS = (
    "red apple, octopus, fire, crown, airplane, hamburger, rainbow, soccer ball, pizza, cat face, "
    "dog face, rocket, cactus, house, key, umbrella, guitar, snowman, bee, ghost, robot face, "
    "birthday cake, bicycle, hot beverage"
).split(", ")
output = sys.argv[1] if len(sys.argv) > 1 else "bf16-beside-fp8.png"
prompts = PROMPTS[: int(sys.argv[2])] if len(sys.argv) > 2 else PROMPTS
columns = min(12, len(prompts))
sheet = Image.new("RGB", (columns * 72, 2 * 72 * -(-len(prompts) // columns)), "white")

for row, flags in enumerate(({"model_path": "emoji_flux"}, {})):
    pipeline = diffquant.load(**flags)
    print(*diffquant.report(pipeline).truth_lines)
    for index, prompt in enumerate(prompts):
        noise = torch.Generator().manual_seed(0)
        picture = pipeline(
            prompt, height=64, width=64, num_inference_steps=12, max_sequence_length=16,
            generator=noise,
        ).images[0]  # fmt: skip
        line, column = divmod(index, columns)
        sheet.paste(picture, (column * 72 + 4, (2 * line + row) * 72 + 4))
sheet.save(output)
