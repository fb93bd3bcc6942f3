"""SVDQuant from plain weights: published names and sizes, a file that draws, and what each step gains.

Errors are ‖found - true‖ / ‖true‖, of a layer's outputs on rows it really read where nothing else is
said, inputs quantized as the file asks; figures are means over the layers of one block of the bundled
model.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import diffquant
from diffquant import exporting, headers, planner, sources
from diffquant.activations import quantized as rounded
from diffquant.cli import run
from diffquant.converters import _contract as contract
from diffquant.converters import _svdquant_samples as samples
from diffquant.converters._options import Choosing, Writing
from diffquant.converters.build_svdquant_transformer import build, main
from diffquant.encodings import ENCODINGS
from diffquant.errors import ConvertError, UsageError
from diffquant.families import FAMILIES, located
from diffquant.pieces import bias_of, canonical
from diffquant.plan import LayerPlan, Piece, Plan, Recode, Role
from diffquant.recode import Encoder
from diffquant.tensors import Weights
from tests.keytables import TABLES, sparse_checkpoint
from tests.unit.test_recognition import COUNT, SHEET, captions, recognised, training

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves

MODEL = "emoji_flux"
PROMPTS = ("red apple", "fox")
ROWS = 64
#: What single layers are measured on.
BLOCK = "single_transformer_blocks.0."
FLUX = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}
#: Nunchaku's two spellings of the parts of a layer.
ENDINGS = {
    "lora_down": "proj_down",
    "lora_up": "proj_up",
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
}
INT4, NVFP4 = "svdq-int4_r32-emoji_flux.safetensors", "svdq-fp4_r32-emoji_flux.safetensors"


@pytest.fixture(scope="module")
def truth() -> Plan:
    return contract.plain(MODEL)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of two pictures, fewer than usual."""
    path = tmp_path_factory.mktemp("samples") / "samples.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "ROWS", ROWS)
        samples.save(samples.drawn(MODEL, PROMPTS), path)
    return path


@pytest.fixture(scope="module")
def built(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated int4 file and an nvfp4 file without calibration, both under names of their own."""
    writing = Writing(output_dir=tmp_path_factory.mktemp("built"))
    build(writing, from_bf16=MODEL, rounds=1, calibration=rows)
    build(writing, from_bf16=MODEL, rounds=1, precision="nvfp4")
    return writing.output_dir


def planned(file: Path) -> Plan:
    checkpoint = sources.checkpoint(str(file))
    return planner.plan(checkpoint, headers.read(checkpoint.files), config={})


# names, shapes, metadata ---------------------------------------------------------------------


def plain_flux(folder: Path) -> str:
    """FLUX.1-dev in BF16 as 24 GB that are all hole."""
    header: dict[str, object] = {}
    offset = 0
    for name, shape in FAMILIES.load("flux1").inventory(FLUX).shapes.items():
        size = 2 * int(np.prod(shape))
        entry = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        header[name] = entry
        offset += size
    raw = json.dumps(header).encode()
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + offset)
    (folder / "config.json").write_text(json.dumps(FLUX))
    return str(folder)


def meant(name: str, naming: str) -> tuple[object, ...]:
    """A stored name as what it says: modules, slice of columns, part."""
    stem, _, ending = name.rpartition(".")
    rule = located(FAMILIES.load("flux1").namings[naming], stem)
    assert rule is not None
    return rule.rows, rule.cols, ENDINGS.get(ending, ending)


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_flux_has_the_published_keys_dtypes_and_shapes(precision: str, tmp_path: Path) -> None:
    source = plain_flux(tmp_path)
    plan = contract.quantized(contract.plain(source), f"svdq_{precision}", Choosing())
    prepared = exporting.prepare(plan, "nunchaku")
    table = sparse_checkpoint(f"flux1_v2_{precision}_r32", tmp_path, "FluxTransformer2DModel")
    wanted = {
        (*meant(name, "nunchaku_v2"), each.dtype, each.shape)
        for name, each in headers.read([table]).tensors.items()
    }
    made = {(*meant(t.name, "nunchaku"), t.dtype, t.shape) for t in prepared.tensors}
    assert made == wanted
    assert len(made) == {"int4": 2604, "nvfp4": 2908}[precision]
    assert not prepared.losses


def test_names_are_those_of_a_true_file(built: Path) -> None:
    """The packed tiny FLUX that upstream's converter wrote has one block of each kind, as ours."""
    table = json.loads((TABLES / "flux1_v1_tiny_int4.json").read_text())["keys"]
    with safe_open(built / INT4, "pt") as stored:
        made = set(stored.keys())
    assert made == {name for name in table if "guidance_embedder" not in name}


def test_metadata_says_what_nunchakus_readers_ask_for(built: Path, truth: Plan) -> None:
    for name, dtype, group in ((INT4, "int4", 64), (NVFP4, "fp4_e2m1_all", 16)):
        with safe_open(built / name, "pt") as stored:
            told = stored.metadata()
        block = json.loads(told["quantization_config"])
        assert told["model_class"] == "NunchakuFluxTransformer2dModel"
        assert json.loads(told["config"]) == dict(truth.config)
        assert (block["method"], block["rank"]) == ("svdquant", 32)
        assert (block["weight"]["dtype"], block["weight"]["group_size"]) == (dtype, group)


@pytest.mark.parametrize("name", [INT4, NVFP4])
def test_it_reads_back_as_a_whole_model(built: Path, truth: Plan, name: str) -> None:
    plan = planned(built / name)
    assert (plan.format, plan.open) == ("nunchaku", ())
    assert {layer.path for layer in plan.layers} == {layer.path for layer in truth.layers}
    assert len(plan.quantized) == 26
    assert all(layer.path.count(".") < 3 for layer in plan.layers if layer not in plan.quantized)
    shifted = [piece for layer in plan.layers for piece in layer.pieces if piece.shift]
    assert len(shifted) == (4 if name == INT4 else 0)


# what each step gains ------------------------------------------------------------------------


def changed(plan: Plan, **recode: Any) -> Plan:
    """The layers of one block that have a branch, with those fields in their recodes."""

    def change(piece: Piece) -> Piece:
        if piece.recode is None or piece.recode.rank is None:
            return piece
        return replace(piece, recode=replace(piece.recode, **recode))

    layers = (
        replace(layer, pieces=tuple(map(change, layer.pieces)))
        for layer in plan.layers
        if layer.path.startswith(BLOCK)
        and any(piece.recode and piece.recode.rank for piece in layer.pieces)
    )
    return replace(plan, layers=tuple(layers))


def figures(plan: Plan, rows: Path, invert: bool = False) -> tuple[float, float]:
    """Mean error of the outputs on rows of true input, and of the decoded weights.

    invert  a negative control: smoothing means the reciprocal of what was chosen
    """
    weights = Weights([Path(file.path) for file in plan.files])
    encoder, seen = Encoder(plan, weights), load_file(rows)
    found = [
        piece_figures(piece, encoder.parts(piece, held), held, seen[layer.path], invert)
        for layer in plan.layers
        for piece in layer.pieces
        for held in [canonical(piece, weights)]
    ]
    return tuple(np.mean(found, axis=0))  # type: ignore[return-value]


def piece_figures(
    piece: Piece, made: dict[Role, Tensor], held: dict[Role, Tensor], seen: Tensor, invert: bool
) -> tuple[float, float]:
    recode: Recode | None = piece.recode
    assert recode is not None and recode.activation is not None
    weight_NK = held[Role.CODES].float()
    x_MK = seen[:, piece.cols.as_slice()].float()
    smooth = made.get(Role.SMOOTH, torch.ones(weight_NK.shape[1])).float()
    codes = ENCODINGS.load(recode.encoding.name).decode(
        made, recode.encoding, (weight_NK.shape[0], weight_NK.shape[1])
    )
    divided = (x_MK + piece.shift) * (smooth if invert else 1 / smooth)
    branch = made[Role.LOWRANK_UP].float() @ made[Role.LOWRANK_DOWN].float()
    y_MN = rounded(divided.to(torch.bfloat16), recode.activation, {}).float() @ codes.T
    y_MN += x_MK @ branch.T + made[Role.BIAS].float()
    true_MN = x_MK @ weight_NK.T
    offset = held[Role.BIAS].float() if Role.BIAS in held else 0.0
    return (
        error(y_MN - offset, true_MN),
        error(codes / smooth + branch, weight_NK),
    )


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("scheme", ["svdq_int4", "svdq_nvfp4"])
def test_refining_loses_a_fifth_less_of_the_weights_than_a_plain_svd(
    truth: Plan, rows: Path, scheme: str
) -> None:
    plan = contract.quantized(truth, scheme)
    outputs, weights = zip(
        *(figures(changed(plan, rounds=rounds), rows) for rounds in (1, 6)), strict=True
    )
    assert weights[1] < 0.82 * weights[0]
    assert outputs[1] < 0.94 * outputs[0]


def test_smoothing_on_samples_loses_a_fifth_less_of_the_outputs(truth: Plan, rows: Path) -> None:
    plan = contract.quantized(truth, "svdq_int4")
    without, _ = figures(changed(plan, rounds=2), rows)
    smoothed = changed(samples.smoothed(plan, rows), rounds=2)
    within, _ = figures(smoothed, rows)
    assert within < 0.8 * without
    assert figures(smoothed, rows, invert=True)[0] > 3 * without


def test_biases_make_up_for_what_the_average_input_loses(truth: Plan, rows: Path) -> None:
    """A modulation layer always reads much the same, so most of what it loses is one constant."""
    plan = contract.quantized(truth, "svdq_int4")
    path = "single_transformer_blocks.0.norm.linear"
    x_MK = load_file(rows)[path].float()
    exact = dense_of(truth.layer(path), truth, x_MK)
    plain, made_up = (
        error(encoded_of(each.layer(path), each, x_MK), exact)
        for each in (plan, samples.smoothed(plan, rows))
    )
    assert made_up < 0.7 * plain


def dense_of(layer: LayerPlan, plan: Plan, x_MK: Tensor) -> Tensor:
    held = canonical(layer.pieces[0], Weights([Path(file.path) for file in plan.files]))
    return x_MK @ held[Role.CODES].float().T + held[Role.BIAS].float()


def encoded_of(layer: LayerPlan, plan: Plan, x_MK: Tensor) -> Tensor:
    weights = Weights([Path(file.path) for file in plan.files])
    (piece,) = layer.pieces
    made = Encoder(plan, weights).parts(piece, canonical(piece, weights))
    weight_NK = ENCODINGS.load("int4").decode(made, piece.runs_as, layer.shape_NK)
    bias = bias_of(layer, [made])
    assert bias is not None
    return x_MK @ weight_NK.T + bias.float()


def test_samples_are_rows_of_the_input_and_the_same_in_every_run(rows: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "ROWS", ROWS)
        again = samples.drawn(MODEL, PROMPTS)
    kept: Mapping[str, Tensor] = load_file(rows)
    assert all(torch.equal(again[name], tensor) for name, tensor in kept.items())
    assert kept["single_transformer_blocks.0.proj_out"].shape == (ROWS, 1280)
    one, other = kept["x_embedder"], kept["transformer_blocks.0.attn.to_q"]
    assert len(one) == len(other) and not torch.equal(one[:2], one[2:4])


# pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [INT4, NVFP4])
def test_what_it_draws_is_recognised(built: Path, name: str) -> None:
    pipeline = diffquant.load(MODEL, transformer_weights_path=str(built / name), device="cpu")
    drawn = training().draw(pipeline, captions()[:4])
    references = np.stack(np.split(np.asarray(Image.open(SHEET).convert("RGB")), COUNT, axis=1))
    assert training().nearest_glyphs(drawn, references) == [0, 1, 2, 3]


@pytest.mark.long
@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_every_caption_is_recognised_in_faithful_numerics(
    precision: Any, rows: Path, tmp_path: Path
) -> None:
    done = build(
        Writing(output_dir=tmp_path), from_bf16=MODEL, precision=precision, calibration=rows
    )
    pipeline = diffquant.load(
        MODEL,
        transformer_weights_path=str(done.files[0]),
        device="cpu",
        numerics="faithful",
    )
    assert recognised(pipeline) >= COUNT - 1


def test_what_is_quantized_while_loading_is_saved_as_the_same_thing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["generate", "--model-path", MODEL, "--prompt", "fox", "--num-inference-steps", "2"]
    online = ["--quantization", "svdq-int4", "--save-quantized", "kept"]
    assert run([*words, "--device", "cpu", *online]) == 0
    first = Path(capsys.readouterr().out.strip())
    assert run([*words, "--device", "cpu", "--transformer-path", "./kept"]) == 0
    second = Path(capsys.readouterr().out.strip())
    assert first != second
    with Image.open(first) as one, Image.open(second) as other:
        assert one.tobytes() == other.tobytes()


# the command ---------------------------------------------------------------------------------


def test_the_command_draws_prompts_keeps_samples_and_says_what_was_lost(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("fox\n")
    kept = tmp_path / "kept.safetensors"
    asked = ["--calibrate", str(tmp_path / "prompts.txt"), "--save-calibration", str(kept)]
    done = CliRunner().invoke(
        main,
        ["--from-bf16", MODEL, "--output-dir", str(tmp_path / "x.safetensors"), "--rounds", "1"]
        + [*asked, "--rank", "16", "--keep-bf16-pattern", "attn"],
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["format"], told["losses"]) == ("nunchaku", [])
    assert told["quantized_layers"] == 12
    assert told["fidelity"]["median_relative_error"] < 0.15
    assert kept.is_file() and (tmp_path / "x.safetensors").is_file()


def test_a_dry_run_writes_and_draws_nothing(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("fox\n")
    writing = Writing(output_dir=tmp_path / "out", dry_run=True)
    done = build(writing, from_bf16=MODEL, calibrate=tmp_path / "prompts.txt")
    assert not done.files and done.prepared.total_size > 4_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"rank": 40}, "multiples of 16"),
        ({"save_calibration": Path("x")}, "nothing to save"),
        ({"calibrate": Path("x"), "calibration": Path("y")}, "leave one of the two out"),
    ],
)
def test_options_that_cannot_be_met_are_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(Writing(output_dir=Path("nowhere")), from_bf16=MODEL, **asked)
    assert said in f"{caught.value} {caught.value.hint}"


def test_a_name_that_promises_something_else_is_refused(tmp_path: Path) -> None:
    writing = Writing(output_dir=tmp_path / "svdq-fp4_r32-x.safetensors")
    with pytest.raises(UsageError, match="promises svdq-fp4_r32, .* make svdq-int4_r32"):
        build(writing, from_bf16=MODEL)


def test_an_architecture_nunchaku_has_no_names_for_is_refused_before_anything(
    data: Path, tmp_path: Path
) -> None:
    source = data / "modelopt" / "wan" / "bf16"
    with pytest.raises(UsageError, match="no names for a WanTransformer3DModel") as caught:
        build(Writing(output_dir=tmp_path / "x.safetensors"), from_bf16=str(source))
    assert "flux1, qwen_image, z_image" in str(caught.value.hint)


def test_samples_of_another_model_are_refused(truth: Plan, tmp_path: Path) -> None:
    plan, file = contract.quantized(truth, "svdq_int4"), tmp_path / "x.safetensors"
    samples.save({"blocks.0.attn.to_q": torch.zeros(2, 8)}, file)
    with pytest.raises(ConvertError, match="which the model does not have"):
        samples.smoothed(plan, file)
    samples.save({"x_embedder": torch.zeros(2, 8)}, file)
    with pytest.raises(ConvertError, match="whose inputs have 32 columns"):
        samples.smoothed(plan, file)


def test_what_loses_too_much_is_not_kept(tmp_path: Path) -> None:
    writing = Writing(output_dir=tmp_path / "x.safetensors", max_error=0.01)
    with pytest.raises(ConvertError, match="worse than --max-error"):
        build(writing, from_bf16=MODEL, rounds=1)
    assert not list(tmp_path.iterdir())
