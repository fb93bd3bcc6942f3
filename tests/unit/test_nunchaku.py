"""Nunchaku's files: true packed layers, a whole tiny FLUX, published key tables, and refusals.

Figures are relative errors ‖out - truth‖ / ‖truth‖. The truth was computed outside this project.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffquant import device, headers, pieces, planner, sources
from diffquant.errors import FormatError
from diffquant.formats import NO_HINTS, Hints, Reading
from diffquant.formats.nunchaku import FORMAT
from diffquant.formats.nunchaku_awq import FORMAT as T5_FORMAT
from diffquant.formats.nunchaku_lite import FORMAT as LITE_FORMAT
from diffquant.formats.svdquant_rows import FORMAT as ROWS_FORMAT
from diffquant.kernels import choose
from diffquant.materialize import materialize
from diffquant.plan import LayerPlan, Part, Piece, Plan, Role, Span, TensorRef
from diffquant.sources import Checkpoint
from diffquant.tensors import Weights
from tests.keytables import sparse_checkpoint

DATA = Path(__file__).resolve().parents[1] / "data"
FLUX = DATA / "nunchaku" / "tiny_flux" / "svdq-int4_r32-tiny-flux.safetensors"
CASES = sorted((DATA / "nunchaku").glob("*.safetensors"))
NUNCHAKU = {"model_class": "NunchakuQwenImageTransformer2DModel"}
LAYER = "transformer_blocks.0.attn.to_out.0"


# one layer -----------------------------------------------------------------------------------


def read(file: Path, hints: Hints = NO_HINTS, **config: Any) -> Reading:
    """What the one format that claims the file makes of it."""
    checkpoint = Checkpoint(origin=file.name, root=file.parent, files=(file,), config=config)
    header = headers.read([file])
    found = [
        each
        for each in (FORMAT, T5_FORMAT, LITE_FORMAT, ROWS_FORMAT)
        if each.evidence(checkpoint, header) is not None
    ]
    assert len(found) == 1
    return found[0].read(checkpoint, header, hints)


def stored(case: Path, directory: Path, **metadata: str) -> Path:
    """The packed tensors of a case as a checkpoint of one layer."""
    packed = {
        f"{LAYER}.{name.removeprefix('packed.')}": tensor
        for name, tensor in load_file(case).items()
        if name.startswith("packed.")
    }
    file = directory / case.name
    save_file(packed, file, metadata=metadata or NUNCHAKU)
    return file


def layer_of(file: Path, shape_NK: tuple[int, int], chunks: int = 1) -> LayerPlan:
    """The layer as a plan holds it: rows of modulation chunks regrouped, padding cut off."""
    (layer,) = read(file).layers
    piece = Piece(
        encoding=layer.encoding,
        stored_NK=layer.stored_NK,
        parts=tuple(
            Part(part.role, TensorRef(0, part.tensor), part.layout) for part in layer.parts
        ),
        out=Span(0, shape_NK[0]),
        cols=Span(0, shape_NK[1]),
        take=tuple(Span(chunk, shape_NK[0], chunks) for chunk in range(chunks)),
        smooth=layer.smooth,
        lowrank_input=layer.lowrank_input,
    )
    return LayerPlan(path=LAYER, shape_NK=shape_NK, pieces=(piece,), dtype="bfloat16", why="")


def about(case: Path) -> dict[str, Any]:
    with safe_open(case, "pt") as opened:
        return json.loads(opened.metadata()["case"])


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_every_part_unpacks_to_what_was_packed(case: Path, tmp_path: Path) -> None:
    truth, told = load_file(case), about(case)
    layer = layer_of(stored(case, tmp_path), (told["n"], told["k"]), told.get("splits", 1))
    held = pieces.canonical(layer.pieces[0], Weights([tmp_path / case.name]))
    for role, name in {
        Role.SMOOTH: "smooth",
        Role.LOWRANK_DOWN: "lora_down",
        Role.LOWRANK_UP: "lora_up",
        Role.BIAS: "bias",
    }.items():
        plus_one = told["kind"] == "awq" and role is Role.BIAS
        if f"logical.{name}" in truth and not plus_one:
            assert torch.equal(held[role], truth[f"logical.{name}"])
    low, high = held[Role.CODES].view(torch.uint8) & 15, held[Role.CODES].view(torch.uint8) >> 4
    codes = torch.stack((low, high), dim=2).flatten(1)
    assert torch.equal(codes, truth["logical.code"].view(torch.uint8) & 15)


@pytest.mark.parametrize("name", ["int4_plain", "nvfp4_single_wtscale"])
def test_a_linear_decodes_to_the_dense_weight_it_stands_for(name: str, tmp_path: Path) -> None:
    case = DATA / "nunchaku" / f"linear_{name}.safetensors"
    truth, told = load_file(case), about(case)
    layer = layer_of(stored(case, tmp_path), (told["n"], told["k"]))
    weight, bias = pieces.dense(layer, Weights([tmp_path / case.name]))
    y = truth["expect.x"].float() @ weight.T + bias
    assert error(y, truth["expect.y_dense"]) < 1e-6
    wrong = replace(layer, pieces=(replace(layer.pieces[0], smooth="multiply"),))
    weight, bias = pieces.dense(wrong, Weights([tmp_path / case.name]))
    assert error(truth["expect.x"].float() @ weight.T + bias, truth["expect.y_dense"]) > 0.1


def test_padded_rows_of_groups_do_not_count(tmp_path: Path) -> None:
    case = DATA / "nunchaku" / "awq_splits3_k256.safetensors"
    truth = load_file(case)
    layer = layer_of(stored(case, tmp_path), (96, 256), chunks=3)
    weight, _ = pieces.dense(layer, Weights([tmp_path / case.name]))
    scale = truth["logical.scale"].float().repeat_interleave(64, 1)
    zero = truth["logical.zero"].float().repeat_interleave(64, 1)
    assert truth["packed.wscales"].shape[0] == 16
    assert torch.equal(weight, truth["logical.code"].float() * scale + zero)


# the tiny FLUX -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan() -> Plan:
    checkpoint = sources.checkpoint(str(FLUX))
    return planner.plan(checkpoint, headers.read(checkpoint.files), config={})


def error(out: Tensor, truth: Tensor) -> float:
    return float((out.float() - truth).norm() / truth.norm())


def drawn(plan: Plan, numerics: Any, truth: str) -> float:
    """Error of the model's output against one of the stored outputs."""
    given = load_file(FLUX.with_name("io.safetensors"))
    choices = [
        choose(layer, device.parse("cpu"), numerics=numerics, kernel="reference")
        for layer in plan.layers
    ]
    model = materialize(plan, choices, device=torch.device("cpu"), dtype=torch.float32)
    inputs = {name: value for name, value in given.items() if not name.startswith("out_")}
    with torch.no_grad():
        out = model(**inputs, return_dict=False)[0]
    return error(out, given[truth])


def changed(plan: Plan, change: Callable[[LayerPlan, Piece], Piece]) -> Plan:
    layers = (
        replace(layer, pieces=tuple(change(layer, piece) for piece in layer.pieces))
        for layer in plan.layers
    )
    return replace(plan, layers=tuple(layers))


def test_the_file_decodes_to_the_expected_dense_weights_bit_for_bit(plan: Plan) -> None:
    sums: Mapping[str, str] = json.loads(
        FLUX.with_name("expected_dense_int4_bf16.json").read_text()
    )
    weights, met = Weights([FLUX]), 0
    for layer in plan.layers:
        found = dict(zip(("weight", "bias"), pieces.dense(layer, weights), strict=True))
        for leaf, tensor in found.items():
            if (expected := sums.get(f"{layer.path}.{leaf}")) is not None:
                met += 1
                raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
                assert hashlib.sha256(raw).hexdigest()[:16] == expected, f"{layer.path}.{leaf}"
    assert met == sum("norm_" not in name for name in sums)


def test_the_model_draws_what_the_dense_model_draws(plan: Plan) -> None:
    assert drawn(plan, "weight-only", "out_dense_int4_fp32") < 1e-6


def test_faithful_mode_predicts_the_four_bit_kernels(plan: Plan) -> None:
    faithful = drawn(plan, "faithful", "out_w4a4_int4_fp32")
    assert faithful < 0.05
    assert drawn(plan, "weight-only", "out_w4a4_int4_fp32") > 1.5 * faithful


def exchanged(layer: LayerPlan, piece: Piece) -> Piece:
    """q reads the rows of k and k those of q."""
    name = layer.path.rpartition(".")[2]
    if name not in ("to_q", "to_k"):
        return piece
    start = 256 if name == "to_q" else 0
    return replace(piece, take=(Span(start, start + 256),))


#: A misreading and how many times the error of the right reading it makes, at least.
MISREADINGS: Mapping[str, tuple[Callable[[LayerPlan, Piece], Piece], float]] = {
    "shift omitted": (lambda layer, piece: replace(piece, shift=0.0), 1e4),
    "one left in the modulation bias": (
        lambda layer, piece: replace(piece, bias_offsets=()),
        1e5,
    ),
    "modulation rows left interleaved": (
        lambda layer, piece: (
            replace(piece, take=()) if piece.take and piece.take[0].step > 1 else piece
        ),
        1e5,
    ),
    "q and k exchanged": (exchanged, 1e4),
    "smoothing multiplied": (
        lambda layer, piece: replace(piece, smooth=piece.smooth and "multiply"),
        1e5,
    ),
    "low rank of the smoothed input": (
        lambda layer, piece: replace(piece, lowrank_input=piece.lowrank_input and "smoothed"),
        1e4,
    ),
}


@pytest.mark.parametrize("misreading", MISREADINGS)
def test_a_misreading_breaks_the_picture(plan: Plan, misreading: str) -> None:
    change, factor = MISREADINGS[misreading]
    wrong = drawn(changed(plan, change), "weight-only", "out_dense_int4_fp32")
    assert wrong > factor * 3.1e-7


def test_swapped_nibbles_break_the_picture(tmp_path: Path) -> None:
    tensors = load_file(FLUX)
    for name, tensor in tensors.items():
        if name.endswith("qweight") and tensor.dtype == torch.int8:
            codes = tensor.view(torch.uint8)
            tensors[name] = (codes << 4 | codes >> 4).view(torch.int8)
    with safe_open(FLUX, "pt") as opened:
        save_file(tensors, tmp_path / FLUX.name, metadata=opened.metadata())
    checkpoint = sources.checkpoint(str(tmp_path / FLUX.name))
    swapped = planner.plan(checkpoint, headers.read(checkpoint.files), config={})
    assert drawn(swapped, "weight-only", "out_dense_int4_fp32") > 1e5 * 3.1e-7


def test_the_older_folder_of_two_files_makes_the_same_layers(plan: Plan, tmp_path: Path) -> None:
    tensors, config = load_file(FLUX), dict(plan.config)
    blocks = {name: tensors.pop(name) for name in list(tensors) if "_blocks." in name}
    save_file(blocks, tmp_path / "transformer_blocks.safetensors")
    save_file(tensors, tmp_path / "unquantized_layers.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = sources.checkpoint(str(tmp_path))
    found = planner.plan(checkpoint, headers.read(checkpoint.files), config={})
    assert found.format == "nunchaku" and not found.open
    assert [layer.path for layer in found.layers] == [layer.path for layer in plan.layers]


def test_only_layers_behind_gelu_are_shifted_and_unsigned(plan: Plan) -> None:
    shifted = {layer.path for layer in plan.layers for piece in layer.pieces if piece.shift}
    assert shifted == {
        "transformer_blocks.0.ff.net.2",
        "transformer_blocks.0.ff_context.net.2",
        "single_transformer_blocks.0.proj_out",
        "single_transformer_blocks.1.proj_out",
    }
    attention, mlp = plan.layer("single_transformer_blocks.0.proj_out").pieces
    assert (attention.shift, mlp.shift) == (0.0, 0.171875)
    assert str(mlp.activation) == "int4:group64:dynamic:unsigned"


# published key tables ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "class_name", "layers", "shifted"),
    [
        ("qwenimage_int4_r32", "QwenImageTransformer2DModel", 846, 120),
        ("qwenimage_nvfp4_r32", "QwenImageTransformer2DModel", 846, 0),
        ("zimage_int4_r128", "ZImageTransformer2DModel", 276, 0),
        ("zimage_nvfp4_r128", "ZImageTransformer2DModel", 276, 0),
        ("flux1_v2_int4_r32", "FluxTransformer2DModel", 504, 76),
        ("flux1_v2_nvfp4_r32", "FluxTransformer2DModel", 504, 0),
    ],
)
def test_a_published_set_of_keys_plans_completely(
    table: str, class_name: str, layers: int, shifted: int, tmp_path: Path
) -> None:
    file = sparse_checkpoint(table, tmp_path, class_name)
    checkpoint = sources.checkpoint(str(file))
    found = planner.plan(checkpoint, headers.read([file]), config={})
    assert (found.format, len(found.layers), found.open) == ("nunchaku", layers, ())
    assert sum(piece.shift > 0 for layer in found.layers for piece in layer.pieces) == shifted
    assert all("record" in reason for reason in found.unused.values())


# what is refused, and what is asked ----------------------------------------------------------


def metadata_of(dtype: str, rank: int) -> dict[str, str]:
    block = {"method": "svdquant", "weight": {"dtype": dtype}, "rank": rank}
    return {"quantization_config": json.dumps(block)}


@pytest.mark.parametrize(
    ("metadata", "hints", "said"),
    [
        (metadata_of("fp4_e2m1_all", 16), NO_HINTS, "nvfp4.*stored as int4"),
        (metadata_of("int4", 64), NO_HINTS, "rank 64.*rank 16"),
        (metadata_of("mxfp4", 16), NO_HINTS, "'mxfp4'"),
        (NUNCHAKU, Hints(precision="nvfp4"), "name.*nvfp4.*int4"),
        (NUNCHAKU, Hints(rank=128), "rank 128.*rank 16"),
    ],
)
def test_a_promise_the_tensors_break_is_refused(
    metadata: dict[str, str], hints: Hints, said: str, tmp_path: Path
) -> None:
    file = stored(DATA / "nunchaku" / "linear_int4_plain.safetensors", tmp_path, **metadata)
    with pytest.raises(FormatError, match=said):
        read(file, hints)


def test_a_promise_the_tensors_keep_is_not(tmp_path: Path) -> None:
    file = stored(
        DATA / "nunchaku" / "linear_int4_plain.safetensors", tmp_path, **metadata_of("int4", 16)
    )
    assert read(file, Hints(precision="int4", rank=16)).layers[0].stored_NK == (256, 128)


def test_foreign_scales_under_the_same_names_are_refused_by_name(tmp_path: Path) -> None:
    tensors = {
        f"{LAYER}.qweight": torch.zeros(128, 64, dtype=torch.int8),
        f"{LAYER}.wscales": torch.zeros(4, 128, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "mx.safetensors", metadata=NUNCHAKU)
    with pytest.raises(FormatError, match="U8 scales in groups of 32"):
        read(tmp_path / "mx.safetensors")


def test_an_unknown_writer_leaves_the_packing_open(tmp_path: Path) -> None:
    case = DATA / "nunchaku" / "linear_int4_plain.safetensors"
    proved, unknown = (
        read(stored(case, tmp_path, **metadata)) for metadata in (NUNCHAKU, {"format": "pt"})
    )
    assert not proved.open
    assert {question.topic for question in unknown.open} == {"nunchaku packing"}
    assert {str(layout) for layout in unknown.open[0].layouts} == {"nunchaku_mma", "row_major"}


def test_a_missing_outer_scale_means_none(tmp_path: Path) -> None:
    file = stored(DATA / "nunchaku" / "raw_nvfp4_n128_k128_r16.safetensors", tmp_path)
    assert str(read(file).layers[0].encoding) == "nvfp4;outer=none"
    single = stored(DATA / "nunchaku" / "linear_nvfp4_single_wtscale.safetensors", tmp_path)
    assert str(read(single).layers[0].encoding) == "nvfp4"


# neighbouring dialects -----------------------------------------------------------------------


def lite(**svdq: Any) -> dict[str, Any]:
    section = {"precision": "int4", "group_size": 64, "rank": 16, "targets": [LAYER]} | svdq
    return {"quantization_config": {"quant_method": "nunchaku_lite", "svdq_w4a4": section}}


def test_nunchaku_lite_is_packed_and_never_shifted(tmp_path: Path) -> None:
    case = DATA / "nunchaku" / "linear_int4_gelu_shifted_unsigned.safetensors"
    reading = read(stored(case, tmp_path, format="pt"), **lite())
    assert reading.layers[0].gelu_shift == 0.0
    assert reading.layers[0].parts[0].layout.name == "nunchaku_mma" and not reading.open


def test_nunchaku_lite_targets_must_be_the_stored_layers(tmp_path: Path) -> None:
    case = DATA / "nunchaku" / "linear_int4_plain.safetensors"
    with pytest.raises(FormatError, match="targets 'elsewhere'"):
        read(stored(case, tmp_path, format="pt"), **lite(targets=[LAYER, "elsewhere"]))
    with pytest.raises(FormatError, match="does not target it"):
        read(stored(case, tmp_path, format="pt"), **lite(targets=[]))


def test_vllm_omni_stores_the_same_names_in_rows(tmp_path: Path) -> None:
    case = DATA / "nunchaku" / "linear_nvfp4_single_wtscale.safetensors"
    config = {"quantization_config": {"quant_method": "svdquant", "precision": "nvfp4", "rank": 32}}
    layouts = {
        part.role: part.layout.name
        for part in read(stored(case, tmp_path, format="pt"), **config).layers[0].parts
    }
    assert layouts[Role.CODES] == "row_major"
    assert layouts[Role.BLOCK_SCALE] == layouts[Role.LOWRANK_DOWN] == "transposed"


def test_the_text_encoder_has_groups_of_128_in_16_bit_words(tmp_path: Path) -> None:
    truth = load_file(DATA / "nunchaku" / "awq_splits3_k256.safetensors")
    scale, zero = (truth[f"packed.{name}"][:2].half() for name in ("wscales", "wzeros"))
    tensors = {
        f"{LAYER}.qweight": truth["packed.qweight"].view(torch.int16),
        f"{LAYER}.scales": scale,
        f"{LAYER}.scaled_zeros": zero,
    }
    file = tmp_path / "t5.safetensors"
    save_file(tensors, file, metadata={"model_class": "NunchakuT5EncoderModel"})
    weight, _ = pieces.dense(layer_of(file, (96, 256), chunks=3), Weights([file]))
    wide = [
        part.float().T.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1).repeat_interleave(128, 1)
        for part in (scale, zero)
    ]
    assert torch.equal(weight, truth["logical.code"].float() * wide[0] + wide[1])
