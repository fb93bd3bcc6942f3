"""Files that are wrong in one way each and look right: who notices in a comparison, and what is named.

The true files are those of `test_silent_failures.py`, where the reader errs; here the writer does. A
file is refused by the audit before anything is loaded, or answer 1 names the layer.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import diffquant
from diffquant.converters.dequantize import dequantize
from diffquant.errors import DiffquantError
from diffquant.layouts import LAYOUTS
from diffquant.pieces import dense
from diffquant.plan import Role
from diffquant.tensors import Weights
from tests import tiny
from tests.unit.test_silent_failures import FLUX, NUNCHAKU, SMOOTHED, WAN, planned

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves

WEIGHTS = "diffusion_pytorch_model.safetensors"
MODELOPT = tiny.DATA / "modelopt"
QUERY, KEY = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"
WAN_QUERY = "blocks.0.attn1.to_q"
FIRST_FC2, ADALN = "transformer_blocks.0.mlp_fc2", "transformer_blocks.0.norm1.linear"
GELU_SHIFT = 0.171875

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], Tensors]


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """What is done to which true file, and what has to be said of it."""

    what: str
    file: Path
    change: Change
    said: str


# the changes --------------------------------------------------------------------------------------


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: {**tensors, name: change(tensors[name]).contiguous()}


def nibbles_swapped(codes: Tensor) -> Tensor:
    return codes << 4 | codes >> 4


def unswizzled(scales: Tensor) -> Tensor:
    """From 128 x 4 tiles to rows, in a file whose other scales stay in tiles."""
    tiles = LAYOUTS.load("tiles_128x4")
    return tiles.undo(scales, Role.BLOCK_SCALE, tuple(scales.shape), ())


def exchanged(tensors: Tensors) -> Tensors:
    names = {QUERY: KEY, KEY: QUERY}

    def other(name: str) -> str:
        layer, _, part = name.rpartition(".")
        return f"{names.get(layer, layer)}.{part}"

    return {other(name): tensor for name, tensor in tensors.items()}


def without(name: str) -> Change:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def with_the_plain_bias(tensors: Tensors) -> Tensors:
    """The bias of a layer fed by GELU as the base has it: what the shift adds is not taken off."""
    layer = planned(NUNCHAKU).layer("transformer_blocks.0.ff.net.2")
    weight_NK, _ = dense(layer, Weights([NUNCHAKU]))
    order = LAYOUTS.load("nunchaku_mma")
    name = f"{FIRST_FC2}.bias"
    stored = tensors[name]
    bias = order.undo(stored, Role.BIAS, (len(stored),), ()).float()
    bias += GELU_SHIFT * weight_NK.sum(1)
    assert order.redo is not None
    plain = order.redo(bias.to(stored.dtype), Role.BIAS, (len(stored),), ())
    return {**tensors, name: plain}


BROKEN = (
    Broken(
        what="nibbles swapped",
        file=WAN,
        change=changed(f"{WAN_QUERY}.weight", nibbles_swapped),
        said=f"transformer.{WAN_QUERY}: weight error 1.41 (its half bytes are swapped)",
    ),
    Broken(
        what="scales of one layer in rows, all others in tiles",
        file=WAN,
        change=changed(f"{WAN_QUERY}.weight_scale", unswizzled),
        said=f"transformer.{WAN_QUERY}: weight error 0.701 (its block scales lie in rows, not in tiles)",
    ),
    Broken(
        what="scale transposed",
        file=WAN,
        change=changed(f"{WAN_QUERY}.weight_scale", lambda scale: scale.T),
        said=f"'{WAN_QUERY}.weight_scale' has shape [8, 128]",
    ),
    Broken(
        what="scale inverted",
        file=FLUX,
        change=changed(f"{QUERY}.weight_scale", lambda scale: 1 / scale),
        said=f"transformer.{QUERY}: weight error",
    ),
    Broken(
        what="scale dropped",
        file=FLUX,
        change=without(f"{QUERY}.weight_scale"),
        said=f"'{QUERY}.weight' is fp8 without its scale",
    ),
    Broken(
        what="scale of one",
        file=FLUX,
        change=changed(f"{QUERY}.weight_scale", torch.ones_like),
        said=f"transformer.{QUERY}: weight error",
    ),
    Broken(
        what="q and k exchanged",
        file=FLUX,
        change=exchanged,
        said="(q and k exchanged? it matches",
    ),
    Broken(
        what="halves of shift and scale not swapped",
        file=FLUX,
        change=changed(
            "norm_out.linear.weight",
            lambda weight: weight.view(torch.uint8).roll(128, 0).view(weight.dtype),
        ),
        said="its halves are exchanged: shift and scale?",
    ),
    Broken(
        what="bias without what the shift before GELU's layer adds",
        file=NUNCHAKU,
        change=with_the_plain_bias,
        said="transformer.transformer_blocks.0.ff.net.2",
    ),
    Broken(
        what="one more 1 in the modulation's bias",
        file=NUNCHAKU,
        change=changed(f"{ADALN}.bias", lambda bias: bias + 1),
        said=f"transformer.{ADALN}",
    ),
    Broken(
        what="smoothing left in an ignored layer, its scales gone",
        file=SMOOTHED,
        change=without(f"{WAN_QUERY}.pre_quant_scale"),
        said="columns are scaled: a scale dropped, divided, or smoothing left in it?",
    ),
)


# the bases ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, dict[str, Any]]:
    """Flags of a comparison for each true file: its base pipeline, and a reference drawn with it."""
    folder = tmp_path_factory.mktemp("bases")
    flux, wan = folder / "flux", folder / "wan"
    with_transformer(tiny.tiny_flux_pipeline(flux), MODELOPT / "flux" / "bf16")
    with_transformer(tiny.tiny_wan_pipeline(wan), MODELOPT / "wan" / "bf16")
    decoded = folder / "decoded"
    dequantize(str(NUNCHAKU), decoded, dtype="bf16")
    config = json.loads((decoded / "config.json").read_text())
    wide = {name: config[name] for name in tiny.TRANSFORMER if name in config}
    other = with_transformer(tiny.tiny_flux_pipeline(folder / "nunchaku", **wide), decoded)
    return {FLUX: drawn(flux), NUNCHAKU: drawn(other), WAN: drawn(wan), SMOOTHED: drawn(wan)}


def with_transformer(pipeline: Path, transformer: Path) -> Path:
    shutil.rmtree(pipeline / "transformer")
    (pipeline / "transformer").mkdir()
    for file in (*transformer.glob("config.json"), *transformer.glob("*.safetensors")):
        shutil.copy(file, pipeline / "transformer")
    return pipeline


def drawn(base: Path) -> dict[str, Any]:
    saved = base / "reference.safetensors"
    if not saved.exists():
        sizes: dict[str, Any] = {"width": 32, "height": 32, "num_inference_steps": 1}
        sizes |= {"num_frames": 5} if base.name == "wan" else {}
        flags = {"prompts": ["red car"], "max_sequence_length": 16, "device": "cpu", **sizes}
        diffquant.compare(str(base), save_reference=saved, **flags)
    return {"model_path": str(base), "device": "cpu", "saved_reference": saved}


def written(file: Path, change: Change, folder: Path) -> dict[str, Any]:
    """The flag that names a changed copy of the file."""
    weights = file if file.is_file() else file / WEIGHTS
    with safe_open(weights, "pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(weights)
    if file == SMOOTHED:  # cut down to a few layers; the base's others make it whole again
        tensors = {**load_file(MODELOPT / "wan" / "bf16" / WEIGHTS), **tensors}
    save_file(change(tensors), folder / weights.name, metadata)
    if file.is_file():
        return {"transformer_weights_path": str(folder / weights.name)}
    shutil.copy(file / "config.json", folder)
    return {"transformer_path": str(folder)}


def said_of(file: Path, change: Change, folder: Path, flags: dict[str, Any]) -> str:
    """The refusal, or what answer 1 finds wrong with layers."""
    try:
        found = diffquant.compare(**flags, **written(file, change, folder))
    except DiffquantError as error:
        return error.what
    (candidate,) = found.candidates
    assert all(layer.kernel is not None for layer in candidate.layers if layer.encoding != "dense")
    return "\n".join(text for text in candidate.verdict.defects if text.startswith("transformer."))


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.what)
def test_a_broken_file_is_refused_or_its_layer_named(
    broken: Broken, tmp_path: Path, bases: dict[Path, dict[str, Any]]
) -> None:
    said = said_of(broken.file, broken.change, tmp_path, bases[broken.file])
    assert broken.said in said, said


@pytest.mark.parametrize("file", [FLUX, WAN, NUNCHAKU, SMOOTHED], ids=lambda file: file.stem)
def test_nothing_is_said_of_the_file_as_it_was(
    file: Path, tmp_path: Path, bases: dict[Path, dict[str, Any]]
) -> None:
    assert said_of(file, dict, tmp_path, bases[file]) == ""


@pytest.fixture(scope="module")
def second_expert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Wan of two experts, and its second one in FP8."""
    folder = tmp_path_factory.mktemp("experts")
    base = tiny.tiny_wan_pipeline(folder / "wan", experts=2)
    flags: dict[str, Any] = {"quantization": "fp8", "quantize_all": True, "device": "cpu"}
    diffquant.load(str(base), save_quantized=str(folder / "fp8"), **flags)
    return base, folder / "fp8" / "transformer_2"


def test_one_expert_given_for_the_other_is_named(second_expert: tuple[Path, Path]) -> None:
    base, fp8 = second_expert
    with pytest.raises(
        DiffquantError, match="'transformer' was given the weights of 'transformer_2'"
    ):
        compared_experts(base, transformer_path=str(fp8))


def test_the_same_expert_in_its_own_place_passes(second_expert: tuple[Path, Path]) -> None:
    base, fp8 = second_expert
    (candidate,) = compared_experts(base, component_paths={"transformer_2": str(fp8)}).candidates
    assert not [text for text in candidate.verdict.defects if text.startswith("transformer")]
    assert {layer.encoding for layer in candidate.layers} == {"fp8", "dense"}


def compared_experts(base: Path, **flags: Any) -> Any:
    return diffquant.compare(
        str(base), prompts=["red car"], max_sequence_length=16, device="cpu",
        width=32, height=32, num_frames=5, num_inference_steps=2, **flags,
    )  # fmt: skip
