"""What scripts that write a dialect share: a tiny FLUX transformer, and how its answers are kept.

A layer's answer is the SHA-256 of the float32 weight that the owner's own library decodes.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG: dict[str, Any] = {
    "attention_head_dim": 8,
    "axes_dims_rope": [4, 2, 2],
    "guidance_embeds": False,
    "in_channels": 4,
    "joint_attention_dim": 8,
    "num_attention_heads": 2,
    "num_layers": 0,
    "num_single_layers": 1,
    "patch_size": 1,
    "pooled_projection_dim": 8,
}


def model(**config: Any) -> FluxTransformer2DModel:
    """One single block of 16 channels, bfloat16; keywords change its config."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(**{**CONFIG, **config}).to(torch.bfloat16).eval()


def block_linears(transformer: nn.Module) -> dict[str, nn.Linear]:
    """Those that are quantized, by path."""
    return {
        path: module
        for path, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and "single_transformer_blocks" in path
    }


def digest(weight: Tensor) -> str:
    return hashlib.sha256(weight.float().contiguous().numpy().tobytes()).hexdigest()


def save(
    folder: Path,
    transformer: FluxTransformer2DModel,
    tensors: Mapping[str, Tensor],
    decoded: Mapping[str, Tensor],
    *,
    quantization: Mapping[str, Any] | None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A component folder with its answers. `tensors` replaces the weights of quantized layers."""
    folder.mkdir(parents=True, exist_ok=True)
    replaced = {f"{path}.weight" for path in decoded}
    plain = {name: each for name, each in transformer.state_dict().items() if name not in replaced}
    stored = {name: each.detach().contiguous() for name, each in (plain | dict(tensors)).items()}
    save_file(stored, folder / "diffusion_pytorch_model.safetensors", metadata=dict(metadata or {}))
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    config = {"_class_name": "FluxTransformer2DModel"} | config
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    keep_answers(folder / "owner.json", decoded)


def save_layers(
    path: Path, tensors: Mapping[str, Tensor], decoded: Mapping[str, Tensor], **metadata: str
) -> None:
    """Lone layers in one file, their answers beside it."""
    stored = {name: each.detach().contiguous() for name, each in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(stored, path, metadata=metadata or None)
    keep_answers(path.with_suffix(".owner.json"), decoded)


def keep_answers(path: Path, decoded: Mapping[str, Tensor]) -> None:
    answers = {layer: digest(weight) for layer, weight in decoded.items()}
    path.write_text(json.dumps(answers, indent=1) + "\n")


def provenance(folder: Path, script: str, **versions: str) -> None:
    (folder / "provenance.json").write_text(
        json.dumps({"script": f"tests/oracle/{script}", **versions}, indent=1) + "\n"
    )
