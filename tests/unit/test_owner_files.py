"""Files that a dialect's own library wrote: every layer decodes to its numbers, bit by bit, and a folder
becomes the model that those numbers make.

A fixture is a folder with config.json and owner.json, or a lone file with `<name>.owner.json` beside it:
SHA-256 of each weight as float32. Scripts under tests/oracle write both.
"""

import hashlib
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffquant import device, headers, materialize, planner, sources
from diffquant.classes import skeleton
from diffquant.kernels import choose
from diffquant.pieces import canonical, decoded, dense
from diffquant.plan import Plan
from diffquant.tensors import Weights

DATA = Path(__file__).resolve().parents[1] / "data"
ANSWERS = sorted(DATA.rglob("*owner.json"))
FOLDERS = [path.parent for path in ANSWERS if path.name == "owner.json"]
LIMIT = 3.5e-3


def source_of(answers: Path) -> Path:
    lone = answers.with_name(answers.name.removesuffix(".owner.json") + ".safetensors")
    return answers.parent if answers.name == "owner.json" else lone


@cache
def plan_of(source: Path) -> Plan:
    checkpoint = sources.checkpoint(str(source))
    header = headers.read(checkpoint.files)
    return planner.plan(checkpoint, header, config=checkpoint.config)


def digest(weight: Tensor) -> str:
    return hashlib.sha256(weight.float().contiguous().numpy().tobytes()).hexdigest()


def weights_of(source: Path) -> dict[str, Tensor]:
    """The stored weight of every quantized layer."""
    plan = plan_of(source)
    weights = Weights([Path(file.path) for file in plan.files])
    pieces = {layer.path: layer.pieces[0] for layer in plan.quantized}
    return {path: decoded(piece, canonical(piece, weights)) for path, piece in pieces.items()}


def name(path: Path) -> str:
    return str(path.relative_to(DATA).with_suffix(""))


@pytest.mark.parametrize("answers", ANSWERS, ids=name)
def test_every_layer_decodes_to_its_owners_numbers(answers: Path) -> None:
    wanted = json.loads(answers.read_text())
    assert {path: digest(each) for path, each in weights_of(source_of(answers)).items()} == wanted


@pytest.mark.parametrize("answers", ANSWERS, ids=name)
def test_a_last_bit_would_be_seen(answers: Path) -> None:
    wanted = json.loads(answers.read_text())
    for path, weight in weights_of(source_of(answers)).items():
        weight.view(torch.int32)[0, 0] ^= 1
        assert digest(weight) != wanted[path]


def built(plan: Plan) -> nn.Module:
    cpu = device.parse("cpu")
    choices = [choose(layer, cpu) for layer in plan.layers]
    return materialize.materialize(plan, choices, device=torch.device("cpu"), dtype=torch.float32)


def dense_model(plan: Plan) -> nn.Module:
    """The model with the decoded weights as plain ones."""
    weights = Weights([Path(file.path) for file in plan.files])
    model = built(plan)
    plain = {key: each for key, each in model.state_dict().items() if "piece" not in key}
    for layer in plan.layers:
        plain[f"{layer.path}.weight"], bias = dense(layer, weights)
        if bias is not None:
            plain[f"{layer.path}.bias"] = bias
    twin = skeleton(plan.config, torch.float32)
    known = dict(twin.named_parameters())
    twin.load_state_dict({k: v for k, v in plain.items() if k in known}, strict=True, assign=True)
    return twin.eval()


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_a_folder_becomes_the_model_of_its_weights(folder: Path) -> None:
    plan = plan_of(folder)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 4, plan.config["in_channels"], generator=generator),
        "encoder_hidden_states": torch.randn(
            1, 3, plan.config["joint_attention_dim"], generator=generator
        ),
        "pooled_projections": torch.randn(
            1, plan.config["pooled_projection_dim"], generator=generator
        ),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    with torch.no_grad():
        ours, wanted = (model(**inputs).sample for model in (built(plan), dense_model(plan)))
    assert bool(wanted.isfinite().all()) and wanted.std() > 0
    assert (ours - wanted).norm() / wanted.norm() < LIMIT
