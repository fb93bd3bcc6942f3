"""Load a LoRA beside a quantized transformer, weigh it, take it away. No network needed."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import diffquant

file = Path(sys.argv[1] if len(sys.argv) > 1 else "noise-lora.safetensors")
pipeline = diffquant.load()


def draw(name: str) -> None:
    noise = torch.Generator().manual_seed(42)
    drawn = pipeline(
        "red apple", height=64, width=64, num_inference_steps=4, max_sequence_length=16,
        generator=noise,
    )  # fmt: skip
    drawn.images[0].save(name)


if not file.exists():  # a LoRA of rank 4 that was never trained, for want of a real one
    tensors = {}
    for path, layer in pipeline.transformer.named_modules():
        if path.endswith(("to_q", "to_v")):
            tensors[f"transformer.{path}.lora_A.weight"] = torch.randn(4, layer.in_features) * 0.1
            tensors[f"transformer.{path}.lora_B.weight"] = torch.randn(layer.out_features, 4) * 0.1
    save_file(tensors, file)

draw("without-lora.png")
pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="style")
for strength in (0.5, 1.0):
    pipeline.set_adapters(["style"], [strength])
    draw(f"with-lora-{strength}.png")
pipeline.unload_lora_weights()
print("drawn without, with half and with all of it; on the command line: --lora", f"{file}:0.5")
