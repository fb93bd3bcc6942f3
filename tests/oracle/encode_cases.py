"""Encode ModelOpt's BF16 originals again and count equal bytes: `python tests/oracle/encode_cases.py CASES`.

CASES is the folder of true files (`cases/modelopt`). Every quantized layer of every export that is
made of weights alone is encoded from the base by our codecs. A stored tensor scale is given, because
q, k and v share theirs after calibration; smoothing is divided out in the base's dtype with the
export's own pre_quant_scale. What the low-rank branch of SVDQuant leaves is taken from the stored
branch. Prints the part of codes and of scales that are the same bytes.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from diffquant import headers, planner, settle, sources
from diffquant.encodings import ENCODINGS, Recipe
from diffquant.pieces import canonical, dense
from diffquant.plan import LayerPlan, Piece, Plan, Role
from diffquant.tensors import Weights

CASES = (
    "flux/fp8 flux/nvfp4 flux/ex_nvfp4_mha flux/nvfp4_svdquant wan/fp8 wan/fp8_pc_pt "
    "wan/fp8_2d_blockwise wan/nvfp4 wan/w4a16_nvfp4 wan/mixed wan/mxfp8 wan/int8_wo wan/int8_sq "
    "wan/nvfp4_awq wan/nvfp4_svdquant"
).split()
SCALES = (Role.BLOCK_SCALE, Role.CHANNEL_SCALE)


def planned(folder: Path) -> tuple[Plan, Weights]:
    checkpoint = sources.checkpoint(str(folder))
    plan = planner.plan(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)
    return settle.settle(plan), Weights(checkpoint.files)


def recipe(piece: Piece, held: dict[Role, Tensor]) -> Recipe:
    if Role.BLOCK_SCALE not in held:
        grain = "channel" if Role.CHANNEL_SCALE in held else "tensor"
        return Recipe(granularity=grain, scale=held.get(Role.TENSOR_SCALE))  # type: ignore[arg-type]
    if len(held[Role.BLOCK_SCALE]) != len(held[Role.CODES]):
        return Recipe(granularity="block", group=128)
    group = len(piece.cols) // held[Role.BLOCK_SCALE].shape[-1]
    # The tensor scale of W4A8 is that of the decoded weight in FP8.
    outer = held.get(Role.TENSOR_SCALE) if piece.encoding.name == "nvfp4" else None
    return Recipe(granularity="group", group=group, scale=outer)


def original(layer: LayerPlan, weights: Weights, held: dict[Role, Tensor], wide: bool) -> Tensor:
    """What ModelOpt encoded: the weight, smoothed, less the low-rank branch."""
    weight = dense(layer, weights)[0].to(torch.bfloat16)
    if Role.SMOOTH in held:
        weight = (weight.float() / held[Role.SMOOTH].float()).to(weight.dtype)
    if Role.LOWRANK_UP in held:
        low = held[Role.LOWRANK_UP].float() @ held[Role.LOWRANK_DOWN].float()
        weight = (weight.float() - low).to(weight.dtype)
    return weight.float() if wide else weight


def same(made: Tensor, stored: Tensor) -> tuple[int, int]:
    one, other = (each.contiguous().reshape(-1).view(torch.uint8) for each in (made, stored))
    return int((one == other).sum()), one.numel()


def counted(folder: Path, base: Plan, originals: Weights, wide: bool) -> dict[str, tuple[int, int]]:
    """Role -> bytes that are equal, bytes there are."""
    plan, weights = planned(folder)
    found: dict[str, tuple[int, int]] = {}
    for layer in plan.quantized:
        (piece,) = layer.pieces
        held = canonical(piece, weights)
        encode = ENCODINGS.load(piece.encoding.name).encode
        assert encode is not None
        truth = original(base.layer(layer.path), originals, held, wide)
        made = encode(truth, piece.encoding, recipe(piece, held))
        for role in (Role.CODES, *SCALES):
            if role in held and role in made:
                equal, total = same(made[role], held[role].to(made[role].dtype))
                one, all_ = found.get(role, (0, 0))
                found[role] = (one + equal, all_ + total)
    return found


def main(root: Path) -> None:
    for case in CASES:
        base, originals = planned(root / case.partition("/")[0] / "bf16")
        for name, wide in (("bf16", False), ("f32", True)):
            found = counted(root / case, base, originals, wide)
            told = ", ".join(f"{role} {one / total:.4%}" for role, (one, total) in found.items())
            print(f"{case} divided in {name}: {told}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
