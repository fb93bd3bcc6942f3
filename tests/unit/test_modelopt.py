"""ModelOpt exports: each trap that its files set, on tensors that ModelOpt itself wrote."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffquant import device, headers, planner, sources
from diffquant.errors import FormatError
from diffquant.formats import NO_HINTS, Hints
from diffquant.kernels import KERNELS, choose
from diffquant.pieces import canonical, dense
from diffquant.plan import LayerPlan, Plan, Role
from diffquant.planner import Draft
from diffquant.tensors import Weights

DATA = Path(__file__).resolve().parents[1] / "data"
MODELOPT = DATA / "modelopt"
LAYERS = MODELOPT / "layers"
FLUX = MODELOPT / "flux" / "fp8"
SWIZZLED = DATA / "settle" / "wan_nvfp4_swizzle"
LAYER = "blocks.0.attn1.to_out.0"
TO_Q = "transformer_blocks.0.attn.to_q"


def drafted(folder: Path, hints: Hints = NO_HINTS) -> Draft:
    checkpoint = sources.checkpoint(str(folder))
    header = headers.read(checkpoint.files)
    return planner.draft(checkpoint, header, config=checkpoint.config, hints=hints)


def planned(folder: Path, hints: Hints = NO_HINTS) -> Plan:
    drawn = drafted(folder, hints)
    assert not drawn.problems
    return drawn.plan


def changed(
    source: Path,
    target: Path,
    tensors: Mapping[str, Tensor | None] | None = None,
    block: Mapping[str, Any] | None = None,
) -> Path:
    """A copy with some tensors replaced (None: left out) and keys of quantization_config changed."""
    shutil.copytree(source, target)
    (stored,) = target.glob("*.safetensors")
    held = {**load_file(stored), **(tensors or {})}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, stored)
    path = target / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= block or {}
    path.unlink()
    path.write_text(json.dumps(config))
    return target


def only(plan: Plan) -> LayerPlan:
    (layer,) = plan.layers
    return layer


def weight(plan: Plan, path: str) -> Tensor:
    return dense(plan.layer(path), Weights([Path(file.path) for file in plan.files]))[0]


# what a layer is, by its tensors


@pytest.mark.parametrize(
    ("scheme", "encoding", "activation"),
    [
        ("fp8_2d_blockwise", "fp8", None),
        ("fp8_pc_pt", "fp8", "fp8:token:dynamic"),
        ("int4_awq", "int4", None),
        ("int8_sq", "int8", "int8:tensor:static"),
        ("int8_wo", "int8", None),
        ("mxfp8", "mxfp8", "mxfp8:group32:dynamic"),
        ("nvfp4_awq", "nvfp4", "nvfp4:group16:static"),
        ("nvfp4_svdquant", "nvfp4", "nvfp4:group16:static"),
        ("w4a16_nvfp4", "nvfp4", None),
        ("w4a8_awq", "int4", "fp8:tensor:static"),
    ],
)
def test_every_algorithm_is_known_by_its_tensors(
    scheme: str, encoding: str, activation: str | None
) -> None:
    (piece,) = only(planned(LAYERS / scheme)).pieces
    assert piece.encoding.name == encoding
    assert (None if piece.activation is None else str(piece.activation)) == activation
    stored = headers.read(sources.checkpoint(str(LAYERS / scheme)).files).tensors
    assert (piece.smooth == "multiply") == (f"{LAYER}.pre_quant_scale" in stored)
    assert (piece.lowrank_input == "smoothed") == (f"{LAYER}.svdquant_lora_a" in stored)


def test_a_layer_that_is_ignored_may_still_be_smoothed() -> None:
    drawn = drafted(MODELOPT / "wan" / "ex_int8_cut")
    ignored, quantized = (
        drawn.plan.layer("blocks.0.attn1.to_q"),
        drawn.plan.layer("blocks.1.attn1.to_q"),
    )
    assert ignored.encodings == ("dense",)
    assert ignored.pieces[0].smooth == "multiply" and not ignored.is_ordinary
    assert quantized.encodings == ("int8",) and quantized.pieces[0].smooth == "multiply"


def test_two_layers_of_one_algorithm_may_differ_in_what_they_carry(tmp_path: Path) -> None:
    """NVIDIA's recipe for Qwen skips layers: no pre_quant_scale and no low rank, one quant_algo."""
    (stored,) = (LAYERS / "nvfp4_svdquant").glob("*.safetensors")
    tensors = load_file(stored)
    bare = {
        name.replace("to_out.0", "to_q"): tensor.clone()
        for name, tensor in tensors.items()
        if not name.endswith(("pre_quant_scale", "lora_a", "lora_b"))
    }
    plan = planned(changed(LAYERS / "nvfp4_svdquant", tmp_path / "both", bare))
    carried = {layer.path: layer.pieces[0].lowrank_input for layer in plan.layers}
    assert carried == {LAYER: "smoothed", "blocks.0.attn1.to_q": None}


def test_a_mixed_export_lists_its_layers_and_ignores_none() -> None:
    plan = planned(MODELOPT / "wan" / "mixed")
    found = {layer.encodings[0] for layer in plan.layers}
    assert {"fp8", "nvfp4"} <= found
    whys = {layer.why for layer in plan.quantized}
    assert "config.json quantization_config FP8" in whys
    assert "config.json quantization_config NVFP4" in whys


@pytest.mark.parametrize("numbers", ["float32", "bfloat16"])
def test_blocks_in_two_dimensions_multiply_as_they_decode(numbers: str) -> None:
    plan = planned(LAYERS / "fp8_2d_blockwise_ffn")
    weights = Weights([Path(file.path) for file in plan.files])
    for layer in plan.layers:
        (piece,) = layer.pieces
        parts = canonical(piece, weights)
        n, k = layer.shape_NK
        assert parts[Role.BLOCK_SCALE].shape == (-(-n // 128), -(-k // 128))
        choice = choose(layer, device.parse("cpu"))
        x_MK = torch.randn(4, k).to(getattr(torch, numbers))
        ours = KERNELS.load(choice.kernel).build(choice.specs[0])(x_MK, parts)
        wanted = x_MK.float() @ dense(layer, weights)[0].T
        assert (ours.float() - wanted).norm() / wanted.norm() < 3.5e-3


# scales


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scales_of_a_tensor_may_have_any_shape_of_one(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    (stored,) = FLUX.glob("*.safetensors")
    scales = {
        name: tensor.reshape(shape)
        for name, tensor in load_file(stored).items()
        if name.endswith(("weight_scale", "input_scale"))
    }
    plan = planned(changed(FLUX, tmp_path / "flux", scales))
    assert torch.equal(weight(plan, TO_Q), weight(planned(FLUX), TO_Q))
    assert str(plan.layer(TO_Q).pieces[0].activation) == "fp8:tensor:static"


@pytest.mark.parametrize(
    ("scheme", "activation"),
    [("nvfp4_awq", "nvfp4:group16:dynamic"), ("int8_sq", "int8:tensor:dynamic")],
)
def test_a_missing_input_scale_makes_its_layer_dynamic_and_is_told(
    scheme: str, activation: str, tmp_path: Path
) -> None:
    plan = planned(changed(LAYERS / scheme, tmp_path / "it", {f"{LAYER}.input_scale": None}))
    assert str(only(plan).pieces[0].activation) == activation
    assert f"1 layers lack input_scale and quantize dynamically, first {LAYER!r}" in plan.notes


def test_one_missing_input_scale_among_many_changes_one_layer(tmp_path: Path) -> None:
    plan = planned(changed(FLUX, tmp_path / "flux", {f"{TO_Q}.input_scale": None}))
    modes = {layer.path: layer.pieces[0].activation for layer in plan.quantized}
    assert [path for path, activation in modes.items() if activation.mode == "dynamic"] == [TO_Q]  # type: ignore[union-attr]


def test_a_missing_weight_scale_is_an_error_that_names_the_weight(tmp_path: Path) -> None:
    drawn = drafted(changed(FLUX, tmp_path / "flux", {f"{TO_Q}.weight_scale": None}))
    (problem,) = drawn.problems
    assert problem.tensor == f"{TO_Q}.weight" and "without its scale" in problem.what


def test_a_missing_second_scale_is_an_error_too(tmp_path: Path) -> None:
    folder = changed(LAYERS / "w4a16_nvfp4", tmp_path / "it", {f"{LAYER}.weight_scale_2": None})
    (problem,) = drafted(folder).problems
    assert problem.tensor == f"{LAYER}.weight" and "tensor_scale" in problem.what


@pytest.mark.parametrize("kernel", ["cpu_fp8", "reference", "torch_scaled_mm"])
def test_nan_codes_under_a_zero_scale_are_a_zero_weight(kernel: str, tmp_path: Path) -> None:
    hollow = {
        f"{TO_Q}.weight": torch.full((128, 128), torch.nan).to(torch.float8_e4m3fn),
        f"{TO_Q}.weight_scale": torch.tensor(0.0),
    }
    plan = planned(changed(FLUX, tmp_path / "flux", hollow))
    assert not weight(plan, TO_Q).any()
    layer = plan.layer(TO_Q)
    parts = canonical(layer.pieces[0], Weights([Path(file.path) for file in plan.files]))
    numerics = "faithful" if kernel == "torch_scaled_mm" else "weight-only"
    spec = choose(layer, device.parse("cpu"), numerics=numerics).specs[0]  # type: ignore[arg-type]
    product = KERNELS.load(kernel).build(spec)(torch.randn(3, 128), parts)
    assert not product.any()


def test_nan_codes_under_a_true_scale_stay_visible(tmp_path: Path) -> None:
    broken = {f"{TO_Q}.weight": torch.full((128, 128), torch.nan).to(torch.float8_e4m3fn)}
    plan = planned(changed(FLUX, tmp_path / "flux", broken))
    assert bool(weight(plan, TO_Q).isnan().all())


# tensors nobody needs


def test_stray_ranges_are_owned_with_a_reason(tmp_path: Path) -> None:
    strays = [
        "transformer_blocks.0.attn.q_bmm_quantizer._amax",
        "transformer_blocks.0.attn.bmm2_output_quantizer._amax",
        "transformer_blocks.0.norm1.norm.input_quantizer._amax",
    ]
    tensors = {name: torch.tensor(1.0).bfloat16() for name in strays}
    plan = planned(changed(FLUX, tmp_path / "flux", tensors))
    assert {ref.name for ref in plan.unused} == set(strays)
    assert set(plan.unused.values()) == {
        "an amax left by a quantizer that is declared, not applied"
    }


def test_a_stray_that_is_no_range_is_nobodys(tmp_path: Path) -> None:
    stray = {"transformer_blocks.0.attn.mystery": torch.ones(3)}
    (problem,) = drafted(changed(FLUX, tmp_path / "flux", stray)).problems
    assert problem.tensor == "transformer_blocks.0.attn.mystery"
    assert "belongs to no module" in problem.what


def test_attention_quantizers_are_declared_and_not_applied(tmp_path: Path) -> None:
    plan = planned(changed(FLUX, tmp_path / "flux", block={"kv_cache_scheme": "INT8"}))
    assert "attention quantizers are declared (kv_cache_scheme), and not applied" in plan.notes


# where it says what it is


def test_a_plain_export_under_a_quantized_name_is_plain(tmp_path: Path) -> None:
    shutil.copytree(MODELOPT / "flux" / "bf16", tmp_path / "flux")
    config = json.loads((tmp_path / "flux" / "config.json").read_text())
    producer = {"name": "modelopt", "version": "0.44.0"}
    block = {"ignore": [], "producer": producer, "quant_method": "modelopt"}
    (tmp_path / "flux" / "config.json").unlink()
    (tmp_path / "flux" / "config.json").write_text(
        json.dumps(config | {"quantization_config": block})
    )
    plan = planned(tmp_path / "flux")
    assert plan.format == "modelopt" and not plan.quantized
    assert "no weight in the file is quantized" in plan.notes[0]


@pytest.mark.parametrize("place", ["sidecar", "metadata", "both"])
def test_the_declaration_may_lie_elsewhere(place: str, tmp_path: Path) -> None:
    folder = shutil.copytree(FLUX, tmp_path / "flux")
    config = json.loads((folder / "config.json").read_text())
    block = config.pop("quantization_config") if place != "both" else config["quantization_config"]
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    (stored,) = folder.glob("*.safetensors")
    if place == "sidecar":
        inner = {"quant_algo": block["quant_algo"], "exclude_modules": block["ignore"]}
        nested = {"producer": block["producer"], "quantization": inner}
        (folder / "hf_quant_config.json").write_text(json.dumps(nested))
    else:
        names = [name for name in load_file(stored) if name.endswith(".weight_scale")]
        layers = {name.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"} for name in names}
        markers = {"format_version": "1.0", "layers": layers}
        metadata = {
            "quantization_config": json.dumps(block),
            "_quantization_metadata": json.dumps(markers),
        }
        save_file(load_file(stored), stored, metadata=metadata)
    plan, wanted = planned(folder), planned(FLUX)
    assert plan.format == "modelopt"
    assert [layer.pieces for layer in plan.layers] == [layer.pieces for layer in wanted.layers]


@pytest.mark.parametrize("text", ["{", "[]", "7"])
def test_a_declaration_that_cannot_be_read_is_told(text: str, tmp_path: Path) -> None:
    folder = shutil.copytree(FLUX, tmp_path / "flux")
    (folder / "config.json").unlink()
    (folder / "config.json").write_text("{}")
    (folder / "hf_quant_config.json").write_text(text)
    with pytest.raises(FormatError, match=re.escape("hf_quant_config.json")):
        drafted(folder)


def test_ignore_lists_in_names_of_other_programs_do_no_harm(tmp_path: Path) -> None:
    foreign = {"ignore": ["double_blocks.0.img_attn_qkv", "transformer_blocks.0.ff.proj_in*"]}
    plan, wanted = planned(changed(FLUX, tmp_path / "flux", block=foreign)), planned(FLUX)
    assert [layer.pieces for layer in plan.layers] == [layer.pieces for layer in wanted.layers]


# orders


def layout_of(plan: Plan, path: str) -> str:
    part = plan.layer(path).pieces[0].part(Role.BLOCK_SCALE)
    assert part is not None
    return part.layout.name


def test_one_shape_that_only_tiles_explain_answers_for_the_whole_file() -> None:
    plan = drafted(SWIZZLED).plan
    assert layout_of(plan, "blocks.0.ffn.net.0.proj") == "tiles_128x4"
    assert layout_of(plan, "blocks.0.attn1.to_q") == "tiles_128x4"
    assert not plan.open


def test_a_typed_order_leaves_nothing_open() -> None:
    plan = drafted(SWIZZLED, Hints(scales="tiles")).plan
    assert layout_of(plan, "blocks.0.attn1.to_q") == "tiles_128x4"
    assert not plan.open


def test_a_typed_order_that_a_shape_denies_is_refused() -> None:
    with pytest.raises(FormatError, match="--scale-layout linear was typed"):
        drafted(SWIZZLED, Hints(scales="linear"))


@pytest.mark.parametrize("swapped", [False, True])
def test_sglangs_mark_swaps_the_nibbles(swapped: bool, tmp_path: Path) -> None:
    folder = changed(
        LAYERS / "w4a16_nvfp4", tmp_path / "it", block={"swap_weight_nibbles": swapped}
    )
    codes = only(planned(folder)).pieces[0].part(Role.CODES)
    assert codes is not None
    assert (("nibbles", "high") in codes.layout.options) == swapped
    same = torch.equal(
        weight(planned(folder), LAYER), weight(planned(LAYERS / "w4a16_nvfp4"), LAYER)
    )
    assert same != swapped


# history


@pytest.mark.parametrize(
    ("scheme", "algorithm"),
    [("nvfp4_svdquant", "NVFP4_SVD"), ("nvfp4_awq", "NVFP4_AWQ"), ("int4_awq", "W4A16_AWQ")],
)
def test_old_exports_that_lost_their_smoothing_are_refused(
    scheme: str, algorithm: str, tmp_path: Path
) -> None:
    lost = {
        f"{LAYER}.{name}": None
        for name in ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
    }
    block = {"quant_algo": algorithm, "producer": {"name": "modelopt", "version": "0.45.0"}}
    with pytest.raises(FormatError, match="no pre_quant_scale .*0.45.0") as raised:
        drafted(changed(LAYERS / scheme, tmp_path / "it", lost, block))
    assert ">= 0.46" in str(raised.value)


@pytest.mark.parametrize(
    ("version", "told"), [("0.44.0", True), ("0.45.1", True), ("0.47.0", False)]
)
def test_int8_is_doubted_by_the_release_that_wrote_it(
    version: str, told: bool, tmp_path: Path
) -> None:
    block = {"producer": {"name": "modelopt", "version": version}}
    folder = changed(LAYERS / "int8_sq", tmp_path / "it", {f"{LAYER}.pre_quant_scale": None}, block)
    assert any("loses SmoothQuant's scales" in note for note in planned(folder).notes) == told
