"""Writes tests/data/comfy: one file per Comfy format, by comfy-kitchen itself, with what it decodes to.

Run where the owner is installed (it was: comfy-kitchen 0.2.40, torch 2.13.0, CPU, eager backend):

    pip install comfy-kitchen==0.2.40 torch==2.13.0
    python tests/oracle/write_comfy_cases.py tests/data/comfy

Every case is `<name>.safetensors`, as ComfyUI saves it (names, markers, dtypes), and beside it
`<name>.owner.safetensors` with two tensors per layer: `X.original`, the weight it was made from,
and `X.decoded`, the owner's own dequantization. AWQ has no quantizer of the owner's; its codes,
scales and zeros are random numbers and there is no original; nor is there one for SVDQuant.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from comfy_kitchen.tensor import (
    AsymW4A8Int8Layout,
    TensorCoreAWQW4A16Layout,
    TensorCoreConvRotW4A4Layout,
    TensorCoreFP8Layout,
    TensorCoreMXFP8Layout,
    TensorCoreNVFP4Layout,
    TensorCoreSVDQuantW4A4Layout,
    TensorWiseINT8Layout,
)
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "model.diffusion_model."
LAYER = "blocks.0.attn"

#: Case: layout of the owner, marker, shape of the weight, arguments of the quantizer.
CASES: dict[str, tuple[Any, dict[str, Any], tuple[int, int], dict[str, Any]]] = {
    "fp8": (TensorCoreFP8Layout, {"format": "float8_e4m3fn"}, (24, 32), {}),
    "fp8_e5m2": (
        TensorCoreFP8Layout,
        {"format": "float8_e5m2"},
        (24, 32),
        {"dtype": torch.float8_e5m2},
    ),
    # A full tile of scales, and one that is padded on all sides.
    "nvfp4": (TensorCoreNVFP4Layout, {"format": "nvfp4"}, (128, 64), {}),
    "nvfp4_padded": (TensorCoreNVFP4Layout, {"format": "nvfp4"}, (40, 48), {}),
    "nvfp4_full_precision": (
        TensorCoreNVFP4Layout,
        {"format": "nvfp4", "full_precision_matrix_mult": True},
        (32, 64),
        {},
    ),
    "mxfp8": (TensorCoreMXFP8Layout, {"format": "mxfp8"}, (128, 128), {}),
    "mxfp8_padded": (TensorCoreMXFP8Layout, {"format": "mxfp8"}, (40, 48), {}),
    "int8": (TensorWiseINT8Layout, {"format": "int8_tensorwise"}, (24, 32), {}),
    "int8_convrot": (
        TensorWiseINT8Layout,
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64},
        (24, 128),
        {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
    ),
    "convrot_w4a4": (
        TensorCoreConvRotW4A4Layout,
        {"format": "convrot_w4a4", "convrot_groupsize": 64},
        (24, 128),
        {"convrot_groupsize": 64},
    ),
    "asym_w4a8_codebook": (
        AsymW4A8Int8Layout,
        {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 256},
        (24, 256),
        {},
    ),
    "asym_w4a8_correction": (
        AsymW4A8Int8Layout,
        {"format": "asym_w4a8_int8", "group_size": 32, "convrot_groupsize": 64},
        (24, 128),
        {"group_size": 32, "convrot_groupsize": 64, "symmetric": False},
    ),
    "asym_w4a8_float_scale": (
        AsymW4A8Int8Layout,
        {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 64},
        (24, 128),
        {"convrot_groupsize": 64, "codebook": False, "scale_dtype": torch.float32},
    ),
}


def main(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    for name, (layout, marker, shape, arguments) in CASES.items():
        original = torch.randn(shape, dtype=torch.bfloat16)
        # float32 in, so that the owner's dequantization is not rounded to bfloat16
        codes, params = layout.quantize(original.float(), **arguments)
        decoded = layout.dequantize(codes, params)
        stored = layout.state_dict_tensors(codes, params)
        stored["bias"] = torch.randn(shape[0]).bfloat16()
        _save(target, name, marker, stored, {"original": original, "decoded": decoded})
    _save(target, "awq_w4a16", *_awq())
    _save(target, "svdquant_w4a4", *_svdquant())
    (target / "provenance.json").write_text(json.dumps(_provenance(), indent=1) + "\n")


def _awq() -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    codes = torch.randint(-128, 128, (24, 64), dtype=torch.int8)
    params = TensorCoreAWQW4A16Layout.Params(
        scale=torch.rand(2, 24).bfloat16(),
        zeros=torch.randn(2, 24).bfloat16(),
        orig_dtype=torch.float32,
        orig_shape=(24, 128),
    )
    decoded = TensorCoreAWQW4A16Layout.dequantize(codes, params).float()
    stored = TensorCoreAWQW4A16Layout.state_dict_tensors(codes, params)
    return {"format": "awq_w4a16", "group_size": 64}, stored, {"decoded": decoded}


def _svdquant() -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Load-only as well, and float32 throughout: its eager kernel computes in the scales' dtype."""
    codes = torch.randint(-128, 128, (24, 64), dtype=torch.int8)
    params = TensorCoreSVDQuantW4A4Layout.Params(
        scale=torch.rand(2, 24) / 16,
        orig_dtype=torch.float32,
        orig_shape=(24, 128),
        proj_down=torch.randn(128, 16) / 16,
        proj_up=torch.randn(24, 16),
        smooth_factor=torch.rand(128) + 0.5,
    )
    stored = TensorCoreSVDQuantW4A4Layout.state_dict_tensors(codes, params)
    decoded = TensorCoreSVDQuantW4A4Layout.dequantize(codes, params).float()
    return {"format": "svdquant_w4a4"}, stored, {"decoded": decoded}


def _save(
    target: Path,
    name: str,
    marker: dict[str, Any],
    stored: dict[str, Tensor],
    owner: dict[str, Tensor],
) -> None:
    tensors = {f"{PREFIX}{LAYER}.{_leaf(key)}": part.contiguous() for key, part in stored.items()}
    text = json.dumps(marker).encode()
    tensors[f"{PREFIX}{LAYER}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    save_file(tensors, target / f"{name}.safetensors")
    kept = {f"{LAYER}.{key}": value.contiguous() for key, value in owner.items()}
    save_file(kept, target / f"{name}.owner.safetensors")


def _leaf(key: str) -> str:
    """The owner names parts by what follows `weight`."""
    return key if key == "bias" else f"weight{key}"


def _provenance() -> dict[str, str]:
    packages = ("comfy-kitchen", "torch", "safetensors")
    return {"script": "tests/oracle/write_comfy_cases.py"} | {
        package: version(package) for package in packages
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
