"""Writes tests/data/compressed_tensors: one layer per scheme, by compressed-tensors itself.

Run where the owner is installed (it was: compressed-tensors 0.20.0, torch 2.13.0, CPU):

    pip install compressed-tensors==0.20.0 torch==2.13.0
    python tests/oracle/write_compressed_tensors_cases.py tests/data/compressed_tensors

`cases.safetensors` holds all layers, its header the owner's QuantizationConfig; beside it
`cases.owner.safetensors` has what the owner decompresses each of them to.
"""

import json
import sys
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file
from torch import Tensor, nn

SHAPE = (12, 64)
#: The owner's presets by layer; None: the format its library infers.
PRESETS: dict[str, tuple[str, str | None]] = {
    "fp8_tensor": ("FP8", None),
    "fp8_channel": ("FP8_DYNAMIC", None),
    "fp8_block": ("FP8_BLOCK", None),
    "int8": ("W8A8", None),
    "int8_packed": ("W8A16", None),
    "int4": ("W4A16", None),
    "int4_asymmetric": ("W4A16_ASYM", None),
    "int4_bytes": ("W4A8", None),
    "int4_fp8": ("W4AFP8", "pack-quantized"),
    "nvfp4": ("NVFP4", None),
    "nvfp4_weights": ("NVFP4A16", None),
    "mxfp4": ("MXFP4", None),
    "mxfp8": ("MXFP8", None),
    "mxfp8_weights": ("MXFP8A16", None),
}
GROUP, BLOCK = 32, [8, 32]


def scheme(preset: str, layer: str) -> QuantizationScheme:
    """The owner's preset, with groups and blocks that fit a small weight."""
    found = deepcopy(preset_name_to_scheme(preset, [f"blocks.0.{layer}"]))
    if found.weights.group_size == 128:
        found.weights.group_size = GROUP
    if found.weights.block_structure is not None:
        found.weights.block_structure = BLOCK
        found.input_activations.group_size = BLOCK[1]
    return found


def asymmetric() -> QuantizationScheme:
    """INT8 with zero points on both sides, for which the owner has no preset."""
    weights = QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=False)
    inputs = QuantizationArgs(num_bits=8, type="int", strategy="tensor", symmetric=False)
    return QuantizationScheme(
        targets=["re:.*int8_asymmetric$"], weights=weights, input_activations=inputs
    )


def compressed(layer: nn.Linear, found: QuantizationScheme) -> dict[str, Tensor]:
    args = found.weights
    held = {"weight": layer.weight.detach()}
    low, high = ranges(held["weight"], args)
    outer = None
    if args.strategy == "tensor_group":
        outer = generate_gparam(held["weight"].min(), held["weight"].max())
        held["weight_global_scale"] = outer
    scale, zero = calculate_qparams(low, high, args, global_scale=outer)
    held |= {"weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(found.format)
    return compressor.compress(held, found)


def ranges(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Least and largest value of every cell that has a scale."""
    n, k = weight.shape
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args.strategy == "block":
        rows, columns = args.block_structure
        grown = nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
        cells = grown.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        return cells.amin((1, 3)), cells.amax((1, 3))
    width = k if args.strategy == "channel" else args.group_size
    cells = weight.reshape(n, -1, width)
    return cells.amin(2), cells.amax(2)


def inputs(found: QuantizationScheme) -> dict[str, Tensor]:
    """The static scales of inputs between -3 and 5, as the owner's observers compute them."""
    args = found.input_activations
    if args is None or args.dynamic is True:
        return {}
    low, high = torch.tensor([-3.0]), torch.tensor([5.0])
    if args.dynamic == "local":
        return {"input_global_scale": generate_gparam(low, high)}
    scale, zero = calculate_qparams(low, high, args)
    return {"input_scale": scale} | ({} if args.symmetric else {"input_zero_point": zero})


def main(folder: Path) -> None:
    torch.manual_seed(0)
    schemes = {name: (scheme(preset, name), how) for name, (preset, how) in PRESETS.items()}
    schemes["int8_asymmetric"] = (asymmetric(), None)
    stored: dict[str, Tensor] = {}
    decoded: dict[str, Tensor] = {}
    for name, (found, how) in schemes.items():
        layer = nn.Linear(SHAPE[1], SHAPE[0], dtype=torch.bfloat16)
        found.format = how or infer_module_format(nn.Linear, found)
        held = compressed(layer, found)
        compressor = BaseCompressor.get_value_from_registry(found.format)
        decoded[f"blocks.0.{name}"] = compressor.decompress(dict(held), found)["weight"]
        every = held | inputs(found) | {"bias": layer.bias.detach()}
        stored |= {f"blocks.0.{name}.{leaf}": tensor for leaf, tensor in every.items()}
    stored["blocks.0.plain.weight"] = torch.randn(8, 16, dtype=torch.bfloat16)
    config = QuantizationConfig(
        config_groups={f"group_{i}": each for i, (each, _) in enumerate(schemes.values())},
        format="mixed-precision",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=["blocks.0.plain"],
    )
    folder.mkdir(parents=True, exist_ok=True)
    block = json.dumps(config.model_dump(mode="json"))
    contiguous: dict[str, Any] = {name: each.data.contiguous() for name, each in stored.items()}
    save_file(contiguous, folder / "cases.safetensors", metadata={"quantization_config": block})
    plain = {name: each.data.contiguous() for name, each in decoded.items()}
    save_file(plain, folder / "cases.owner.safetensors")
    told = {
        "script": "tests/oracle/write_compressed_tensors_cases.py",
        "compressed-tensors": version("compressed-tensors"),
    }
    (folder / "provenance.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
