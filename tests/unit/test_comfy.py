"""Comfy files written by comfy-kitchen itself (tests/oracle/write_comfy_cases.py), and what it makes
of them. Old and header-only markers have no writer here: those files are spelled out, from the
description in formats_and_peers.md, B1 and B4."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffquant import headers, planner
from diffquant.errors import FormatError
from diffquant.families import Inventory
from diffquant.pieces import dense
from diffquant.plan import ROW_MAJOR, LayerPlan, Layout, Plan, Role
from diffquant.planner import Draft
from diffquant.sources import Checkpoint
from diffquant.tensors import Weights

CASES = Path(__file__).parents[1] / "data" / "comfy"
LAYER = "blocks.0.attn"
#: The owner multiplies the two scales of nvfp4 first, and reads SVDQuant's weight off a product.
ROUNDED = {"nvfp4", "nvfp4_padded", "nvfp4_full_precision", "svdquant_w4a4"}
NAMES = sorted(
    path.stem for path in CASES.glob("*.safetensors") if not path.stem.endswith(".owner")
)


def drafted(path: Path, owner: dict[str, Tensor] | None = None) -> Draft:
    """The draft of one file, as the module it was made from where the owner tells its shape."""
    source = Checkpoint(origin=path.name, root=path.parent, files=(path,))
    header = headers.read(source.files)
    inventory = None
    if owner is not None:
        made_from = owner.get(f"{LAYER}.original", owner[f"{LAYER}.decoded"])
        shapes = {f"{LAYER}.weight": tuple(made_from.shape)}
        if any(name.endswith(".bias") for name in header.tensors):
            shapes[f"{LAYER}.bias"] = shapes[f"{LAYER}.weight"][:1]
        inventory = Inventory(shapes=shapes, linears=frozenset({LAYER}))
    return planner.draft(source, header, config={}, inventory=inventory)


def case(name: str) -> tuple[Plan, Tensor]:
    """A case's plan and the owner's weight, padding cut off."""
    owner = load_file(CASES / f"{name}.owner.safetensors")
    drawn = drafted(CASES / f"{name}.safetensors", owner)
    assert not drawn.problems
    n, k = drawn.plan.layers[0].shape_NK
    return drawn.plan, owner[f"{LAYER}.decoded"][:n, :k]


def weight(plan: Plan, layer: LayerPlan | None = None) -> Tensor:
    return dense(layer or plan.layers[0], Weights([Path(file.path) for file in plan.files]))[0]


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def relaid(plan: Plan, role: Role, layout: Layout) -> LayerPlan:
    """The layer read with another layout of one part."""
    layer = plan.layers[0]
    parts = tuple(
        replace(part, layout=layout) if part.role is role else part
        for part in layer.pieces[0].parts
    )
    return replace(layer, pieces=(replace(layer.pieces[0], parts=parts),))


def written(
    folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> Path:
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata)
    return path


def marker(**options: object) -> Tensor:
    return torch.tensor(list(json.dumps(options).encode()), dtype=torch.uint8)


def fp8(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("name", NAMES)
def test_weight_is_the_owners_own(name: str) -> None:
    plan, owner = case(name)
    assert plan.format == "comfy"
    if name in ROUNDED:
        assert distance(weight(plan), owner) < 1e-7
    else:
        assert torch.equal(weight(plan), owner)


@pytest.mark.parametrize("name", NAMES)
def test_weight_is_near_the_one_it_was_made_from(name: str) -> None:
    plan, _ = case(name)
    original = load_file(CASES / f"{name}.owner.safetensors").get(f"{LAYER}.original")
    if original is not None:
        assert distance(weight(plan), original.float()) < 0.12


def test_swapped_nibbles_break_nvfp4() -> None:
    plan, owner = case("nvfp4")
    assert distance(weight(plan, relaid(plan, Role.CODES, ROW_MAJOR)), owner) > 1


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_scales_left_in_tiles_break_the_weight_though_their_shape_fits(name: str) -> None:
    plan, owner = case(name)
    assert distance(weight(plan, relaid(plan, Role.BLOCK_SCALE, ROW_MAJOR)), owner) > 0.05


def test_correction_and_zeros_break_when_their_axes_are_not_exchanged() -> None:
    for name, role in (
        ("asym_w4a8_correction", Role.CORRECTION),
        ("awq_w4a16", Role.ZERO_POINT),
    ):
        plan, owner = case(name)
        assert distance(weight(plan, relaid(plan, role, ROW_MAJOR)), owner) > 0.05


@pytest.mark.parametrize("name", ["int8_convrot", "convrot_w4a4", "asym_w4a8_codebook"])
def test_a_rotated_weight_without_its_rotation_is_another_weight(name: str) -> None:
    plan, owner = case(name)
    layer = plan.layers[0]
    unrotated = replace(layer, pieces=(replace(layer.pieces[0], rotation=None),))
    assert distance(weight(plan, unrotated), owner) > 1


def test_a_scale_that_divides_is_orders_of_magnitude_off(tmp_path: Path) -> None:
    tensors = load_file(CASES / "nvfp4.safetensors")
    (name,) = (name for name in tensors if name.endswith("weight_scale_2"))
    tensors[name] = 1 / tensors[name]
    _, owner = case("nvfp4")
    plan = drafted(written(tmp_path, tensors)).plan
    assert distance(weight(plan), owner) > 1000


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("nvfp4", "weight_scale_2"),
        ("nvfp4", "weight_scale"),
        ("fp8", "weight_scale"),
        ("mxfp8", "weight_scale"),
        ("int8_convrot", "weight_scale"),
        ("asym_w4a8_codebook", "weight_s_channel"),
        ("awq_w4a16", "weight_scale"),
    ],
)
def test_a_lost_scale_is_named_and_never_taken_to_be_one(
    name: str, ending: str, tmp_path: Path
) -> None:
    tensors = load_file(CASES / f"{name}.safetensors")
    kept = {key: value for key, value in tensors.items() if not key.endswith(f".{ending}")}
    (problem,) = drafted(written(tmp_path, kept)).problems
    assert len(kept) == len(tensors) - 1
    assert "without its scale" in problem.what


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("fp8", "fp8:tensor:dynamic"),
        ("nvfp4", "nvfp4:group16:dynamic"),
        ("nvfp4_full_precision", "None"),
        ("mxfp8", "mxfp8:group32:dynamic"),
        ("int8_convrot", "int8:token:dynamic"),
        ("convrot_w4a4", "int4:token:dynamic"),
        ("asym_w4a8_codebook", "int8:token:dynamic"),
        ("awq_w4a16", "None"),
        ("svdquant_w4a4", "int4:group64:dynamic"),
    ],
)
def test_activations_are_the_ones_the_format_stands_for(name: str, activation: str) -> None:
    plan, _ = case(name)
    assert str(plan.layers[0].pieces[0].activation) == activation


def test_an_input_scale_makes_the_activation_static(tmp_path: Path) -> None:
    tensors = load_file(CASES / "nvfp4.safetensors")
    prefix = next(name for name in tensors if name.endswith(".comfy_quant")).rpartition(".")[0]
    tensors[f"{prefix}.input_scale"] = torch.tensor(0.5)
    (piece,) = drafted(written(tmp_path, tensors)).plan.layers[0].pieces
    assert str(piece.activation) == "nvfp4:group16:static"
    assert Role.INPUT_SCALE in piece.roles


def test_full_precision_leaves_the_input_scale_unused(tmp_path: Path) -> None:
    said = marker(format="float8_e4m3fn", full_precision_matrix_mult=True)
    tensors = {
        "a.weight": fp8(4, 8),
        "a.weight_scale": torch.tensor(2.0),
        "a.input_scale": torch.tensor(0.5),
        "a.comfy_quant": said,
    }
    plan = drafted(written(tmp_path, tensors)).plan
    assert plan.layers[0].pieces[0].activation is None
    assert "a.input_scale" in {ref.name for ref in plan.unused}


def test_bytes_that_are_e4m3_scales_are_read_as_such(tmp_path: Path) -> None:
    tensors = load_file(CASES / "nvfp4.safetensors")
    (name,) = (name for name in tensors if name.endswith("weight_scale"))
    tensors[name] = tensors[name].view(torch.uint8)
    assert distance(weight(drafted(written(tmp_path, tensors)).plan), case("nvfp4")[1]) < 1e-7


# old files ---------------------------------------------------------------------------------------


def old(marked: Tensor, **parts: Tensor) -> dict[str, Tensor]:
    """B1: `X.weight`, `X.scale_weight`, optional `X.scale_input`; one global `{prefix}scaled_fp8`."""
    prefix = "model.diffusion_model."
    named = {f"{prefix}a.{name}": part for name, part in parts.items()}
    return {f"{prefix}scaled_fp8": marked, **named}


def test_scaled_fp8_multiplies_by_scale_weight(tmp_path: Path) -> None:
    tensors = old(fp8(1), weight=fp8(4, 8), scale_weight=torch.tensor([2.0]))
    plan = drafted(written(tmp_path, tensors)).plan
    assert torch.equal(weight(plan), torch.full((4, 8), 2.0))
    assert str(plan.layers[0].pieces[0].activation) == "fp8:tensor:dynamic"


@pytest.mark.parametrize(("value", "mode"), [(0.5, "static"), (1.0, "dynamic")])
def test_scale_input_of_one_says_nothing(value: float, mode: str, tmp_path: Path) -> None:
    scale = torch.tensor(2.0)
    tensors = old(fp8(1), weight=fp8(4, 8), scale_weight=scale, scale_input=torch.tensor(value))
    drawn = drafted(written(tmp_path, tensors))
    activation = drawn.plan.layers[0].pieces[0].activation
    assert activation is not None and activation.mode == mode
    assert not drawn.problems


def test_a_marker_of_two_elements_means_weight_only(tmp_path: Path) -> None:
    tensors = old(fp8(2), weight=fp8(4, 8), scale_weight=torch.tensor(2.0))
    assert drafted(written(tmp_path, tensors)).plan.layers[0].pieces[0].activation is None


def test_int8_under_the_fp8_names_is_int8(tmp_path: Path) -> None:
    # B4: LightX2V writes `scale_weight` + `scaled_fp8 = zeros(2, e4m3fn)` even for int8 weights
    codes = torch.full((4, 8), -3, dtype=torch.int8)
    scale = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    plan = drafted(written(tmp_path, old(fp8(2), weight=codes, scale_weight=scale))).plan
    assert plan.layers[0].encodings == ("int8",)
    assert torch.equal(weight(plan), (-3 * scale).expand(4, 8))


# markers in the header, and contradictions -------------------------------------------------------


def said(**layers: object) -> dict[str, str]:
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def test_header_metadata_may_miss_the_prefix_and_give_bare_names(tmp_path: Path) -> None:
    tensors = {
        "model.diffusion_model.a.weight": fp8(4, 8),
        "model.diffusion_model.a.weight_scale": torch.tensor(2.0),
    }
    plan = drafted(written(tmp_path, tensors, said(a="float8_e4m3fn"))).plan
    assert plan.format == "comfy"
    assert torch.equal(weight(plan), torch.full((4, 8), 2.0))


def test_a_global_name_covers_all_layers(tmp_path: Path) -> None:
    tensors = {
        name: part
        for name, part in load_file(CASES / "mxfp8.safetensors").items()
        if not name.endswith("comfy_quant")
    }
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        tensors[name] = tensors[name].view(torch.uint8)
    plan = drafted(written(tmp_path, tensors, {"quant_format": "mxfp8"})).plan
    assert torch.equal(weight(plan), case("mxfp8")[1])


def test_two_places_that_disagree_are_an_error(tmp_path: Path) -> None:
    tensors = {
        "a.weight": fp8(4, 8),
        "a.weight_scale": torch.tensor(2.0),
        "a.comfy_quant": marker(format="float8_e4m3fn"),
    }
    with pytest.raises(FormatError, match="'a' is float8_e4m3fn in .* mxfp8 in"):
        drafted(written(tmp_path, tensors, said(a={"format": "mxfp8"})))


def test_two_places_that_agree_are_not(tmp_path: Path) -> None:
    tensors = {
        "a.weight": fp8(4, 8),
        "a.weight_scale": torch.tensor(2.0),
        "a.comfy_quant": marker(format="float8_e4m3fn"),
    }
    assert not drafted(written(tmp_path, tensors, said(a="float8_e4m3fn"))).problems


def test_a_narrow_weight_without_a_marker_is_named(tmp_path: Path) -> None:
    tensors = load_file(CASES / "int8.safetensors") | {"b.weight": fp8(4, 8)}
    with pytest.raises(FormatError, match="'b.weight' is F8_E4M3 and nothing says how"):
        drafted(written(tmp_path, tensors))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int3_dreams"}, "'int3_dreams' .* not known"),
        ({"format": "float8_e4m3fn", "num_experts": 4}, "4 experts"),
        ({"format": "nvfp4"}, "F8_E4M3, .* says nvfp4"),
        ({"formats": "nvfp4"}, "gives no format"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=message):
        drafted(written(tmp_path, {"a.weight": fp8(4, 8), "a.comfy_quant": marker(**options)}))


def test_six_bit_codes_are_refused(tmp_path: Path) -> None:
    # B1: "6-bit form: row 3K/4"
    tensors = {
        "a.weight": torch.zeros(4, 24, dtype=torch.int8),
        "a.weight_s_rel": fp8(4, 2),
        "a.weight_s_channel": torch.ones(4),
        "a.comfy_quant": marker(format="asym_w4a8_int8", group_size=16, convrot_groupsize=16),
    }
    with pytest.raises(FormatError, match="codes of 6 bits"):
        drafted(written(tmp_path, tensors))


def test_an_attention_marker_is_no_weight(tmp_path: Path) -> None:
    tensors = load_file(CASES / "fp8.safetensors")
    name = "model.diffusion_model.blocks.0.comfy_attention.config"
    tensors[name] = marker(attention="comfy_kitchen_int8")
    drawn = drafted(written(tmp_path, tensors))
    assert not drawn.problems
    assert "attention kernel" in {ref.name: why for ref, why in drawn.plan.unused.items()}[name]
