"""Encode smoothed exports of ModelOpt again: `python tests/oracle/smoothed_cases.py CASES`.

CASES is the folder of true files (`cases/modelopt`). ModelOpt smooths with float32 numbers and its
exports keep them in bfloat16, so `unrounded` looks for float32 numbers that round to the ones kept.
Prints, for every layer where such numbers exist, the part of codes and scales that our codecs then
make byte for byte, and names the layers where none exist.
"""

import sys
from pathlib import Path

import torch
from encode_cases import SCALES, planned, recipe, same
from torch import Tensor

from diffquant.encodings import ENCODINGS
from diffquant.encodings._nibbles import pair_table, unpacked
from diffquant.pieces import canonical, dense
from diffquant.plan import LayerPlan, Piece, Plan, Role
from diffquant.tensors import Weights

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from unrounded import GRIDS, RANKS, Export

CASES = (
    "wan/int8_sq wan/int4_awq wan/w4a8_awq wan/nvfp4_awq wan/nvfp4_svdquant flux/nvfp4_svdquant"
).split()


def numbers(piece: Piece, held: dict[Role, Tensor]) -> Tensor:
    """The codes as numbers in their order."""
    codes, columns = held[Role.CODES], len(piece.cols)
    if piece.encoding.name == "int8":
        return codes.float()
    signed = tuple(float(code - 16 * (code > 7)) for code in range(16))
    values = tuple(RANKS.tolist()) if piece.encoding.name == "nvfp4" else signed
    return unpacked(codes, pair_table(values, codes), columns).float()


def export(layer: LayerPlan, base: Plan, originals: Weights, held: dict[Role, Tensor]) -> Export:
    (piece,) = layer.pieces
    smooth = held[Role.SMOOTH]
    weight = dense(base.layer(layer.path), originals)[0].to(smooth.dtype)
    up, down = held.get(Role.LOWRANK_UP), held.get(Role.LOWRANK_DOWN)
    scale = next(held[role] for role in SCALES if role in held).float()
    has_outer = piece.encoding.name == "nvfp4"
    return Export(
        grid=GRIDS[piece.encoding.name],
        weight_NK=weight,
        smooth_K=smooth,
        numbers_NK=numbers(piece, held),
        scale_NG=scale.reshape(len(weight), -1),
        outer=held[Role.TENSOR_SCALE].float() if has_outer else torch.ones(()),
        low_NK=torch.zeros_like(weight) if up is None or down is None else up @ down,
    )


def counted(case: str, root: Path) -> None:
    base, originals = planned(root / case.partition("/")[0] / "bf16")
    plan, weights = planned(root / case)
    totals: dict[str, tuple[int, int]] = {}
    without, smoothed = [], 0
    for layer in plan.quantized:
        (piece,) = layer.pieces
        held = canonical(piece, weights)
        if Role.SMOOTH not in held:
            continue
        smoothed += 1
        one = export(layer, base, originals, held)
        inverse, possible = one.found()
        if not bool(possible.all()):
            without.append(f"{layer.path} ({int((~possible).sum())} of {len(possible)} columns)")
            continue
        encode = ENCODINGS.load(piece.encoding.name).encode
        assert encode is not None
        made = encode(one.smoothed(inverse), piece.encoding, recipe(piece, held))
        for role in (Role.CODES, *SCALES):
            if role in held and role in made:
                equal, total = same(made[role], held[role].to(made[role].dtype))
                before = totals.get(role, (0, 0))
                totals[role] = (before[0] + equal, before[1] + total)
    told = ", ".join(f"{role} {equal} of {total}" for role, (equal, total) in totals.items())
    print(f"{case}: {smoothed - len(without)} of {smoothed} layers: {told}", flush=True)
    for name in without:
        print(f"    none for {name}", flush=True)


def main(root: Path) -> None:
    for case in CASES:
        counted(case, root)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
