"""Faithful numerics against ModelOpt's own fake-quantized outputs, case by case.

    python tests/oracle/faithful_cases.py CASES

CASES holds <family>/<scheme> exports, <family>/inputs.safetensors and, beside each export,
<scheme>.fakequant_output.safetensors. Prints the relative error of both seeds together and of the
worse one, beside the figure an independent reader reached.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from diffquant import device, headers, planner, sources
from diffquant.kernels import choose
from diffquant.materialize import materialize

FIGURES = {
    "flux/fp8": 0.019, "flux/nvfp4": 0.009, "flux/nvfp4_svdquant": 0.012,
    "flux/ex_nvfp4_mha": 0.014, "wan/mixed": 0.001, "wan/w4a16_nvfp4": 0.007, "wan/fp8": 0.009,
    "wan/ex_fp8": 0.004, "wan/fp8_pc_pt": 0.012, "wan/fp8_2d_blockwise": 0.006,
    "wan/int8_sq": 0.006, "wan/int8_wo": 0.004, "wan/ex_int8": 0.009, "wan/nvfp4": 0.025,
    "wan/nvfp4_awq": 0.046, "wan/nvfp4_svdquant": 0.038, "wan/ex_nvfp4_svdquant": 0.028,
    "wan/int4_awq": 0.026, "wan/w4a8_awq": 0.054,
}  # fmt: skip


def transformer(case: Path) -> torch.nn.Module:
    found = sources.checkpoint(str(case))
    plan = planner.plan(found, headers.read(found.files), config=found.config)
    cpu = device.parse("cpu")
    choices = [choose(layer, cpu, numerics="faithful") for layer in plan.layers]
    return materialize(plan, choices, device=torch.device("cpu"), dtype=torch.bfloat16)


def errors(case: Path) -> list[tuple[float, float]]:
    """Squared norm of difference and of reference, per seed."""
    inputs = load_file(case.parent / "inputs.safetensors")
    wanted = load_file(case.with_name(case.name + ".fakequant_output.safetensors"))
    model = transformer(case)
    found = []
    for seed in ("seed0", "seed1"):
        given = {
            name.split(".", 1)[1]: value for name, value in inputs.items() if name.startswith(seed)
        }
        with torch.no_grad():
            ours = model(**given, return_dict=False)[0].float()
        theirs = next(value for name, value in wanted.items() if seed in name).float()
        found.append((float((ours - theirs).square().sum()), float(theirs.square().sum())))
    return found


def main(cases: Path) -> None:
    for name, figure in FIGURES.items():
        seeds = errors(cases / name)
        worst = max((off / size) ** 0.5 for off, size in seeds)
        both = (sum(off for off, _ in seeds) / sum(size for _, size in seeds)) ** 0.5
        print(f"{name:24} both {both:.4f}  worst {worst:.4f}  figure {figure:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
