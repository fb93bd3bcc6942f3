"""BFL's exports have no owner that runs here: bytes are spelled out from the description.

formats_and_peers.md, B2: (b) "even element in high nibble", "swizzled to 128x4 tiles", and (f) "low |
row-major | weight_scale_2 multiply | input_scale". "element (m,k) sits at
((m//128)*(C//4) + k//4)*512 + (m%32)*16 + ((m%128)//32)*4 + k%4".
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffquant import headers, planner
from diffquant.errors import FormatError
from diffquant.families import FAMILIES
from diffquant.pieces import dense
from diffquant.plan import ROW_MAJOR, Layout, Plan, Role
from diffquant.planner import Draft
from diffquant.sources import Checkpoint
from diffquant.tensors import Weights
from tests.published import fused

TINY = {
    "_class_name": "Flux2Transformer2DModel",
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "timestep_guidance_channels": 16,
}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NVFP4 = ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0", "single_blocks.0.linear1")
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")


def drafted(path: Path, config: dict[str, Any] | None = None, **stated: Any) -> Draft:
    source = Checkpoint(origin=path.name, root=path.parent, files=(path,), config=stated)
    return planner.draft(
        source, headers.read(source.files), config=TINY if config is None else config
    )


def packed(codes: Tensor, *, even: str) -> Tensor:
    """Two codes a byte, the even column in the nibble named."""
    first, second = codes[:, 0::2], codes[:, 1::2]
    return first << 4 | second if even == "high" else second << 4 | first


def in_tiles(scales: Tensor) -> Tensor:
    """Element by element, by the formula above."""
    rows, columns = -(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4
    flat = torch.zeros(rows * columns)
    for m in range(scales.shape[0]):
        for k in range(scales.shape[1]):
            place = ((m // 128) * (columns // 4) + k // 4) * 512
            flat[place + (m % 32) * 16 + ((m % 128) // 32) * 4 + k % 4] = scales[m, k]
    return flat.reshape(rows, columns).to(torch.float8_e4m3fn)


def numbers(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Codes [N, K] and block scales [N, K / 16] that differ from place to place."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(-3, 4, (rows, columns // 16), generator=generator)
    return codes, 2.0**exponents


def meant(shape: tuple[int, ...], tensor_scale: float = 0.25) -> Tensor:
    codes, scales = numbers(shape)
    return torch.tensor(E2M1)[codes.long()] * scales.repeat_interleave(16, 1) * tensor_scale


def layer(name: str, shape: tuple[int, ...], *, even: str, tiles: bool) -> dict[str, Tensor]:
    codes, scales = numbers(shape)
    return {
        f"{name}.weight": packed(codes, even=even),
        f"{name}.weight_scale": in_tiles(scales) if tiles else scales.to(torch.float8_e4m3fn),
        f"{name}.weight_scale_2": torch.tensor(0.25),
    }


def flux2(
    folder: Path,
    *,
    metadata: bool = True,
    measured: bool = True,
    extra: dict[str, Tensor] | None = None,
) -> Path:
    """A whole tiny FLUX.2 in BFL's names; three of its layers are nvfp4."""
    family = FAMILIES.load("flux2")
    tensors = {}
    for name, shape in fused(family, "bfl", family.inventory(TINY)).items():
        stem = name.removesuffix(".weight")
        if stem not in NVFP4:
            # Rows tell themselves apart, so that an exchange of halves shows.
            ramp = torch.arange(shape[0]).float().reshape(-1, *(1,) * (len(shape) - 1))
            tensors[name] = ramp.expand(shape).bfloat16().contiguous()
            continue
        tensors |= layer(stem, shape, even="high", tiles=True)
        if measured:
            tensors[f"{stem}.input_scale"] = torch.tensor(0.5)
    said = {"format_version": "1.0", "layers": {name: {"format": "nvfp4"} for name in NVFP4}}
    header = {"_quantization_metadata": json.dumps(said)} if metadata else None
    path = folder / "flux2.safetensors"
    save_file(tensors | (extra or {}), path, header)
    return path


def weight(plan: Plan, path: str) -> Tensor:
    return dense(plan.layer(path), Weights([Path(file.path) for file in plan.files]))[0]


@pytest.mark.parametrize("metadata", [True, False])
def test_fused_rows_of_a_swizzled_weight_go_to_q_k_and_v(metadata: bool, tmp_path: Path) -> None:
    drawn = drafted(flux2(tmp_path, metadata=metadata))
    assert not drawn.problems and drawn.plan.format == "bfl"
    # 64 rows each: a tile has 128, so rows may only be taken once the tiles are undone
    whole = torch.cat([weight(drawn.plan, f"transformer_blocks.0.{part}") for part in QKV])
    assert torch.equal(whole, meant((192, 64)))


def test_the_family_is_known_without_a_config(tmp_path: Path) -> None:
    drawn = drafted(flux2(tmp_path), config={})
    assert drawn.plan.family == "flux2" and not drawn.problems


def test_halves_of_the_last_modulation_are_exchanged(tmp_path: Path) -> None:
    plan = drafted(flux2(tmp_path)).plan
    rows = weight(plan, "norm_out.linear")[:, 0]
    stored = torch.arange(128).float()
    assert torch.equal(rows, torch.cat([stored[64:], stored[:64]]))
    assert not torch.equal(rows, stored)


@pytest.mark.parametrize(("measured", "mode"), [(True, "static"), (False, "dynamic")])
def test_the_mixed_file_quantizes_inputs_dynamically(
    measured: bool, mode: str, tmp_path: Path
) -> None:
    plan = drafted(flux2(tmp_path, measured=measured)).plan
    modes = {layer.pieces[0].activation.mode for layer in plan.quantized}  # type: ignore[union-attr]
    assert modes == {mode}


@pytest.mark.parametrize(
    ("role", "wrong", "least"),
    [
        (Role.CODES, ROW_MAJOR, 1.0),
        (Role.BLOCK_SCALE, Layout("row_major", (("pad", "crop"),)), 0.5),
    ],
)
def test_another_order_of_nibbles_or_scales_is_noise(
    role: Role, wrong: Layout, least: float, tmp_path: Path
) -> None:
    plan = drafted(flux2(tmp_path)).plan
    right = plan.layer("transformer_blocks.0.ff.linear_in")
    parts = tuple(
        replace(part, layout=wrong) if part.role is role else part for part in right.pieces[0].parts
    )
    other = replace(right, pieces=(replace(right.pieces[0], parts=parts),))
    expected = weight(plan, right.path)
    read = dense(other, Weights([Path(file.path) for file in plan.files]))[0]
    assert float((read - expected).norm() / expected.norm()) > least


def test_a_comfy_marker_makes_the_same_names_comfys(tmp_path: Path) -> None:
    text = json.dumps({"format": "nvfp4"}).encode()
    marks = {f"{name}.comfy_quant": torch.tensor(list(text), dtype=torch.uint8) for name in NVFP4}
    drawn = drafted(flux2(tmp_path, extra=marks))
    assert drawn.plan.format == "comfy" and not drawn.problems
    assert torch.equal(weight(drawn.plan, "transformer_blocks.0.attn.to_q"), meant((192, 64))[:64])


def test_a_lost_outer_scale_is_named(tmp_path: Path) -> None:
    path = flux2(tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(path)
    del tensors["single_blocks.0.linear1.weight_scale_2"]
    said = {"layers": {name: {"format": "nvfp4"} for name in NVFP4}}
    save_file(tensors, path, {"_quantization_metadata": json.dumps(said)})
    (problem,) = drafted(path).problems
    assert problem.tensor == "single_blocks.0.linear1.weight"


def test_a_narrow_weight_that_the_header_does_not_name_is_refused(tmp_path: Path) -> None:
    stray = layer("double_blocks.0.txt_attn.proj", (64, 64), even="high", tiles=True)
    with pytest.raises(FormatError, match="txt_attn.proj.weight' is U8 and .* does not name it"):
        drafted(flux2(tmp_path, extra=stray))


# FLUX.3 ------------------------------------------------------------------------------------------


def test_flux3_nvfp4_is_row_major_with_the_even_column_low(tmp_path: Path) -> None:
    path = tmp_path / "flux3.safetensors"
    tensors = layer("blocks.0.attn.out", (128, 64), even="low", tiles=False)
    save_file(tensors, path, {"quantization": "nvfp4"})
    drawn = drafted(path, config={})
    assert drawn.plan.format == "bfl"
    # [128, 4] is a shape that tiles would have too; here the dialect tells
    assert torch.equal(weight(drawn.plan, "blocks.0.attn.out"), meant((128, 64)))


def rowwise(folder: Path, **configs: Any) -> Path:
    """2.2: "format_version 1.1, layers: {prefix: {format: rowwise-float8_e4m3fn | bf16}}"."""
    said = {
        "format_version": "1.1",
        "layers": {
            "blocks.0.a": {"format": "rowwise-float8_e4m3fn"},
            "blocks.0.b": {"format": "bf16"},
        },
        "quant_configs": {"rowwise-float8_e4m3fn": {"scale_recipe": "rowwise"}},
    } | configs
    tensors = {
        "blocks.0.a.weight": torch.ones(4, 8, dtype=torch.float8_e4m3fn),
        "blocks.0.a.weight_scale": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "blocks.0.b.weight": torch.ones(4, 8, dtype=torch.bfloat16),
    }
    path = folder / "rows.safetensors"
    save_file(tensors, path, {"_quantization_metadata": json.dumps(said)})
    return path


def test_rowwise_fp8_multiplies_rows(tmp_path: Path) -> None:
    plan = drafted(rowwise(tmp_path), config={}).plan
    rows = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(weight(plan, "blocks.0.a"), rows[:, None].expand(4, 8))
    assert str(plan.layer("blocks.0.a").pieces[0].activation) == "fp8:token:dynamic"


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ({"format_version": "2.0"}, "format_version '2.0'"),
        ({"quant_configs": {"rowwise-float8_e4m3fn": {"scale_recipe": "tiles"}}}, "'tiles'"),
        (
            {
                "layers": {
                    "blocks.0.a": {"format": "rowwise-float8_e4m3fn"},
                    "c": {"format": "nvfp4"},
                }
            },
            "'c'",
        ),
        (
            {
                "layers": {
                    "blocks.0.a": {"format": "rowwise-float8_e5m2"},
                    "b": "rowwise-float8_e4m3fn",
                }
            },
            "called",
        ),
    ],
)
def test_a_recipe_that_is_not_known_is_refused(
    configs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=message):
        drafted(rowwise(tmp_path, **configs), config={})
