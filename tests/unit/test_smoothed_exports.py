"""Exports of ModelOpt that are smoothed, from the weight they came from: byte for byte.

An export keeps its float32 smoothing in bfloat16; what `unrounded` finds again makes every byte.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffquant.encodings import ENCODINGS, Recipe
from diffquant.plan import Encoding, Role
from tests.unrounded import GRIDS, RANKS, Export

DATA = Path(__file__).resolve().parents[1] / "data" / "modelopt"
LAYER = "blocks.0.attn1.to_out.0"
FILE = "diffusion_pytorch_model.safetensors"
CASES = ["int8_sq", "nvfp4_awq", "nvfp4_svdquant"]


def stored(case: str) -> dict[str, Tensor]:
    whole = load_file(DATA / "layers" / case / FILE)
    return {name.removeprefix(f"{LAYER}."): tensor for name, tensor in whole.items()}


def export(held: dict[str, Tensor], weight_NK: Tensor) -> Export:
    codes = held["weight"]
    low, high = (RANKS[(codes.view(torch.uint8) >> shift & 15).long()] for shift in (0, 4))
    is_int8 = codes.dtype == torch.int8
    down, up = held.get("svdquant_lora_a"), held.get("svdquant_lora_b")
    return Export(
        grid=GRIDS["int8" if is_int8 else "nvfp4"],
        weight_NK=weight_NK,
        smooth_K=held["pre_quant_scale"],
        numbers_NK=codes.float() if is_int8 else torch.stack([low, high], -1).flatten(1),
        scale_NG=held["weight_scale"].float().reshape(len(weight_NK), -1),
        outer=held.get("weight_scale_2", torch.ones(())),
        low_NK=torch.zeros_like(weight_NK) if up is None or down is None else up @ down,
    )


def encoded(case: str, weight_NK: Tensor, held: dict[str, Tensor]) -> list[Tensor]:
    name = case.partition("_")[0]
    grain = "channel" if name == "int8" else "group"
    recipe = Recipe(granularity=grain, scale=held.get("weight_scale_2"))  # type: ignore[arg-type]
    encode = ENCODINGS.load(name).encode
    assert encode is not None
    made = encode(weight_NK, Encoding(name), recipe)
    scale = made.get(Role.BLOCK_SCALE, made.get(Role.CHANNEL_SCALE))
    assert scale is not None
    return [made[Role.CODES], scale]


def different(case: str, weight_NK: Tensor, held: dict[str, Tensor]) -> int:
    made = encoded(case, weight_NK, held)
    pairs = zip(made, (held["weight"], held["weight_scale"]), strict=True)
    return sum(int((one.float() != other.float()).sum()) for one, other in pairs)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return load_file(DATA / "wan" / "bf16" / FILE)[f"{LAYER}.weight"]


@pytest.mark.parametrize("case", CASES)
def test_smoothing_that_rounds_to_the_stored_one_makes_every_byte(
    case: str, weight: Tensor
) -> None:
    held = stored(case)
    one = export(held, weight)
    inverse, possible = one.found()
    assert bool(possible.all())
    assert different(case, one.smoothed(inverse), held) == 0
    assert torch.equal((1 / inverse).to(torch.bfloat16), held["pre_quant_scale"])


@pytest.mark.parametrize("case", CASES)
def test_the_stored_smoothing_itself_makes_other_bytes(case: str, weight: Tensor) -> None:
    held = stored(case)
    rounded = export(held, weight).smoothed(1 / held["pre_quant_scale"].float())
    assert 20 < different(case, rounded, held) < 0.1 * weight.numel()


def test_nothing_is_found_for_another_weight(weight: Tensor) -> None:
    _, possible = export(stored("nvfp4_awq"), weight.roll(1, 0)).found()
    assert not bool(possible.any())
