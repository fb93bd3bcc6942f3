"""A FLUX.1-shaped transformer of two billion random parameters, plain and as FP8 files."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffquant import device, headers, online, planner, sources
from diffquant.encodings import ENCODINGS
from diffquant.families import FAMILIES
from diffquant.formats import FORMATS
from diffquant.kernels import KERNELS, choose
from diffquant.layouts import LAYOUTS
from diffquant.materialize import materialize
from diffquant.online import Online
from diffquant.saving import save

#: FLUX.1-dev with 3 of its 19 double and 6 of its 38 single blocks.
CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 3,
    "num_single_layers": 6,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
#: Every linear, the modulations too: what is measured here is arithmetic and not pictures.
FP8 = Online(scheme="fp8_tensor", quantize_all=True)
SHARD = "500MB"


def plain_folder(work: Path) -> Path:
    """The bf16 component folder, written on first use."""
    folder = work / "flux-bf16"
    if not (folder / "config.json").exists():
        from diffusers import FluxTransformer2DModel

        with torch.device("meta"):
            model = FluxTransformer2DModel(**CONFIG)
        model = model.bfloat16().to_empty(device="cpu")
        for name, value in model.state_dict().items():
            value.fill_(1) if name.endswith("norm_q.weight") else value.normal_(std=0.02)
        model.save_pretrained(folder, max_shard_size=SHARD)
    return folder


def fp8_folder(work: Path) -> Path:
    """The same weights as ModelOpt FP8 with one scale per weight, written on first use."""
    folder = work / "flux-fp8"
    if not (folder / "config.json").exists():
        checkpoint = sources.checkpoint(str(plain_folder(work)))
        plan = planner.plan(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)
        save(online.requantized(plan, FP8), FP8, folder)
    return folder


def plain_model(folder: Path) -> nn.Module:
    """The bf16 model as diffusers loads it."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    loaded: nn.Module = model.eval()
    return loaded


def encoded_model(folder: Path) -> nn.Module:
    """A quantized component folder as diffquant loads it on this machine's CPU."""
    checkpoint, place = sources.checkpoint(str(folder)), device.parse("cpu")
    plan = planner.plan(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)
    choices = [choose(layer, place) for layer in plan.layers]
    return materialize(plan, choices, device=torch.device("cpu"), dtype=torch.bfloat16)


def inputs(tokens: int) -> dict[str, Tensor]:
    """One step's input: four fifths of the tokens are the picture's, one fifth the prompt's."""
    words = tokens // 5
    side = tokens - words
    return {
        "hidden_states": torch.randn(1, side, CONFIG["in_channels"]).bfloat16(),
        "encoder_hidden_states": torch.randn(1, words, CONFIG["joint_attention_dim"]).bfloat16(),
        "pooled_projections": torch.randn(1, CONFIG["pooled_projection_dim"]).bfloat16(),
        "timestep": torch.tensor([0.5]).bfloat16(),
        "guidance": torch.tensor([3.5]).bfloat16(),
        "img_ids": torch.zeros(side, 3),
        "txt_ids": torch.zeros(words, 3),
    }


def imported() -> None:
    """Imports every plugin, which a first load would do one by one."""
    from diffusers import FluxTransformer2DModel  # noqa: F401

    for registry in (ENCODINGS, FAMILIES, FORMATS, KERNELS, LAYOUTS):
        registry.load_all()
