"""compressed-tensors against its own library, which wrote the cases and decompressed them."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffquant import exporting, headers, planner, sources
from diffquant.activations import quantized
from diffquant.errors import FormatError, PlanError
from diffquant.families import Inventory
from diffquant.formats import FORMATS
from diffquant.layouts import LAYOUTS
from diffquant.online import Online, requantized
from diffquant.pieces import canonical, decoded
from diffquant.plan import ROW_MAJOR, Activation, Encoding, LayerPlan, Piece, Plan, Role
from diffquant.planner import Draft
from diffquant.sources import Checkpoint
from diffquant.tensors import Weights

CASES = Path(__file__).resolve().parents[1] / "data" / "compressed_tensors" / "cases.safetensors"
OWNER = load_file(CASES.with_suffix(".owner.safetensors"))
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}


@cache
def plan() -> Plan:
    checkpoint = sources.checkpoint(str(CASES))
    header = headers.read(checkpoint.files)
    assert planner.identify(checkpoint, header)[0] == "compressed_tensors"
    return planner.plan(checkpoint, header, config={})


def piece_of(layer: str) -> Piece:
    (piece,) = plan().layer(f"blocks.0.{layer}").pieces
    return piece


def weight(piece: Piece, stored: Path = CASES) -> Tensor:
    return decoded(piece, canonical(piece, Weights([stored])))


def drafted(
    folder: Path, tensors: dict[str, Tensor], weights: dict[str, Any] | None = None, **block: Any
) -> Draft:
    """The draft of layers a, b … of 8 x 64, of the one group `weights` unless `block` has others."""
    path = folder / "model.safetensors"
    save_file(tensors, path)
    group = {"targets": ["Linear"], "weights": weights or FP8, "input_activations": None}
    told = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **block}
    config = {"quantization_config": told}
    source = Checkpoint(origin="a model", root=folder, files=(path,), config=config)
    names = sorted({name.rpartition(".")[0] for name in tensors if ".weight" in name})
    inventory = Inventory(shapes={f"{n}.weight": (8, 64) for n in names}, linears=frozenset(names))
    return planner.draft(source, headers.read([path]), config={}, inventory=inventory)


def fp8_layer(name: str = "a") -> dict[str, Tensor]:
    codes = torch.linspace(-3, 3, 512).view(8, 64).to(torch.float8_e4m3fn)
    return {f"{name}.weight": codes, f"{name}.weight_scale": torch.tensor([0.5])}


def int4_layer(**more: Tensor) -> dict[str, Tensor]:
    """Row n, column k holds (n + k) % 16 - 8, in two groups of scales 1 and 2."""
    numbers = (torch.arange(8)[:, None] + torch.arange(64)) % 16
    words = (numbers.view(8, 8, 8) << torch.arange(0, 32, 4)).sum(2)
    held = {
        "a.weight_packed": words.to(torch.int32),
        "a.weight_scale": torch.tensor([[1.0, 2.0]]).repeat(8, 1),
        "a.weight_shape": torch.tensor([8, 64]),
    }
    return held | {f"a.{ending}": tensor for ending, tensor in more.items()}


@pytest.mark.parametrize("layer", sorted(OWNER))
def test_a_layer_decodes_to_what_its_owner_decompresses_it_to(layer: str) -> None:
    (piece,) = plan().layer(layer).pieces
    assert torch.equal(weight(piece).to(OWNER[layer].dtype), OWNER[layer])


@pytest.mark.parametrize("layer", ["int4", "int8_packed", "int4_asymmetric", "nvfp4"])
def test_a_wrong_order_or_direction_would_not(layer: str) -> None:
    piece = piece_of(layer)
    if layer == "nvfp4":
        wrong = replace(piece, encoding=Encoding("nvfp4"))
    else:
        signed = (
            replace(part, layout=replace(part.layout, options=part.layout.options[:2]))
            for part in piece.parts
        )
        wrong = replace(piece, parts=tuple(signed))
    assert not torch.allclose(weight(wrong), weight(piece), rtol=0.1)


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        ("fp8_tensor", "fp8:tensor:static"),
        ("fp8_channel", "fp8:token:dynamic"),
        ("fp8_block", "fp8:group32:dynamic"),
        ("int8", "int8:token:dynamic"),
        ("int8_asymmetric", "int8:tensor:static:asymmetric"),
        ("int4_bytes", "int8:token:dynamic"),
        ("int4_fp8", "fp8:token:dynamic"),
        ("nvfp4", "nvfp4;tensor_scale=divide:group16:static"),
        ("mxfp4", "mxfp4:group32:dynamic"),
        ("mxfp8", "mxfp8:group32:dynamic"),
        ("mxfp8_weights", "None"),
        ("int4", "None"),
    ],
)
def test_inputs_become_what_the_group_says(layer: str, inputs: str) -> None:
    assert str(piece_of(layer).activation) == inputs


def test_an_inverse_input_scale_rounds_inputs_like_the_scale_itself() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    inverse = Activation(
        number="nvfp4;tensor_scale=divide", granularity="group", group=16, mode="static"
    )
    plain = replace(inverse, number="nvfp4")
    wanted = quantized(x, plain, {Role.INPUT_SCALE: torch.tensor(1 / 512)})
    assert torch.equal(quantized(x, inverse, {Role.INPUT_SCALE: torch.tensor(512.0)}), wanted)
    wrong = quantized(x, inverse, {Role.INPUT_SCALE: torch.tensor(1 / 512)})
    assert not torch.allclose(wrong, wanted)


def test_columns_out_of_order_find_their_group(tmp_path: Path) -> None:
    order = torch.arange(64, dtype=torch.int32) % 2
    stored = int4_layer(weight_g_idx=order)
    (layer,) = drafted(tmp_path, stored, INT4).plan.layers
    numbers = (torch.arange(8)[:, None] + torch.arange(64)) % 16 - 8
    found = weight(layer.pieces[0], tmp_path / "model.safetensors")
    assert torch.equal(found, numbers * torch.where(order == 1, 2.0, 1.0))
    in_order = drafted(tmp_path, int4_layer(), INT4).plan.layers[0].pieces[0]
    assert not torch.equal(weight(in_order, tmp_path / "model.safetensors"), found)


def test_an_order_that_was_never_set_is_none(tmp_path: Path) -> None:
    index = torch.full((64,), -1, dtype=torch.int32)
    drawn = drafted(tmp_path, int4_layer(weight_g_idx=index), INT4)
    assert Role.GROUP_INDEX not in drawn.plan.layers[0].pieces[0].roles
    assert "columns are in order" in " ".join(drawn.plan.unused.values())


def test_k_is_what_the_stored_shape_says_not_what_fills_the_words(tmp_path: Path) -> None:
    stored = int4_layer() | {"a.weight_shape": torch.tensor([8, 60])}
    drawn = drafted(tmp_path, stored, INT4 | {"group_size": 30})
    assert "stores K 60" in str(drawn.problems)


@pytest.mark.parametrize(
    ("targets", "group"),
    [
        ((["Linear"], ["re:.*b$"]), "group_0"),
        ((["re:^b"], ["a"]), "group_1"),
        ((["a", "re:nothing"], ["Linear"]), "group_0"),
    ],
)
def test_names_come_before_expressions_and_those_before_classes(
    tmp_path: Path, targets: tuple[list[str], list[str]], group: str
) -> None:
    groups = {
        f"group_{index}": {"targets": each, "weights": FP8, "input_activations": None}
        for index, each in enumerate(targets)
    }
    drawn = drafted(tmp_path, fp8_layer(), config_groups=groups, ignore=["a"])
    assert drawn.plan.layers[0].why.endswith(group)


def test_a_layer_that_no_target_hits_is_an_error(tmp_path: Path) -> None:
    groups = {name: {"targets": [name], "weights": FP8} for name in ("c", "d")}
    with pytest.raises(FormatError, match="'a' is stored quantized, and no target"):
        drafted(tmp_path, fp8_layer(), config_groups=groups)


def test_a_static_layer_without_its_scale_is_dynamic_and_said_so(tmp_path: Path) -> None:
    group = {"targets": ["Linear"], "weights": FP8, "input_activations": FP8}
    stored = fp8_layer("a") | fp8_layer("b") | {"b.input_scale": torch.tensor([0.25])}
    found = drafted(tmp_path, stored, config_groups={"group_0": group}).plan
    modes = [str(layer.pieces[0].activation) for layer in found.layers]
    assert modes == ["fp8:tensor:dynamic", "fp8:tensor:static"]
    assert "1 layers lack input_scale" in found.notes[0]


def test_scales_beside_a_weight_that_was_never_compressed_are_left_alone(tmp_path: Path) -> None:
    stored = fp8_layer("b") | {
        "a.weight": torch.ones(8, 64, dtype=torch.bfloat16),
        "a.weight_scale": torch.tensor([0.5]),
        "b.weight_zero_point": torch.zeros(1, dtype=torch.int8),
        "attn.k_scale": torch.ones(1),
    }
    drawn = drafted(tmp_path, stored)
    assert not drawn.problems
    reasons = {ref.name: why for ref, why in drawn.plan.unused.items()}
    assert reasons.keys() == {"a.weight_scale", "b.weight_zero_point", "attn.k_scale"}


@pytest.mark.parametrize(
    ("block", "weights", "said"),
    [
        ({"format": "marlin-24"}, FP8, "stores marlin-24"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, FP8, "stores sparse-24-bitmask"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, FP8, "transforms inputs"),
        ({"config_groups": [1]}, FP8, "an object was needed"),
        ({"config_groups": {"g": {"targets": ["re:("], "weights": FP8}}}, FP8, "target 're:"),
        ({}, FP8 | {"strategy": "channel"}, r"one scale per channel of \[8, 64\] are 8"),
        ({}, FP8 | {"strategy": "attn_head"}, "per attn_head"),
        ({}, FP8 | {"num_bits": "8"}, "num_bits '8'"),
        ({}, FP8 | {"block_structure": "0x0"}, "as block_structure"),
    ],
)
def test_what_is_not_understood_is_refused(
    tmp_path: Path, block: dict[str, Any], weights: dict[str, Any], said: str
) -> None:
    with pytest.raises(FormatError, match=said):
        drafted(tmp_path, fp8_layer(), weights, **block)


def test_three_bit_integers_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds 3-bit integers"):
        drafted(tmp_path, int4_layer(), INT4 | {"num_bits": 3})


def test_words_of_another_length_are_refused() -> None:
    words = torch.zeros(8, 7, dtype=torch.int32)
    with pytest.raises(PlanError, match=r"is \[8, 8\] words"):
        LAYOUTS.load("words").undo(words, Role.CODES, (8, 64), ())


# the way out -------------------------------------------------------------------------------------


def block(found: Plan) -> dict[str, Any]:
    writer = FORMATS.load("compressed_tensors").write
    assert writer is not None
    config = writer(found).config
    assert config is not None
    return json.loads(json.dumps(config["quantization_config"]))


def bare(arguments: dict[str, Any] | None) -> dict[str, Any] | None:
    """Without what the owner leaves to defaults."""
    skipped = ("observer", "scale_dtype")
    return arguments and {k: v for k, v in arguments.items() if v is not None and k not in skipped}


def test_what_is_written_says_what_the_owner_said() -> None:
    owners = json.loads(headers.read([CASES]).metadata["quantization_config"])
    ours = block(plan())
    assert ours["format"] == owners["format"] and ours["ignore"] == owners["ignore"]
    said = {name: group for group in ours["config_groups"].values() for name in group["targets"]}
    for group in owners["config_groups"].values():
        (target,) = group["targets"]
        mine = said[target.replace("re:.*", "blocks.0.").rstrip("$")]
        for side in ("weights", "input_activations"):
            wanted = bare(group[side])
            if wanted and "int4_bytes" in target and side == "weights":
                wanted["num_bits"] = 8  # four bits in a byte are read, and written, as a byte
            assert bare(mine[side]) == wanted, target


def test_one_kind_of_layer_targets_every_linear(tmp_path: Path) -> None:
    dense = {"b.weight": torch.ones(8, 64, dtype=torch.bfloat16)}
    said = block(drafted(tmp_path, fp8_layer() | dense).plan)
    assert said["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert (said["format"], said["ignore"]) == ("naive-quantized", ["b"])


@pytest.mark.parametrize("scheme", ["fp8", "fp8_tensor", "fp8_block", "int8", "int4_32", "mxfp4"])
def test_what_is_quantized_while_loading_can_be_written(scheme: str, tmp_path: Path) -> None:
    stored = {"a.weight": torch.randn(128, 128), "b.weight": torch.randn(8, 64)}
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    save_file(stored, tmp_path / "model.safetensors")
    source = sources.checkpoint(str(tmp_path / "model.safetensors"))
    inventory = Inventory(shapes=shapes, linears=frozenset("ab"))
    plain = planner.plan(source, headers.read(source.files), config={}, inventory=inventory)
    prepared = exporting.prepare(requantized(plain, Online(scheme=scheme)), "compressed_tensors")
    assert not prepared.losses
    assert [str(layer.pieces[0].encoding) for layer in prepared.plan.layers]


def ragged(layer: LayerPlan) -> LayerPlan:
    (piece,) = layer.pieces
    parts = tuple(replace(part, layout=ROW_MAJOR) for part in piece.parts)
    cols = replace(piece.cols, stop=piece.cols.stop - 8)
    return replace(layer, pieces=(replace(piece, parts=parts, cols=cols),))


def test_groups_that_end_early_and_scales_that_multiply_are_refused() -> None:
    layer = plan().layer("blocks.0.mxfp8")
    with pytest.raises(FormatError, match="needs whole groups of 32"):
        block(replace(plan(), layers=(ragged(layer),), plain=()))
    (piece,) = plan().layer("blocks.0.nvfp4").pieces
    multiplies = replace(layer, pieces=(replace(piece, encoding=Encoding("nvfp4")),))
    with pytest.raises(FormatError, match="stores its inverse, which no float32 is exactly"):
        block(replace(plan(), layers=(multiplies,), plain=()))
