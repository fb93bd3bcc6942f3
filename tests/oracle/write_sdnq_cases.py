"""Writes tests/data/sdnq: a tiny FLUX transformer and lone layers, by SDNQ itself.

Run in an environment of its own, for SDNQ is under the GPL (it was: sdnq 0.2.8, torch 2.13.0, CPU):

    pip install sdnq==0.2.8 torch==2.13.0
    python tests/oracle/write_sdnq_cases.py tests/data/sdnq

Answers are the owner's in float32 without the low-rank branch. Whole weights are kept, as tensors, of one
layer with its branch and of those with zero points, where a processor may round the product before the sum.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tiny_flux
import torch
from safetensors.torch import save_file
from sdnq.quantizer import sdnq_post_load_quant
from torch import Tensor, nn

ALL = {"minimum_allowed_numel": 0, "minimum_allowed_channel_size": 0, "dequantize_fp32": True}
#: Rows, columns and what the owner is asked for.
FILES: dict[str, dict[str, dict[str, Any]]] = {
    "int8": {
        "rows": {},
        "groups": {"group_size": 32},
        "columns": {"use_quantized_matmul": True},
        "columns_branch": {"use_quantized_matmul": True, "use_svd": True, "svd_rank": 4},
    },
    "float8_e4m3fn": {"rows": {}, "groups": {"group_size": 32}},
    "float8_e5m2": {"rows": {}},
    "int4": {"rows": {"group_size": -1}, "groups": {"group_size": 16}},
    "uint4": {"rows": {"group_size": -1}, "groups": {"group_size": 16}},
}
N, K = 32, 64


def weight_of(layer: nn.Module, **wanted: bool) -> Tensor:
    held = dict(layer.named_parameters()) | dict(layer.named_buffers())
    names = ("weight", "scale", "zero_point", "svd_up", "svd_down")
    tensors = {name: held[name].detach() for name in names if name in held}
    wide = {name: each.float() for name, each in tensors.items() if name != "weight"}
    tensors |= wide
    made = layer.sdnq_dequantizer(**tensors, dtype=torch.float32, skip_compile=True, **wanted)
    return made.contiguous()


def quantized(model: nn.Module, **asked: Any) -> dict[str, nn.Module]:
    made = sdnq_post_load_quant(model, torch_dtype=torch.bfloat16, **ALL, **asked)
    return {path: each for path, each in made.named_modules() if hasattr(each, "sdnq_dequantizer")}


def told(model: nn.Module) -> dict[str, Any]:
    block = model.config["quantization_config"]
    plain: dict[str, Any] = json.loads(json.dumps(dict(block), default=str))
    return plain | {"quant_method": "sdnq"}


def main(root: Path) -> None:
    transformer = tiny_flux.model()
    layers = quantized(transformer, weights_dtype="int4", use_svd=True, svd_rank=4)
    answers = {path: weight_of(layer, non_svd=True) for path, layer in layers.items()}
    stored = {f"{path}.weight": layer.weight.detach() for path, layer in layers.items()}
    block = told(transformer)
    tiny_flux.save(root / "int4_svd", transformer, stored, answers, quantization=block)
    torch.manual_seed(0)
    for kind, cases in FILES.items():
        tensors: dict[str, Tensor] = {}
        decoded: dict[str, Tensor] = {}
        whole: dict[str, Tensor] = {}
        for name, asked in cases.items():
            holder = nn.ModuleDict({name: nn.Linear(K, N, dtype=torch.bfloat16)})
            (layer,) = quantized(holder, weights_dtype=kind, **asked).values()
            path = f"blocks.0.{name}"
            tensors |= {f"{path}.{key}": each for key, each in layer.state_dict().items()}
            columns = asked.get("use_quantized_matmul", False)
            decoded[path] = weight_of(layer, non_svd=True, skip_quantized_matmul=columns)
            if asked.get("use_svd") or kind == "uint4":
                whole[path] = weight_of(layer, skip_quantized_matmul=columns)
        path = root / f"{kind}.safetensors"
        told_of = json.dumps({"quant_method": "sdnq", "weights_dtype": kind})
        tiny_flux.save_layers(path, tensors, decoded, quantization_config=told_of)
        if whole:
            save_file(whole, path.with_suffix(".owner.safetensors"))
        if kind == "uint4":
            path.with_suffix(".owner.json").unlink()
    tiny_flux.provenance(root, Path(__file__).name, sdnq=version("sdnq"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
