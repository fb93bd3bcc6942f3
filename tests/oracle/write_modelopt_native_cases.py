"""Native saves of nvidia-modelopt: a tiny FLUX quantized by the owner and saved with live quantizers.

    PYTHONPATH=<site-packages of nvidia-modelopt 0.47.0> python tests/oracle/write_modelopt_native_cases.py

`mto.enable_huggingface_checkpointing()` makes diffusers' `save_pretrained` keep the quantizers'
buffers; the pickled modelopt_state.pth beside them is not copied. `expected` is what the owner itself
multiplies with, as digests: each weight as its own quantizer decodes it, in the model's bfloat16.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import modelopt
import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

CASES = Path(__file__).resolve().parents[1] / "data" / "modelopt" / "native"
CONFIG: dict[str, Any] = {
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "guidance_embeds": False,
    "in_channels": 16,
    "joint_attention_dim": 32,
    "num_attention_heads": 2,
    "num_layers": 1,
    "num_single_layers": 0,
    "patch_size": 1,
    "pooled_projection_dim": 32,
}
SCHEMES = {
    "fp8_fake": (mtq.FP8_DEFAULT_CFG, False),
    "fp8": (mtq.FP8_DEFAULT_CFG, True),
    "int8_sq": (mtq.INT8_SMOOTHQUANT_CFG, True),
    "mxfp8": (mtq.MXFP8_DEFAULT_CFG, True),
    "nvfp4": (mtq.NVFP4_DEFAULT_CFG, True),
}


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    return {
        "hidden_states": random(1, 16, 16),
        "encoder_hidden_states": random(1, 8, 32),
        "pooled_projections": random(1, 32),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }


def expected(model: nn.Module) -> dict[str, str]:
    """Weight of a quantized linear -> the beginning of the SHA-256 of what the owner decodes."""
    found = {}
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if isinstance(module, nn.Linear) and quantizer is not None and quantizer.is_enabled:
            # Adding zero makes all zeros positive: the sign of a zero is nobody's business.
            decoded = (quantizer(module.weight) + 0).contiguous()
            raw = decoded.view(torch.uint8).numpy().tobytes()
            found[f"{name}.weight"] = hashlib.sha256(raw).hexdigest()[:16]
    return found


def write(scheme: str, recipe: Any, compress: bool) -> None:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**CONFIG).bfloat16().eval()
    model = mtq.quantize(model, recipe, lambda given: given(**inputs()))
    if compress:
        mtq.compress(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        target = CASES / scheme
        target.mkdir(parents=True, exist_ok=True)
        for path in Path(folder).iterdir():
            if path.suffix in (".json", ".safetensors"):
                shutil.copyfile(path, target / path.name)
    if compress:
        table = json.dumps(expected(model), indent=0) + "\n"
        (CASES / f"{scheme}.expected.json").write_text(table)


if __name__ == "__main__":
    mto.enable_huggingface_checkpointing()
    for scheme, (recipe, compress) in SCHEMES.items():
        write(scheme, recipe, compress)
    told = {
        "script": "tests/oracle/write_modelopt_native_cases.py",
        "nvidia-modelopt": modelopt.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    (CASES / "provenance.json").write_text(json.dumps(told, indent=1) + "\n")
