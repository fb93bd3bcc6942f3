"""Writes tests/data/torchao: a tiny FLUX transformer and lone layers, by torchao itself.

Run where the owner is installed (it was: torchao 0.18.0, torch 2.13.0, CPU):

    pip install torchao==0.18.0 torch==2.13.0 diffusers
    python tests/oracle/write_torchao_cases.py tests/data/torchao

Classes that its configurations make on a GPU only are made by their own constructors. Answers are the
owner's in float32; outer scales of NVFP4 are powers of two, so that no order of products rounds.
"""

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tiny_flux
import torch
from torch import Tensor
from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, QuantizeTensorToNVFP4Kwargs
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8Tensor,
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows import (
    QuantizeTensorToFloat8Kwargs,
    QuantizeTensorToInt8Kwargs,
)

N, K = 16, 64
#: Below 32 rows tiles of scales are rows of scales.
TALL = 48


def float8(granularity: Any, inputs: Any = None) -> Callable[[Tensor], Tensor]:
    told = None if inputs is None else QuantizeTensorToFloat8Kwargs(granularity=inputs)
    return lambda weight: Float8Tensor.from_hp(
        weight, granularity=granularity, act_quant_kwargs=told
    )


def int8(granularity: Any, inputs: Any = None) -> Callable[[Tensor], Tensor]:
    told = None if inputs is None else QuantizeTensorToInt8Kwargs(granularity=inputs)
    return lambda weight: Int8Tensor.from_hp(weight, granularity, act_quant_kwargs=told)


def intx(bits: torch.dtype, mapping: MappingType, inputs: Any = None) -> Callable[[Tensor], Tensor]:
    return lambda weight: IntxUnpackedToInt8Tensor.from_hp(
        weight, (1, 32), bits, mapping_type=mapping, activation_quantization=inputs
    )


def nvfp4(swizzled: bool, outer: bool, inputs: bool = False) -> Callable[[Tensor], Tensor]:
    return lambda weight: NVFP4Tensor.to_nvfp4(
        weight,
        is_swizzled_scales=swizzled,
        per_tensor_scale=torch.tensor(2.0**-11) if outer else None,
        act_quant_kwargs=QuantizeTensorToNVFP4Kwargs() if inputs else None,
    )


def mx(
    element: torch.dtype, swizzled: bool = False, inputs: bool = False
) -> Callable[[Tensor], Tensor]:
    return lambda weight: MXTensor.to_mx(
        weight,
        element,
        32,
        act_quant_kwargs=QuantizeTensorToMXKwargs(elem_dtype=element) if inputs else None,
        is_swizzled_scales=swizzled,
    )


FP4 = torch.float4_e2m1fn_x2
CASES = {
    "float8_row": float8(PerRow()),
    "float8_row_inputs": float8(PerRow(), PerRow()),
    "float8_tensor": float8(PerTensor(), PerTensor()),
    "float8_block": float8(PerBlock((16, 32))),
    "int8_row_inputs": int8(PerRow(), PerRow()),
    "int8_tensor": int8(PerTensor()),
    "int8_tensor_group": int8(PerGroup(32)),
    "int4_group": intx(torch.int4, MappingType.ASYMMETRIC, "int8_asym_per_token"),
    "int8_group": intx(torch.int8, MappingType.SYMMETRIC),
    "nvfp4": nvfp4(False, True),
    "nvfp4_swizzled": nvfp4(True, True, inputs=True),
    "nvfp4_bare": nvfp4(False, False),
    "mxfp8": mx(torch.float8_e4m3fn, inputs=True),
    "mxfp8_swizzled": mx(torch.float8_e4m3fn, swizzled=True),
    "mxfp4": mx(FP4),
}


def decoded(weight: Tensor) -> Tensor:
    if isinstance(weight, IntxUnpackedToInt8Tensor):
        weight.scale, dtype = weight.scale.float(), weight.dtype
        assert dtype == torch.float32
        return weight.dequantize()
    return weight.dequantize(torch.float32)


def main(root: Path) -> None:
    transformer = tiny_flux.model()
    names = set(tiny_flux.block_linears(transformer))
    quantize_(transformer, Int8WeightOnlyConfig(version=2), lambda _, path: path in names)
    weights = transformer.state_dict()
    answers = {path: weights[f"{path}.weight"].dequantize(torch.float32) for path in names}
    stored, metadata = flatten_tensor_state_dict(weights)
    # The class's own state dict would be stored beside what it was taken apart to.
    transformer.state_dict = dict  # type: ignore[method-assign]
    told = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}
    tiny_flux.save(
        root / "int8", transformer, stored, answers, quantization=told, metadata=metadata
    )
    torch.manual_seed(0)
    rows = {name: TALL if "swizzled" in name else N for name in CASES}
    made = {f"blocks.0.{name}": make(torch.randn(rows[name], K)) for name, make in CASES.items()}
    stored, metadata = flatten_tensor_state_dict({f"{p}.weight": each for p, each in made.items()})
    answers = {path: decoded(weight) for path, weight in made.items()}
    tiny_flux.save_layers(root / "cases.safetensors", stored, answers, **metadata)
    tiny_flux.provenance(root, Path(__file__).name, torchao=version("torchao"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
