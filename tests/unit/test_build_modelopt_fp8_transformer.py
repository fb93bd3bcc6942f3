"""The FP8 converter equals the peer's tool but where it differs on purpose, and refuses the rest."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffquant import preset
from diffquant.converters._options import Calibration, Writing
from diffquant.converters.build_modelopt_fp8_transformer import build, main
from diffquant.errors import ConvertError, UsageError
from diffquant.families import FAMILIES
from tests.oracle.write_modelopt_fp8_cases import WEIGHTS, digests

#: ModelOpt's default configuration leaves these out of FLUX.1.
PROJ_OUT = r"^(single_transformer_blocks\.\d+\.)?proj_out$"


def read(directory: Path) -> dict[str, Tensor]:
    with safe_open(directory / WEIGHTS, "pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}


def config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def peer(data: Path, family: str) -> tuple[dict[str, list[object]], dict[str, Any]]:
    """What the peer's tool wrote of the same export: digests of tensors, and config.json."""
    folder = data / "modelopt" / family / "sglang_fp8"
    return json.loads((folder / "digests.json").read_text()), config(folder)


def save(directory: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    directory.mkdir()
    save_file(tensors, directory / WEIGHTS)
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture
def flux(data: Path) -> dict[str, Any]:
    """Arguments for the tiny FLUX.1 export, as the peer's tool was called."""
    case = data / "modelopt" / "flux"
    return {
        "export": str(case / "fp8"),
        "backbone": case / "fp8_backbone.pt",
        "base": str(case / "bf16"),
    }


def test_flux_equals_the_peer_byte_for_byte(
    data: Path, flux: dict[str, Any], tmp_path: Path
) -> None:
    done = build(Writing(output_dir=tmp_path / "out"), **flux)
    expected, settings = peer(data, "flux")
    assert digests(tmp_path / "out" / WEIGHTS) == expected
    assert done.preset == "flux1-fp8"
    assert done.quantized_weights == sum(
        held[0] == "torch.float8_e4m3fn" for held in expected.values()
    )
    ours = config(tmp_path / "out")
    difference = set(ours["quantization_config"]["ignore"]) - set(
        settings["quantization_config"]["ignore"]
    )
    # Different on purpose: the file's own names beside the peer's, so that both find their layers.
    assert difference == {"transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2"}
    ours["quantization_config"]["ignore"] = settings["quantization_config"]["ignore"]
    assert ours == settings


def test_wan_equals_the_peer_but_for_its_convolution_in_fp8(data: Path, tmp_path: Path) -> None:
    case = data / "modelopt" / "wan"
    build(
        Writing(output_dir=tmp_path / "out"),
        export=str(case / "fp8"),
        backbone=case / "fp8_backbone.pt",
    )
    expected, settings = peer(data, "wan")
    ours = digests(tmp_path / "out" / WEIGHTS)
    # Different on purpose: patch_embedding is a Conv3d, for which FP8 has no kernel anywhere.
    for name in ("patch_embedding.weight_scale", "patch_embedding.input_scale"):
        assert name not in ours
        del expected[name]
    assert expected.pop("patch_embedding.weight")[0] == "torch.float8_e4m3fn"
    assert (
        ours.pop("patch_embedding.weight")
        == digests(case / "fp8" / WEIGHTS)["patch_embedding.weight"]
    )
    assert ours == expected
    ignored = set(config(tmp_path / "out")["quantization_config"]["ignore"])
    assert set(settings["quantization_config"]["ignore"]) < ignored
    assert "patch_embedding" in ignored


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_the_backbone_is_not_needed_for_an_export_that_has_its_scales(
    data: Path, flux: dict[str, Any], tmp_path: Path, family: str
) -> None:
    case = data / "modelopt" / family
    arguments = {"export": str(case / "fp8"), "base": flux["base"] if family == "flux" else None}
    build(Writing(output_dir=tmp_path / "with"), **arguments, backbone=case / "fp8_backbone.pt")
    build(Writing(output_dir=tmp_path / "without"), **arguments)
    assert digests(tmp_path / "with" / WEIGHTS) == digests(tmp_path / "without" / WEIGHTS)


def test_an_old_export_left_in_bf16_is_quantized_with_the_backbone(
    data: Path, tmp_path: Path
) -> None:
    case = data / "modelopt" / "flux"
    block = {"quant_method": "modelopt", "ignore": ["*proj_out"]}
    settings = {**config(case / "bf16"), "quantization_config": block}
    export = str(save(tmp_path / "old", read(case / "bf16"), **settings))
    with pytest.raises(ConvertError, match=r"no FP8 scales") as refused:
        build(Writing(output_dir=tmp_path / "out"), export=export)
    assert "--modelopt-backbone-ckpt" in str(refused.value.hint)
    build(
        Writing(output_dir=tmp_path / "out"),
        export=export,
        backbone=case / "fp8_backbone.pt",
        model_type="none",
    )
    _require_same_scales_and_close_codes(read(tmp_path / "out"), read(case / "fp8"), equal=False)


def test_a_native_save_is_converted_from_its_tensors_alone(data: Path, tmp_path: Path) -> None:
    case = data / "modelopt" / "flux"
    buffers = torch.load(case / "fp8_backbone.pt", weights_only=True)["model_state_dict"]
    native = save(tmp_path / "native", {**read(case / "bf16"), **buffers}, **config(case / "bf16"))
    (native / "modelopt_state.pth").write_bytes(b"a pickle nobody opens")
    build(Writing(output_dir=tmp_path / "out"), export=str(native), model_type="none")
    made = read(tmp_path / "out")
    assert not [name for name in made if "quantizer" in name]
    assert not (tmp_path / "out" / "modelopt_state.pth").exists()
    _require_same_scales_and_close_codes(made, read(case / "fp8"), equal=False)


def test_plain_weights_become_exactly_what_modelopt_makes_of_them(
    data: Path, tmp_path: Path
) -> None:
    case = data / "modelopt" / "flux"
    amax = {
        name.removesuffix(".input_scale"): float(scale * 448)
        for name, scale in read(case / "fp8").items()
        if name.endswith(".input_scale")
    }
    (tmp_path / "amax.json").write_text(json.dumps(amax))
    done = build(
        Writing(output_dir=tmp_path / "out"),
        from_bf16=str(case / "bf16"),
        calibration=Calibration(calibration=tmp_path / "amax.json"),
        model_type="none",
        keep_bf16=[PROJ_OUT],
    )
    assert (done.quantized_weights, done.dynamic_inputs) == (len(amax), 0)
    _require_same_scales_and_close_codes(read(tmp_path / "out"), read(case / "fp8"), equal=True)


def test_dividing_in_another_dtype_than_modelopt_is_noticed(data: Path, tmp_path: Path) -> None:
    """The negative control of the test before: float32 division gives some percent other codes."""
    case = data / "modelopt" / "flux"
    wide = {
        name: tensor.float() if name.startswith("transformer_blocks") else tensor
        for name, tensor in read(case / "bf16").items()
    }
    source = save(tmp_path / "wide", wide, **config(case / "bf16"))
    build(Writing(output_dir=tmp_path / "out"), from_bf16=str(source), model_type="none")
    name = "transformer_blocks.0.ff.net.2.weight"
    ours, theirs = read(tmp_path / "out")[name].float(), read(case / "fp8")[name].float()
    assert 0.01 < (ours != theirs).float().mean() < 0.06


def _require_same_scales_and_close_codes(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], equal: bool
) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        made = ours[name]
        assert made.dtype == expected.dtype, name
        if expected.dtype == torch.float8_e4m3fn and not equal:
            assert (made.float() != expected.float()).float().mean() < 0.06, name
        elif name.endswith("input_scale"):
            assert torch.allclose(made, expected, rtol=1e-6), name
        else:
            assert torch.equal(made.float().reshape(-1), expected.float().reshape(-1)), name


def test_plain_weights_keep_what_preset_and_family_name(data: Path, tmp_path: Path) -> None:
    done = build(
        Writing(output_dir=tmp_path / "out"), from_bf16=str(data / "modelopt" / "flux" / "bf16")
    )
    made = read(tmp_path / "out")
    assert done.preset == "flux1-fp8"
    assert made["transformer_blocks.0.attn.to_q.weight"].dtype == torch.float8_e4m3fn
    assert made["transformer_blocks.0.norm1.linear.weight"].dtype == torch.bfloat16, "preset"
    assert made["x_embedder.weight"].dtype == torch.bfloat16, "family"


def test_scales_without_a_calibration_are_dynamic_and_say_so(data: Path, tmp_path: Path) -> None:
    source = str(data / "modelopt" / "flux" / "bf16")
    done = build(Writing(output_dir=tmp_path / "out"), from_bf16=source, model_type="none")
    assert done.dynamic_inputs == done.quantized_weights == done.added_scale_tensors > 0
    block = config(tmp_path / "out")["quantization_config"]
    assert block["config_groups"]["group_0"]["input_activations"]["dynamic"] is True
    assert not [name for name in read(tmp_path / "out") if name.endswith("input_scale")]


def test_a_layer_of_zeros_becomes_zeros_and_never_nan(tmp_path: Path) -> None:
    weights = {"a.weight": torch.zeros(4, 4), "b.weight": torch.full((4, 4), 2.0)}
    source = save(tmp_path / "plain", weights, _class_name="Unknown")
    build(Writing(output_dir=tmp_path / "out"), from_bf16=str(source), model_type="none")
    made = read(tmp_path / "out")
    assert not made["a.weight"].float().any()
    assert made["a.weight_scale"].item() == 1.0
    assert torch.equal(made["b.weight"].float() * made["b.weight_scale"], weights["b.weight"])


def test_nan_codes_of_an_exported_layer_of_zeros_are_repaired(tmp_path: Path) -> None:
    codes = torch.full((4, 4), torch.nan).to(torch.float8_e4m3fn)
    tensors = {
        "a.weight": codes,
        "a.weight_scale": torch.tensor(0.0),
        "a.input_scale": torch.tensor(0.0),
    }
    block = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": []}
    source = save(tmp_path / "export", tensors, _class_name="X", quantization_config=block)
    done = build(Writing(output_dir=tmp_path / "out"), export=str(source))
    assert not read(tmp_path / "out")["a.weight"].float().any()
    assert done.dynamic_inputs == 1, "an input that was never seen has no scale to divide by"


def test_values_beyond_the_bound_saturate(tmp_path: Path) -> None:
    source = save(tmp_path / "plain", {"a.weight": torch.tensor([[1.0, -8.0]])}, _class_name="X")
    build(
        Writing(output_dir=tmp_path / "out"),
        from_bf16=str(source),
        model_type="none",
        maxbound=896.0,
    )
    assert read(tmp_path / "out")["a.weight"].float().tolist() == [[112.0, -448.0]]


def test_a_kept_layer_stored_in_fp8_needs_the_base(flux: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="is to stay in BF16") as refused:
        build(Writing(output_dir=tmp_path / "out"), export=flux["export"])
    assert "--base-transformer-dir" in str(refused.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_typed_pattern_keeps_layers_and_one_that_matches_nothing_is_refused(
    flux: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="matches no module"):
        build(Writing(output_dir=tmp_path / "out"), **flux, keep_bf16=["to_qq"])
    done = build(Writing(output_dir=tmp_path / "out"), **flux, keep_bf16=["^x_embedder$"])
    base = digests(Path(flux["base"]) / WEIGHTS)
    assert digests(tmp_path / "out" / WEIGHTS)["x_embedder.weight"] == base["x_embedder.weight"]
    assert done.bf16_fallback_weights == 9


def test_a_base_that_lacks_a_kept_layer_is_refused(flux: dict[str, Any], tmp_path: Path) -> None:
    base = save(tmp_path / "base", {"a.weight": torch.ones(1)}, _class_name="X")
    with pytest.raises(ConvertError, match="the base transformer .* has no"):
        build(Writing(output_dir=tmp_path / "out"), **{**flux, "base": str(base)})


@pytest.mark.parametrize(
    ("block", "leaf", "named"),
    [
        ({"quant_method": "fp8"}, "weight_scale", "quant_method 'fp8'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "weight_scale", "is NVFP4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "pre_quant_scale", "pre_quant_scale"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "weight_scale", r"shape \[4\]"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "other", "no FP8 scales"),
    ],
)
def test_what_is_no_per_tensor_fp8_export_is_refused_by_name(
    tmp_path: Path, block: dict[str, Any], leaf: str, named: str
) -> None:
    tensors = {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), f"a.{leaf}": torch.ones(4)}
    source = save(tmp_path / "export", tensors, _class_name="X", quantization_config=block)
    with pytest.raises(ConvertError, match=named):
        build(Writing(output_dir=tmp_path / "out"), export=str(source))


def test_sources_that_contradict_each_other_are_refused(data: Path, tmp_path: Path) -> None:
    fp8 = str(data / "modelopt" / "wan" / "fp8")
    with pytest.raises(UsageError, match="one source is needed"):
        build(Writing(output_dir=tmp_path / "out"))
    with pytest.raises(ConvertError, match="needs plain weights"):
        build(Writing(output_dir=tmp_path / "out"), from_bf16=fp8)
    with pytest.raises(UsageError, match="no preset for modelopt_fp8"):
        build(Writing(output_dir=tmp_path / "out"), export=fp8, model_type="wan")


def test_a_backbone_with_code_in_it_is_not_executed(data: Path, tmp_path: Path) -> None:
    torch.save({"model_state_dict": {"a": Path("x")}}, tmp_path / "backbone.pt")
    with pytest.raises(ConvertError, match="is no plain torch state"):
        build(
            Writing(output_dir=tmp_path / "out"),
            export=str(data / "modelopt/wan/fp8"),
            backbone=tmp_path,
        )


def test_a_calibration_of_another_model_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "amax.json").write_text('{"transformer_blocks.0.attn.to_x": 1.0}')
    with pytest.raises(ConvertError, match="which the model does not have") as refused:
        build(
            Writing(output_dir=tmp_path / "out"),
            from_bf16=str(data / "modelopt" / "flux" / "bf16"),
            calibration=Calibration(calibration=tmp_path / "amax.json"),
        )
    assert "attn.to_" in str(refused.value.hint)


def test_the_command_prints_statistics_and_refuses_with_a_hint(data: Path, tmp_path: Path) -> None:
    typed = [
        "--modelopt-hf-dir",
        str(data / "modelopt/wan/fp8"),
        "--output-dir",
        str(tmp_path / "o"),
    ]
    ran = CliRunner().invoke(main, typed)
    assert json.loads(ran.stdout)["quantized_weights"] == 25
    again = CliRunner().invoke(main, typed)
    assert again.exit_code == 1
    assert "hint: --overwrite" in again.stderr
    assert CliRunner().invoke(main, [*typed, "--overwrite"]).exit_code == 0


def test_the_header_says_what_config_json_says(data: Path, tmp_path: Path) -> None:
    build(Writing(output_dir=tmp_path / "out"), export=str(data / "modelopt" / "wan" / "fp8"))
    with safe_open(tmp_path / "out" / WEIGHTS, "pt") as stored:
        metadata = stored.metadata()
    assert (
        json.loads(metadata["quantization_config"])
        == config(tmp_path / "out")["quantization_config"]
    )
    assert json.loads(metadata["config"]) == config(tmp_path / "out")
    assert metadata["_class_name"] == "WanTransformer3DModel"


def test_every_family_the_peers_tool_knows_has_its_rules_here() -> None:
    named = {"flux1", "flux2", "hunyuan_video", "qwen_image"}
    assert all(preset.for_algorithm(family, "modelopt_fp8") for family in named)
    assert named <= set(FAMILIES.names())


def test_the_report_says_what_each_layer_lost_and_max_error_refuses(
    data: Path, tmp_path: Path
) -> None:
    source = str(data / "modelopt" / "flux" / "bf16")
    done = build(Writing(output_dir=tmp_path / "out"), from_bf16=source)
    errors = [each.fidelity.relative_error for each in done.report.layers if each.fidelity]
    assert len(errors) == done.quantized_weights
    assert 0.01 < errors[-1] <= errors[0] < 0.04
    with pytest.raises(ConvertError, match="worse than --max-error 0.01") as refused:
        build(Writing(output_dir=tmp_path / "strict", max_error=0.01), from_bf16=source)
    assert "--keep-bf16-pattern" in str(refused.value.hint)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_is_held_against_its_base_or_against_itself(
    flux: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    against_base = build(Writing(output_dir=tmp_path / "base"), **flux).report.layers[0]
    wan = str(data / "modelopt" / "wan" / "fp8")
    against_itself = build(Writing(output_dir=tmp_path / "self"), export=wan).report.layers[0]
    assert against_base.fidelity is not None
    assert against_itself.fidelity is not None
    assert against_base.fidelity.relative_error > 0.02
    assert against_itself.fidelity.relative_error == 0.0


def test_a_dry_run_counts_and_writes_nothing(data: Path, tmp_path: Path) -> None:
    source = str(data / "modelopt" / "flux" / "bf16")
    would = build(Writing(output_dir=tmp_path / "out", dry_run=True), from_bf16=source)
    assert not list(tmp_path.iterdir())
    did = build(Writing(output_dir=tmp_path / "out", no_check=True), from_bf16=source)
    assert replace(would, output_shards=1) == did
    with pytest.raises(UsageError, match="--no-check decodes nothing"):
        Writing(output_dir=tmp_path, no_check=True, max_error=0.1)


def test_calibrating_while_building_gives_every_layer_its_input_scale(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    asked = Calibration(calibrate=tmp_path / "prompts.txt", save_calibration=tmp_path / "amax.json")
    drawn = build(Writing(output_dir=tmp_path / "drawn"), from_bf16="emoji_flux", calibration=asked)
    again = Calibration(calibration=tmp_path / "amax.json")
    build(Writing(output_dir=tmp_path / "again"), from_bf16="emoji_flux", calibration=again)
    assert (drawn.dynamic_inputs, drawn.quantized_weights) == (0, 18)
    assert digests(tmp_path / "drawn" / WEIGHTS) == digests(tmp_path / "again" / WEIGHTS)
