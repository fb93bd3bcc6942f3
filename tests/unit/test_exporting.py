"""Single layers of every packing, layers that are encoded on the way out, and joins that are refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffquant import exporting, headers, online, planner, sources
from diffquant.errors import FormatError
from diffquant.exporting import _arranging
from diffquant.families import Inventory
from diffquant.pieces import canonical
from diffquant.plan import ROW_MAJOR, LayerPlan, Piece, Plan, Question, Role
from diffquant.recode import Encoder
from diffquant.schemes import SCHEMES
from diffquant.sources import Checkpoint
from diffquant.tensors import Weights
from tests.keytables import sparse_checkpoint

DATA = Path(__file__).resolve().parents[1] / "data"
BF16 = DATA / "modelopt" / "flux" / "bf16"
#: A true packed layer -> where such a layer lies.
PACKED = {
    "linear_int4_plain": ("QwenImage", "transformer_blocks.0.attn.to_out.0"),
    "linear_int4_gelu_shifted_unsigned": ("QwenImage", "transformer_blocks.0.img_mlp.net.2"),
    "linear_nvfp4_single_wtscale": ("QwenImage", "transformer_blocks.0.attn.to_out.0"),
}
#: Groups of 256 are wider than any layer of this model.
SAVED = [
    name
    for name in SCHEMES.names()
    if SCHEMES.load(name).saved_as == "modelopt" and SCHEMES.load(name).multiple_of_K <= 128
]


def planned(path: Path) -> Plan:
    checkpoint = sources.checkpoint(str(path))
    return planner.plan(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)


def packed_layer(name: str, folder: Path) -> Plan:
    """The plan of one layer as Nunchaku's own packer stored it."""
    case = DATA / "nunchaku" / f"{name}.safetensors"
    family, path = PACKED[name]
    with safe_open(case, "pt") as opened:
        told = json.loads(opened.metadata()["case"])
    tensors = {
        f"{path}.{key.removeprefix('packed.')}": tensor
        for key, tensor in load_file(case).items()
        if key.startswith("packed.")
    }
    config = {"_class_name": f"{family}Transformer2DModel"}
    file = folder / case.name
    save_file(tensors, file, {"model_class": f"Nunchaku{config['_class_name']}"})
    shapes = {f"{path}.weight": (told["n"], told["k"]), f"{path}.bias": (told["n"],)}
    return planner.plan(
        Checkpoint(origin=name, root=folder, files=(file,)),
        headers.read([file]),
        config=config,
        inventory=Inventory(shapes=shapes, linears=frozenset({path})),
    )


def parts(piece: Piece, plan: Plan) -> dict[Role, bytes]:
    weights = Weights([Path(file.path) for file in plan.files])
    return {role: raw(part) for role, part in canonical(piece, weights).items()}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", PACKED)
def test_a_layer_packed_by_nunchaku_is_packed_again_to_the_same_bytes(
    name: str, tmp_path: Path
) -> None:
    plan = packed_layer(name, tmp_path)
    prepared = exporting.prepare(plan, "nunchaku")
    exporting.save(prepared, tmp_path / "again.safetensors")
    stored = {key.rpartition(".")[2]: raw(t) for key, t in load_file(plan.files[0].path).items()}
    again = load_file(tmp_path / "again.safetensors")
    names = {"lora_down": "proj_down", "lora_up": "proj_up", "smooth": "smooth_factor"}
    made = {key.rpartition(".")[2]: raw(tensor) for key, tensor in again.items()}
    for ending, tensor in stored.items():
        if not ending.endswith("_orig"):
            assert made[names.get(ending, ending)] == tensor, ending


@pytest.mark.parametrize(
    ("table", "class_name"),
    [
        ("zimage_int4_r128", "ZImageTransformer2DModel"),
        ("qwenimage_nvfp4_r32", "QwenImageTransformer2DModel"),
    ],
)
def test_a_model_of_published_size_has_the_published_keys(
    table: str, class_name: str, tmp_path: Path
) -> None:
    file = sparse_checkpoint(table, tmp_path, class_name)
    header = headers.read([file])
    checkpoint = Checkpoint(origin=table, root=tmp_path, files=(file,))
    prepared = exporting.prepare(planner.plan(checkpoint, header, config={}), "nunchaku")
    known = {(name, each.dtype, each.shape) for name, each in header.tensors.items()}
    assert {(each.name, each.dtype, each.shape) for each in prepared.tensors} == known


@pytest.mark.parametrize("scheme", SAVED)
def test_layers_encoded_on_the_way_out_read_back_as_encoded(scheme: str, tmp_path: Path) -> None:
    wish = online.Online(scheme=scheme, quantize_all=True)
    plan = online.requantized(planned(BF16), wish)
    prepared = exporting.prepare(plan, "modelopt")
    exporting.save(prepared, tmp_path / "out")
    back = planned(tmp_path / "out")
    weights = Weights([Path(file.path) for file in plan.files])
    encoder = Encoder(plan, weights)
    assert not prepared.losses
    for layer in plan.layers:
        (piece,), (other,) = layer.pieces, back.layer(layer.path).pieces
        found = parts(other, back)
        for role, made in encoder.parts(piece, canonical(piece, weights)).items():
            assert found[role] == raw(made), (layer.path, role)


def test_siblings_with_low_rank_branches_of_their_own_are_not_one_weight() -> None:
    plan = online.requantized(planned(BF16), online.Online(scheme="svdq_nvfp4"))
    assert exporting.prepare(plan, "nunchaku").total_size
    alone = replace(plan, layers=tuple(map(unfused, plan.layers)))
    with pytest.raises(FormatError, match="of its own"):
        exporting.prepare(alone, "nunchaku")


def unfused(layer: LayerPlan) -> LayerPlan:
    """A layer whose pieces share no low-rank branch with those of others."""
    pieces = (
        replace(it, recode=None if it.recode is None else replace(it.recode, fused=None))
        for it in layer.pieces
    )
    return replace(layer, pieces=tuple(pieces))


def test_an_open_question_is_not_written() -> None:
    asked = Question(
        topic="scale layout", role=Role.BLOCK_SCALE, layouts=(ROW_MAJOR,), paths=(), why="unmarked"
    )
    plan = replace(planned(DATA / "modelopt" / "wan" / "fp8"), open=(asked,))
    with pytest.raises(FormatError, match="scale layout is open"):
        exporting.prepare(plan, "modelopt")


def test_a_file_that_would_be_read_differently_is_refused_before_a_byte_is_written() -> None:
    plan = planned(DATA / "modelopt" / "wan" / "fp8")
    wrong = tuple(map(smoothed, plan.layers))
    with pytest.raises(FormatError, match="has smooth multiply, it would be read as None"):
        exporting.prepare(replace(plan, layers=wrong), "modelopt")


def smoothed(layer: LayerPlan) -> LayerPlan:
    """A layer that claims smoothing and has no factors."""
    return replace(layer, pieces=tuple(replace(it, smooth="multiply") for it in layer.pieces))


def test_blocks_of_rows_are_joined_only_where_they_end_with_the_layers(tmp_path: Path) -> None:
    plan = online.requantized(planned(BF16), online.Online(scheme="int8_block"))
    assert exporting.prepare(plan, "comfy").total_size
    held = [torch.ones(2, 1), torch.ones(2, 1)]
    with pytest.raises(FormatError, match="across their blocks of rows"):
        _arranging.joined_blocks(held, [192, 191], [(), ()], "qkv")
