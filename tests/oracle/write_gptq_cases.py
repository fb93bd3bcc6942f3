"""Writes tests/data/gptq, awq and auto_round: weights packed by the modules of each of their owners.

Run where the owners lie unpacked (they were: auto-gptq 0.7.1, autoawq 0.2.9, auto-round 0.16.1), for their
packages import kernels that a CPU has not:

    pip download --no-deps auto-gptq==0.7.1 autoawq==0.2.9 auto-round==0.16.1
    python tests/oracle/write_gptq_cases.py tests/data UNPACKED

An answer is what the owner's module makes of the identity in float32: its weight, transposed.
"""

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import tiny_flux
import torch
from torch import Tensor, nn

#: Distribution and folder below UNPACKED -> packages whose __init__ is not run.
GPTQ = ("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear")
AWQ = ("awq", "awq.modules", "awq.modules.linear", "awq.utils")
ROUND = ("auto_round", "auto_round.utils", "auto_round_extension", "auto_round_extension.torch")


def bare(folder: Path, packages: tuple[str, ...]) -> None:
    for name in packages:
        module = types.ModuleType(name)
        module.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = module


def owner(name: str) -> Any:
    return importlib.import_module(name)


def grid(weight: Tensor, bits: int, groups: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points [N, G] of columns in these groups, as min and max give them."""
    scales, zeros = [], []
    for group in range(int(groups.max()) + 1):
        part = weight[:, groups == group].float()
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scale = (high - low) / (2**bits - 1)
        zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round()
        # One less is stored, and there is nothing below 0.
        scales.append(scale)
        zeros.append(zero.clamp(1, 2**bits - 1))
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def weight_of(module: nn.Module, k: int) -> Tensor:
    module.scales, module.bias = module.scales.float(), None
    return module(torch.eye(k)).t().contiguous()


def held(path: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{path}.{key}": value.clone() for key, value in module.state_dict().items()}


def gptq(
    path: str,
    linear: nn.Linear,
    bits: int,
    group: int,
    *,
    ordered: bool = True,
    symmetric: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    n, k = linear.weight.shape
    groups = torch.arange(k) // (group if group > 0 else k)
    if not ordered:
        groups = groups[torch.randperm(k)]
    scales, zeros = grid(linear.weight.detach(), bits, groups, symmetric)
    made = owner("auto_gptq.nn_modules.qlinear.qlinear_cuda").QuantLinear(bits, group, k, n, True)
    made.pack(linear.half(), scales.half().float(), zeros, groups.int())
    return held(path, made), weight_of(made, k)


def auto_round(path: str, linear: nn.Linear, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    n, k = linear.weight.shape
    scales, zeros = grid(linear.weight.detach(), 4, torch.arange(k) // 32, False)
    made = owner(f"auto_round_extension.torch.{kind}").QuantLinear(4, 32, k, n, True)
    made.device = "cpu"  # its exporter sets it
    made.pack(linear.float(), scales.half().float(), zeros, None, "cpu")
    return held(path, made), weight_of(made, k)


def awq(path: str, linear: nn.Linear) -> tuple[dict[str, Tensor], Tensor]:
    n, k = linear.weight.shape
    scales, zeros = grid(linear.weight.detach(), 4, torch.arange(k) // 64, False)
    kind = owner("awq.modules.linear.gemm").WQLinear_GEMM
    made = kind.from_linear(linear.half(), 4, 64, False, scales.half().t(), zeros.t())
    unpack = owner("awq.utils.packing_utils").dequantize_gemm
    weight = unpack(made.qweight, made.qzeros, made.scales.float(), 4, 64)
    return held(path, made), weight.t().contiguous()


def lone(path: Path, layers: dict[str, tuple[dict[str, Tensor], Tensor]], **told: Any) -> None:
    stored = {name: each for tensors, _ in layers.values() for name, each in tensors.items()}
    decoded = {layer: weight for layer, (_, weight) in layers.items()}
    tiny_flux.save_layers(path, stored, decoded, quantization_config=json.dumps(told))


def write_gptq(root: Path) -> None:
    transformer = tiny_flux.model(num_attention_heads=4)
    stored: dict[str, Tensor] = {}
    decoded: dict[str, Tensor] = {}
    for path, linear in tiny_flux.block_linears(transformer).items():
        tensors, decoded[path] = gptq(path, linear, 4, 32, symmetric=True)
        stored |= tensors
    told = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    tiny_flux.save(root / "flux", transformer, stored, decoded, quantization=told)
    linear = nn.Linear(96, 32)
    mixed = {
        "blocks.0.reordered": gptq("blocks.0.reordered", linear, 4, 32, ordered=False),
        "blocks.0.int8": gptq("blocks.0.int8", linear, 8, 32),
        "blocks.0.int4": gptq("blocks.0.int4", linear, 4, 32),
    }
    told = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
    lone(root / "cases.safetensors", mixed, **told)
    rows = {"blocks.0.rows": gptq("blocks.0.rows", linear, 4, -1)}
    lone(root / "rows.safetensors", rows, quant_method="gptq", bits=4, group_size=-1)


def main(root: Path, unpacked: Path) -> None:
    for folder, packages in (("auto_gptq", GPTQ), ("autoawq", AWQ), ("auto_round", ROUND)):
        bare(unpacked / folder, packages)
    # What its packing would ask the other packages of, on a CPU.
    sys.modules["auto_round.utils"].get_packing_device = lambda device: torch.device("cpu")
    torch.manual_seed(0)
    write_gptq(root / "gptq")
    tiny_flux.provenance(root / "gptq", Path(__file__).name, **{"auto-gptq": "0.7.1"})
    linear = nn.Linear(128, 32)
    lone(
        root / "awq" / "cases.safetensors",
        {"blocks.0.a": awq("blocks.0.a", linear)},
        quant_method="awq",
        bits=4,
        group_size=64,
        version="gemm",
        zero_point=True,
    )
    tiny_flux.provenance(root / "awq", Path(__file__).name, autoawq="0.2.9")
    linear = nn.Linear(64, 32)
    for name, kind in (("auto_gptq", "qlinear_torch_zp"), ("gptqmodel", "qlinear_torch")):
        lone(
            root / "auto_round" / f"{name}.safetensors",
            {"blocks.0.a": auto_round("blocks.0.a", linear, kind)},
            quant_method="auto-round",
            bits=4,
            group_size=32,
            sym=False,
            data_type="int",
            packing_format=f"auto_round:{name}",
        )
    tiny_flux.provenance(root / "auto_round", Path(__file__).name, **{"auto-round": "0.16.1"})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
