"""Plain weights as MXFP8, MXFP4 and INT8: what is written loads, and is what the codecs make."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffquant import headers, online, planner, sources
from diffquant.converters import _report
from diffquant.converters._contract import convert, plain, quantized
from diffquant.converters._options import Choosing, Writing
from diffquant.converters._report import compared
from diffquant.converters.build_mx_transformer import build, main
from diffquant.encodings import ENCODINGS, Recipe
from diffquant.errors import ConvertError, UsageError
from diffquant.plan import Encoding, Plan, Role

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn.to_q"
EVERYTHING = Choosing(preset="none")


@pytest.fixture
def flux(data: Path) -> str:
    return str(data / "modelopt" / "flux" / "bf16")


def plan_of(source: Path) -> Plan:
    checkpoint = sources.checkpoint(str(source))
    return planner.plan(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)


def original(source: str, name: str) -> Tensor:
    found: Tensor = load_file(Path(source) / WEIGHTS)[name]
    return found


@pytest.mark.parametrize(("encoding", "most"), [("mxfp8", 0.03), ("mxfp4", 0.15), ("int8", 0.015)])
def test_every_encoding_becomes_a_component_that_reads_back(
    flux: str, encoding: str, most: float, tmp_path: Path
) -> None:
    done = build(flux, Writing(output_dir=tmp_path / "out"), encoding=encoding)
    read = plan_of(tmp_path / "out")
    assert {layer.path for layer in read.quantized} == {layer.path for layer in done.plan.quantized}
    errors = [each.fidelity.relative_error for each in done.report.layers if each.fidelity]
    assert 0.001 < min(errors) <= max(errors) < most
    assert errors == sorted(errors, reverse=True)


def test_the_codes_are_those_of_the_codec(flux: str, tmp_path: Path) -> None:
    build(flux, Writing(output_dir=tmp_path / "out"), encoding="mxfp8", choosing=EVERYTHING)
    made = load_file(tmp_path / "out" / WEIGHTS)
    encode = ENCODINGS.load("mxfp8").encode
    assert encode is not None
    recipe = Recipe(granularity="group", group=32)
    parts = encode(original(flux, f"{LAYER}.weight"), Encoding("mxfp8"), recipe)
    assert torch.equal(
        made[f"{LAYER}.weight"].view(torch.uint8), parts[Role.CODES].view(torch.uint8)
    )
    assert torch.equal(made[f"{LAYER}.weight_scale"], parts[Role.BLOCK_SCALE])


def test_comfy_gets_one_file_under_the_original_names(flux: str, tmp_path: Path) -> None:
    output = tmp_path / "flux.safetensors"
    done = build(flux, Writing(output_dir=output), encoding="mxfp8", dialect="comfy")
    assert done.files == (output,)
    assert "double_blocks.0.img_attn.qkv.weight_scale" in load_file(output)
    with pytest.raises(UsageError, match=r"comfy is one \.safetensors file"):
        build(flux, Writing(output_dir=tmp_path / "out"), encoding="mxfp8", dialect="comfy")


def test_preset_and_typed_patterns_decide_what_stays(flux: str, tmp_path: Path) -> None:
    everything = quantized(plain(flux), "mxfp8", EVERYTHING)
    careful = quantized(plain(flux), "mxfp8")
    typed = quantized(plain(flux), "mxfp8", Choosing(preset="none", keep_bf16_pattern=("to_q$",)))
    kept = {layer.path for layer in everything.quantized} - {
        layer.path for layer in typed.quantized
    }
    assert len(everything.quantized) > len(careful.quantized)
    assert kept
    assert all(path.endswith("to_q") for path in kept)
    assert "family flux1 calls it sensitive" in " ".join(careful.notes)
    with pytest.raises(UsageError, match="'to_qq' matches no linear layer"):
        quantized(plain(flux), "mxfp8", Choosing(keep_bf16_pattern=("to_qq",)))


def test_a_preset_file_takes_the_place_of_the_familys(flux: str, tmp_path: Path) -> None:
    text = 'family = "flux1"\n[[keep]]\npatterns = ["**.to_q"]\nreason = "r"\nsource = "s"\n'
    (tmp_path / "mine.toml").write_text(text)
    plan = quantized(plain(flux), "mxfp8", Choosing(preset=str(tmp_path / "mine.toml")))
    stays = {layer.path for layer in plan.layers} - {layer.path for layer in plan.quantized}
    assert LAYER in stays
    assert "preset mine (r)" in " ".join(plan.notes)


def test_a_layer_that_loses_too_much_stops_everything(flux: str, tmp_path: Path) -> None:
    ask = Writing(output_dir=tmp_path / "out", max_error=0.1, report=tmp_path / "all.json")
    with pytest.raises(ConvertError, match=r"the worst is '.*' with 0\.1") as refused:
        build(flux, ask, encoding="mxfp4")
    assert "--keep-bf16-pattern" in str(refused.value.hint)
    assert [path.name for path in tmp_path.iterdir()] == ["all.json"]
    assert json.loads((tmp_path / "all.json").read_text())[0]["relative_error"] > 0.1
    build(flux, Writing(output_dir=tmp_path / "out", max_error=0.15), encoding="mxfp4")


def test_a_wrongly_written_weight_is_seen_by_the_report(flux: str, tmp_path: Path) -> None:
    """The negative control: the report reads the file, it does not repeat what was meant."""
    build(flux, Writing(output_dir=tmp_path / "out"), encoding="mxfp8")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    tensors[f"{LAYER}.weight_scale"] += 1  # twice as large
    save_file(tensors, tmp_path / "out" / WEIGHTS)
    worst = compared(plan_of(tmp_path / "out"), plain(flux)).layers[0]
    assert worst.path == LAYER
    assert worst.fidelity is not None
    assert worst.fidelity.relative_error == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("elements", [96 * 7, 1 << 30])
def test_a_report_does_not_depend_on_how_many_rows_are_looked_at_together(
    flux: str, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = build(flux, Writing(output_dir=tmp_path / "out"), encoding="mxfp8")
    monkeypatch.setattr(_report, "ELEMENTS", elements)
    again = compared(plan_of(tmp_path / "out"), plain(flux))
    for one, other in zip(done.report.layers[:3], again.layers[:3], strict=True):
        assert one.path == other.path
        assert one.fidelity is not None
        assert other.fidelity is not None
        assert one.fidelity.relative_error == pytest.approx(other.fidelity.relative_error, rel=1e-4)


def test_quantized_weights_are_not_quantized_again(data: Path, tmp_path: Path) -> None:
    source = str(data / "modelopt" / "flux" / "fp8")
    with pytest.raises(ConvertError, match=r"is fp8 already \(modelopt\)") as refused:
        build(source, Writing(output_dir=tmp_path / "out"), encoding="mxfp8")
    assert "dequantize" in str(refused.value.hint)


def test_inputs_that_have_no_scale_of_their_own_are_not_calibrated(flux: str) -> None:
    with pytest.raises(
        UsageError, match="calibration has nothing to give: inputs are mxfp8:group32"
    ):
        quantized(plain(flux), "mxfp8", amax={LAYER: 1.0})


def test_calibrated_inputs_become_static_scales(flux: str, tmp_path: Path) -> None:
    truth = plain(flux)
    plan = quantized(truth, "nvfp4", EVERYTHING, {LAYER: 5.376})
    convert(plan, truth, "modelopt", Writing(output_dir=tmp_path / "out"))
    made = load_file(tmp_path / "out" / WEIGHTS)
    assert made[f"{LAYER}.input_scale"].item() == pytest.approx(5.376 / (6 * 448))
    layer = plan_of(tmp_path / "out").layer(LAYER)
    assert layer.pieces[0].activation is not None
    assert layer.pieces[0].activation.mode == "static"
    assert not [name for name in made if name.endswith("input_scale") and LAYER not in name]


def test_without_amax_nothing_changes(flux: str) -> None:
    plan = quantized(plain(flux), "nvfp4", EVERYTHING)
    assert online.calibrated(plan, {LAYER: 0.0}) == plan


def test_the_command_says_what_it_would_do_and_then_does_it(flux: str, tmp_path: Path) -> None:
    typed = ["--from-bf16", flux, "--encoding", "mxfp8", "--output-dir", str(tmp_path / "out")]
    dry = CliRunner().invoke(main, [*typed, "--dry-run"])
    assert "nothing written (--dry-run)" in dry.stderr
    assert not list(tmp_path.iterdir())
    ran = CliRunner().invoke(main, typed)
    would, did = json.loads(dry.stdout), json.loads(ran.stdout)
    assert would["bytes"] == did["bytes"]
    assert would["kept"] == did["kept"]
    assert would["kept"] and all(" stay" in rule for rule in would["kept"])
    assert len(did["fidelity"]["worst"]) == 10
    assert ran.stderr.startswith("layer ")
    again = CliRunner().invoke(main, [*typed, "--dry-run"])
    assert (again.exit_code, "--overwrite" in again.stderr) == (1, True)
