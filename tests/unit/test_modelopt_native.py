"""ModelOpt's native saves, read from tensors alone, held against what the owner multiplies with."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffquant import headers, planner, sources
from diffquant.cli import run
from diffquant.errors import FormatError
from diffquant.pieces import canonical, decoded
from diffquant.plan import Plan
from diffquant.planner import Draft
from diffquant.tensors import Weights

NATIVE = Path(__file__).resolve().parents[1] / "data" / "modelopt" / "native"
COMPRESSED = ("fp8", "int8_sq", "mxfp8", "nvfp4")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def drafted(folder: Path) -> Draft:
    checkpoint = sources.checkpoint(str(folder))
    return planner.draft(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)


def digests(plan: Plan) -> dict[str, str]:
    """Weight -> the beginning of the SHA-256 of our decoding, in bfloat16 without negative zeros."""
    weights, found = Weights([Path(file.path) for file in plan.files]), {}
    for layer in plan.quantized:
        (piece,) = layer.pieces
        ours = decoded(piece, canonical(piece, weights)).bfloat16() + 0
        raw = ours.view(torch.uint8).numpy().tobytes()
        found[f"{layer.path}.weight"] = hashlib.sha256(raw).hexdigest()[:16]
    return found


def expected(scheme: str) -> dict[str, str]:
    return dict(json.loads((NATIVE / f"{scheme}.expected.json").read_text()))


@pytest.mark.parametrize("scheme", COMPRESSED)
def test_every_weight_is_to_the_bit_what_its_owner_multiplies_with(scheme: str) -> None:
    drawn = drafted(NATIVE / scheme)
    assert not drawn.problems
    assert drawn.plan.format == "modelopt_native"
    assert digests(drawn.plan) == expected(scheme)


@pytest.mark.parametrize("scheme", COMPRESSED)
def test_a_doubled_scale_is_noticed_in_its_layer_alone(scheme: str, tmp_path: Path) -> None:
    broken = shutil.copytree(NATIVE / scheme, tmp_path / "broken")
    tensors = load_file(broken / WEIGHTS)
    name = "context_embedder.weight_quantizer._scale"
    scale = tensors[name]
    doubled = scale + 1 if scale.dtype == torch.uint8 else (scale.float() * 2).to(scale.dtype)
    save_file(tensors | {name: doubled}, broken / WEIGHTS)
    ours, wanted = digests(drafted(broken).plan), expected(scheme)
    assert [name for name in wanted if ours[name] != wanted[name]] == ["context_embedder.weight"]


@pytest.mark.parametrize(
    ("scheme", "encoding", "activation"),
    [
        ("fp8", "fp8", "fp8:tensor:dynamic"),
        ("int8_sq", "int8", "int8:tensor:dynamic"),
        ("mxfp8", "mxfp8", "mxfp8:group32:dynamic"),
        ("nvfp4", "nvfp4", "nvfp4:group16:dynamic"),
    ],
)
def test_encodings_and_activations(scheme: str, encoding: str, activation: str) -> None:
    layer = drafted(NATIVE / scheme).plan.layer("transformer_blocks.0.attn.to_q")
    assert layer.encodings == (encoding,)
    assert str(layer.pieces[0].activation) == activation


def test_smoothing_multiplies_the_input() -> None:
    piece = drafted(NATIVE / "int8_sq").plan.layer("x_embedder").pieces[0]
    assert piece.smooth == "multiply"


def test_ranges_are_owned_with_a_reason_and_told() -> None:
    plan = drafted(NATIVE / "fp8").plan
    reasons = set(plan.unused.values())
    assert "a calibrated range; inputs are quantized by their own" in reasons
    assert "a range left by a quantizer that is declared, not applied" in reasons
    assert any("quantize dynamically instead" in note for note in plan.notes)


def test_a_save_that_was_never_compressed_is_refused_by_name() -> None:
    with pytest.raises(FormatError, match="never compressed") as raised:
        drafted(NATIVE / "fp8_fake")
    assert "build_modelopt_fp8_transformer" in str(raised.value)


def test_what_that_refusal_advises_makes_a_file_that_is_read(tmp_path: Path) -> None:
    words = ["--modelopt-hf-dir", str(NATIVE / "fp8_fake"), "--output-dir", str(tmp_path / "out")]
    command = ["convert", "build_modelopt_fp8_transformer", *words, "--model-type", "none"]
    assert run(command) == 0
    drawn = drafted(tmp_path / "out")
    assert not drawn.problems and drawn.plan.format == "modelopt"
    assert len(drawn.plan.quantized) == len(expected("fp8"))


def test_a_double_scale_that_is_lost_is_named(tmp_path: Path) -> None:
    broken = shutil.copytree(NATIVE / "nvfp4", tmp_path / "broken")
    tensors = load_file(broken / WEIGHTS)
    del tensors["x_embedder.weight_quantizer._double_scale"]
    save_file(tensors, broken / WEIGHTS)
    (problem,) = drafted(broken).problems
    assert problem.tensor == "x_embedder.weight" and "without its scale" in problem.what


def test_a_compression_nobody_knows_is_refused_by_name(tmp_path: Path) -> None:
    broken = shutil.copytree(NATIVE / "fp8", tmp_path / "broken")
    tensors = load_file(broken / WEIGHTS)
    tensors["x_embedder.weight"] = tensors["x_embedder.weight"].view(torch.uint8)
    save_file(tensors, broken / WEIGHTS)
    with pytest.raises(FormatError, match="'x_embedder.weight' is U8"):
        drafted(broken)
