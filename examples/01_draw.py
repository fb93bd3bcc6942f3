"""Draw with the bundled pipeline and its FP8 transformer, then say what ran. No network needed."""

import sys

import torch

import diffquant

output = sys.argv[1] if len(sys.argv) > 1 else "red-apple.png"

pipeline = diffquant.load()  # the same as --model-path emoji_flux with its FP8 override
picture = pipeline(
    "red apple",
    height=64,
    width=64,
    num_inference_steps=12,
    max_sequence_length=16,
    generator=torch.Generator().manual_seed(42),
).images[0]
picture.save(output)

for line in diffquant.report(pipeline).truth_lines:
    print(line)
print(output)
