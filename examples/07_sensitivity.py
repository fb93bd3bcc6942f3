"""Which layers can be NVFP4, and which should stay BF16? Measured, not guessed; then used. No network needed."""

import sys
from pathlib import Path

import diffquant
from diffquant.compare import budget
from diffquant.compare.chart import picture
from diffquant.converters.sensitivity import Wish, sensitivity
from diffquant.run import Request

preset = Path(sys.argv[1] if len(sys.argv) > 1 else "measured.toml")
wish = Wish(
    source="emoji_flux",
    encoding="nvfp4",
    prompts=("red apple",),
    steps=2,
    settings=Request(num_inference_steps=4),
)

# Every layer is quantized alone and asked what it does to the output; then there are 60 % of the bytes.
found = sensitivity(wish, budget.parsed("size=0.6"))
for unit, error in found.alone[:3]:
    print(f"{error:.3f} when only {unit.paths[0]} is quantized")
print(found.told())

# The preset names the layers that stay, with their figures; the plot shows what every choice costs.
preset.write_text(found.preset(), encoding="utf-8")
picture(found.chart()).save(preset.with_suffix(".png"))

pipeline = diffquant.load("emoji_flux", quantization="nvfp4", quantization_preset=str(preset))
(drawn,) = pipeline(
    "red apple", height=64, width=64, num_inference_steps=12, max_sequence_length=16
).images
drawn.save(preset.with_suffix(".apple.png"))
