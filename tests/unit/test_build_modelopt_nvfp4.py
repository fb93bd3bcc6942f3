"""NVFP4 transformers from exports of ModelOpt and from plain weights, held against ModelOpt's own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffquant import headers, planner, sources
from diffquant.converters._options import Calibration, Writing
from diffquant.converters.build_modelopt_nvfp4_transformer import fresh, main, mixed
from diffquant.encodings import ENCODINGS, Recipe
from diffquant.errors import ConvertError, PresetError, UsageError
from diffquant.plan import Encoding, Plan, Role

DATA = Path(__file__).resolve().parents[1] / "data" / "modelopt"
BASE = DATA / "flux" / "bf16"
#: An NVFP4 export of it by ModelOpt, of which one single block is left.
SINGLE = DATA / "flux" / "nvfp4_single"
#: Attention in FP8, everything else in NVFP4.
MIXED, WAN = DATA / "wan" / "mixed", DATA / "wan" / "bf16"
SCALES = ("weight_scale", "weight_scale_2", "input_scale")


def stored(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def plan_of(folder: Path) -> Plan:
    checkpoint = sources.checkpoint(str(folder))
    return planner.plan(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)


def packed(tensors: dict[str, Tensor]) -> list[str]:
    """Layers in NVFP4."""
    names = (name.removesuffix(".weight_scale_2") for name in tensors if "weight_scale_2" in name)
    return sorted(names)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(raw(one), raw(other))


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def calibrated(folder: Path, layers: list[str]) -> Calibration:
    path = folder / "calibration.json"
    path.write_text(json.dumps(dict.fromkeys(layers, 3.0)))
    return Calibration(calibration=path)


@pytest.fixture(scope="module")
def single_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights that SINGLE was made from."""
    folder = tmp_path_factory.mktemp("single") / "bf16"
    folder.mkdir()
    modules = {name.rpartition(".")[0] for name in stored(SINGLE)}
    kept = {name: it for name, it in stored(BASE).items() if name.rpartition(".")[0] in modules}
    save_file(kept, folder / "diffusion_pytorch_model.safetensors")
    config = json.loads((SINGLE / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of FLUX.1 in NVFP4, as ModelOpt would export it: see the test of plain weights."""
    folder = tmp_path_factory.mktemp("export")
    seen = calibrated(folder, [layer.path for layer in plan_of(BASE).layers])
    writing = Writing(output_dir=folder / "nvfp4")
    fresh(writing, source=str(BASE), pattern_preset="none", calibration=seen)
    return folder / "nvfp4"


def spliced(export: Path, output: Path, **options: Any) -> dict[str, Tensor]:
    mixed(Writing(output_dir=output), export=str(export), base=str(BASE), **options)
    return stored(output)


# an export and its base --------------------------------------------------------------------------


def test_an_export_comes_through_bit_for_bit(single_base: Path, tmp_path: Path) -> None:
    writing = Writing(output_dir=tmp_path / "out")
    mixed(writing, export=str(SINGLE), base=str(single_base))
    written, given = stored(tmp_path / "out"), stored(SINGLE)
    assert written.keys() == {name for name in given if "_quantizer." not in name}
    assert all(same(value, given[name]) for name, value in written.items())


def test_layers_that_stay_are_the_bases_and_keep_nothing_of_the_export(
    export: Path, tmp_path: Path
) -> None:
    given, base = stored(export), stored(BASE)
    written = spliced(export, tmp_path / "out", pattern_preset="flux1-nvfp4")
    gone = set(packed(given)) - set(packed(written))
    assert gone and "single_transformer_blocks.0.proj_mlp" in gone
    for layer in gone:
        assert same(written[f"{layer}.weight"], base[f"{layer}.weight"])
        assert not any(f"{layer}.{scale}" in written for scale in SCALES)
    for layer in packed(written):
        assert all(same(written[f"{layer}.{it}"], given[f"{layer}.{it}"]) for it in SCALES)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert gone <= set(ignored["ignore"]) and ignored["quant_algo"] == "NVFP4"


def test_globs_match_whole_names_across_dots_in_any_spelling(export: Path, tmp_path: Path) -> None:
    globs = (
        "transformer_blocks.*.attn.to_q",
        "single_*.proj_out",
        "transformer_blocks.0.ff.proj_in",
    )
    written = spliced(export, tmp_path / "out", keep_bf16=globs)
    gone = set(packed(stored(export))) - set(packed(written))
    assert "transformer_blocks.0.attn.to_q" in gone
    assert "transformer_blocks.0.ff.net.0.proj" in gone, "the peer's runtime calls it proj_in"
    assert "single_transformer_blocks.0.attn.to_q" not in gone, "globs match the whole name"


@pytest.mark.parametrize("asked", [{"keep_bf16": ["to_q"]}, {"pattern_preset": "wan-fp8"}])
def test_what_matches_nothing_is_an_error(
    asked: dict[str, Any], export: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        (UsageError, PresetError), match="matches no linear|is for wan, the model is flux1"
    ):
        spliced(export, tmp_path / "out", **asked)


def swapped(export: Path, folder: Path) -> Path:
    """The export with the two codes of every byte exchanged, which nothing in it tells."""
    tensors = stored(export)
    for layer in packed(tensors):
        codes = tensors[f"{layer}.weight"]
        tensors[f"{layer}.weight"] = codes << 4 | codes >> 4
    folder.mkdir()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text((export / "config.json").read_text())
    return folder


def test_swapped_nibbles_are_noticed_and_put_right(export: Path, tmp_path: Path) -> None:
    turned, output = swapped(export, tmp_path / "turned"), tmp_path / "out"
    with pytest.raises(ConvertError, match="does not decode to the base's weight") as refused:
        spliced(turned, output)
    assert "--swap-weight-nibbles" in str(refused.value.hint)
    assert not output.exists()
    written, given = spliced(turned, output, swap_weight_nibbles=True), stored(export)
    assert all(same(value, given[name]) for name, value in written.items())


@pytest.mark.parametrize(
    ("owner", "base", "said"),
    [
        (DATA / "flux" / "fp8", BASE, "a ModelOpt NVFP4 export was needed"),
        (BASE, BASE, "is diffusers"),
        (SINGLE, BASE, "export and base differ"),
        (SINGLE, DATA / "flux" / "fp8", "plain weights were needed"),
    ],
)
def test_a_wrong_export_or_base_is_refused(
    owner: Path, base: Path, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConvertError, match=said):
        mixed(Writing(output_dir=tmp_path / "out"), export=str(owner), base=str(base))


# plain weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", [SINGLE, MIXED])
def test_codes_and_scales_are_modelopts_own(owner: Path, single_base: Path, tmp_path: Path) -> None:
    """Siblings share a scale in the export, so q, k and v are where a scale of its own would show."""
    base, theirs = WAN if owner == MIXED else single_base, stored(owner)
    others = [layer.path for layer in plan_of(owner).layers if layer.encodings != ("nvfp4",)]
    writing = Writing(output_dir=tmp_path / "out")
    fresh(writing, source=str(base), pattern_preset="none", keep_bf16=others)
    ours = stored(tmp_path / "out")
    assert packed(ours) == packed(theirs)
    for layer in packed(ours):
        for leaf in ("weight", "weight_scale", "weight_scale_2"):
            assert same(ours[f"{layer}.{leaf}"], theirs[f"{layer}.{leaf}"]), (layer, leaf)
        assert f"{layer}.input_scale" not in ours


def test_calibrated_inputs_have_modelopts_scales(single_base: Path, tmp_path: Path) -> None:
    theirs = stored(SINGLE)
    scales = {name: theirs[f"{name}.input_scale"] for name in packed(theirs)}
    seen = {name: float((scale * 2688).bfloat16()) for name, scale in scales.items()}
    del seen["context_embedder"]
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(seen))
    writing, calibration = Writing(output_dir=tmp_path / "out"), Calibration(calibration=path)
    done = fresh(writing, source=str(single_base), pattern_preset="none", calibration=calibration)
    ours = stored(tmp_path / "out")
    assert all(same(ours[f"{name}.input_scale"], scales[name]) for name in seen)
    unseen = [layer.path for layer in done.plan.quantized if layer.path not in seen]
    assert "context_embedder" in unseen and done.to_json()["dynamic_inputs"] == len(unseen)
    assert not any(f"{name}.input_scale" in ours for name in unseen)


def test_for_vllm_the_same_codes_lie_under_inverse_scales(
    single_base: Path, tmp_path: Path
) -> None:
    seen = calibrated(tmp_path, [layer.path for layer in plan_of(single_base).layers])
    wanted = {"source": str(single_base), "pattern_preset": "none", "calibration": seen}
    fresh(Writing(output_dir=tmp_path / "out"), dialect="compressed_tensors", **wanted)
    fresh(Writing(output_dir=tmp_path / "multiplies"), **wanted)
    ours, theirs = stored(tmp_path / "out"), stored(tmp_path / "multiplies")
    layers = packed(theirs)
    for layer in layers:
        assert same(ours[f"{layer}.weight_packed"], theirs[f"{layer}.weight"]), layer
        assert same(ours[f"{layer}.weight_scale"], theirs[f"{layer}.weight_scale"]), layer
        for inverse, leaf in (("weight", "weight_scale_2"), ("input", "input_scale")):
            scale = ours[f"{layer}.{inverse}_global_scale"]
            assert torch.allclose(scale * theirs[f"{layer}.{leaf}"], torch.ones(1))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "nvfp4-pack-quantized"
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"] == "local"
    activation = plan_of(tmp_path / "out").layer(layers[0]).pieces[0].activation
    assert str(activation) == "nvfp4;tensor_scale=divide:group16:static"


def test_comfys_dialect_has_the_bytes_that_comfy_kitchen_makes_of_each_stored_weight(
    tmp_path: Path,
) -> None:
    file = tmp_path / "flux.safetensors"
    done = fresh(Writing(output_dir=file), source=str(BASE), dialect="comfy", pattern_preset="none")
    written, plain = load_file(file), stored(BASE)
    name, block = "double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn"
    whole = torch.cat([plain[f"{block}.to_{one}.weight"] for one in "qkv"])
    encode = ENCODINGS.load("nvfp4").encode
    assert encode is not None
    recipe = Recipe(granularity="group", arithmetic="comfy")
    made = encode(whole, Encoding("nvfp4"), recipe)
    codes = made[Role.CODES]
    assert same(written[f"{name}.weight"], codes << 4 | codes >> 4)
    assert same(written[f"{name}.weight_scale_2"], made[Role.TENSOR_SCALE])
    assert len(done.plan.quantized) == len(done.plan.layers)
    shards = Writing(output_dir=file, max_shard_size=1.0, overwrite=True)
    with pytest.raises(ConvertError, match="--max-shard-size would divide it"):
        fresh(shards, source=str(BASE), dialect="comfy", pattern_preset="none")


def test_the_family_decides_what_stays_and_the_report_says_what_the_rest_lost(
    tmp_path: Path,
) -> None:
    done = fresh(Writing(output_dir=tmp_path / "out"), source=str(BASE), keep_bf16=["*.to_out.0"])
    written = packed(stored(tmp_path / "out"))
    assert written == sorted(layer.path for layer in done.plan.quantized)
    assert "transformer_blocks.0.norm1.linear" not in written, "preset flux1-nvfp4"
    assert "transformer_blocks.0.attn.to_out.0" not in written
    assert 0.05 < done.to_json()["fidelity"]["median_relative_error"] < 0.15
    assert any("--keep-bf16-pattern *.to_out.0" in rule for rule in done.kept)


def test_too_large_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="worse than --max-error"):
        fresh(Writing(output_dir=tmp_path / "out", max_error=0.01), source=str(BASE))
    assert not any(tmp_path.iterdir())


# the command -------------------------------------------------------------------------------------


def typed(*words: object) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_prompts_are_drawn_and_what_was_seen_is_kept(tmp_path: Path) -> None:
    source = "emoji_flux/transformer"
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    calibrating = (
        "--calibrate",
        tmp_path / "prompts.txt",
        "--save-calibration",
        tmp_path / "c.json",
    )
    done = typed("--from-bf16", source, "--output-dir", tmp_path / "out", *calibrating)
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["quantized_layers"] > 0 and told["dynamic_inputs"] == 0
    seen = json.loads((tmp_path / "c.json").read_text())
    again = typed(
        *("--from-bf16", source, "--output-dir", tmp_path / "again"),
        *("--calibration", tmp_path / "c.json"),
    )
    assert again.exit_code == 0, again.stderr
    ours, twin = stored(tmp_path / "out"), stored(tmp_path / "again")
    assert all(same(value, twin[name]) for name, value in ours.items())
    assert set(packed(ours)) <= seen.keys()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--modelopt-hf-dir", SINGLE], "an export and its base"),
        (["--from-bf16", BASE, "--modelopt-hf-dir", SINGLE], "--modelopt-hf-dir says nothing"),
        (["--from-bf16", BASE, "--swap-weight-nibbles"], "--swap-weight-nibbles says nothing"),
    ],
)
def test_contradicting_options_are_refused(words: list[object], said: str, tmp_path: Path) -> None:
    refused = typed(*words, "--output-dir", tmp_path / "out")
    assert refused.exit_code == 2
    assert said in refused.stderr and "hint: " in refused.stderr


def test_an_export_takes_no_calibration(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("{}")
    words = ["--modelopt-hf-dir", SINGLE, "--base-transformer-dir", BASE]
    refused = typed(*words, "--output-dir", tmp_path / "out", "--calibration", tmp_path / "c.json")
    assert "--calibration says nothing beside --modelopt-hf-dir" in refused.stderr


def test_a_dry_run_says_the_same_and_writes_nothing(export: Path, tmp_path: Path) -> None:
    words = ("--modelopt-hf-dir", export, "--base-transformer-dir", BASE)
    words = (*words, "--pattern-preset", "auto", "--output-dir", tmp_path / "out")
    dry, done = typed(*words, "--dry-run"), typed(*words)
    told, wrote = json.loads(dry.stdout), json.loads(done.stdout)
    assert not told["files"] and wrote["files"]
    assert {key: told[key] for key in ("quantized_layers", "bytes", "kept")} == {
        key: wrote[key] for key in ("quantized_layers", "bytes", "kept")
    }
