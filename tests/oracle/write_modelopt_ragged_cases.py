"""Quantize a tiny Z-Image transformer with ModelOpt itself, in sizes no kernel likes.

    python tests/oracle/write_modelopt_ragged_cases.py

It needs nvidia-modelopt beside diffusers. 48 wide, so that neither rows nor groups fill a tile of
128 x 4. Written is an NVFP4 export whose scales are swizzled and padded; the base is the seeded
random model again (`tests/unit/test_dequantize.py` makes it anew).
"""

import copy
import shutil
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from diffusers import ZImageTransformer2DModel
from modelopt.torch.export import export_hf_checkpoint

CASES = Path(__file__).resolve().parents[1] / "data" / "modelopt" / "z_image"


def model() -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=80,
        axes_dims=[8, 4, 4],
        axes_lens=[64, 8, 8],
    ).to(torch.bfloat16)


def calibrate(quantized: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        quantized(
            x=[torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.bfloat16)],
            t=torch.tensor([0.5], dtype=torch.bfloat16),
            cap_feats=[torch.randn(7, 80, generator=generator, dtype=torch.bfloat16)],
        )


def write() -> None:
    target = CASES / "nvfp4_swizzle"
    shutil.rmtree(target, ignore_errors=True)
    quantized = mtq.quantize(model(), copy.deepcopy(mtq.NVFP4_DEFAULT_CFG), calibrate)
    export_hf_checkpoint(
        quantized, dtype=torch.bfloat16, export_dir=target, enable_swizzle_layout=True
    )


if __name__ == "__main__":
    write()
