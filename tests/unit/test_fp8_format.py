"""Generic FP8 (config.json or header) and raw float8 casts, spelled out from B1 and 2.1."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffquant import headers, planner
from diffquant.errors import FormatError
from diffquant.formats import NO_HINTS, Hints
from diffquant.pieces import dense
from diffquant.plan import Plan
from diffquant.planner import Draft
from diffquant.sources import Checkpoint
from diffquant.tensors import Weights

ONES = torch.ones(256, 384, dtype=torch.float8_e4m3fn)
DYNAMIC = {"quant_method": "fp8", "activation_scheme": "dynamic"}
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
RAW = Hints(raw_fp8=True)


def drafted(
    folder: Path,
    tensors: dict[str, Tensor],
    block: dict[str, Any] | None = None,
    *,
    metadata: dict[str, str] | None = None,
    hints: Hints = NO_HINTS,
) -> Draft:
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata)
    config = {} if block is None else {"quantization_config": block}
    source = Checkpoint(origin="a model", root=folder, files=(path,), config=config)
    return planner.draft(source, headers.read(source.files), config={}, hints=hints)


def weight(plan: Plan) -> Tensor:
    return dense(plan.layers[0], Weights([Path(file.path) for file in plan.files]))[0]


@pytest.mark.parametrize(
    ("name", "scale", "activation"),
    [
        ("weight_scale", torch.tensor(2.0), "fp8:token:dynamic"),
        ("weight_scale", torch.tensor([2.0]), "fp8:token:dynamic"),
        ("weight_scale", torch.arange(256.0), "fp8:token:dynamic"),
        ("weight_scale", torch.arange(256.0).reshape(256, 1), "fp8:token:dynamic"),
        ("weight_scale_inv", torch.arange(6.0).reshape(2, 3), "fp8:group128:dynamic"),
    ],
)
def test_every_granularity_multiplies(
    name: str, scale: Tensor, activation: str, tmp_path: Path
) -> None:
    plan = drafted(tmp_path, {"a.weight": ONES, f"a.{name}": scale}, DYNAMIC).plan
    expected = scale.reshape(-1, 1) if scale.numel() in (1, 256) else scale
    if expected.shape[1] == 3:
        expected = expected.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert plan.format == "fp8"
    assert torch.equal(weight(plan), expected.expand(256, 384))
    assert str(plan.layers[0].pieces[0].activation) == activation


def test_other_block_sizes_come_from_the_configuration(tmp_path: Path) -> None:
    block = DYNAMIC | {"weight_block_size": [64, 128]}
    scale = torch.arange(12.0).reshape(4, 3)
    plan = drafted(tmp_path, {"a.weight": ONES, "a.weight_scale_inv": scale}, block).plan
    expected = scale.repeat_interleave(64, 0).repeat_interleave(128, 1)
    assert torch.equal(weight(plan), expected)
    with pytest.raises(FormatError, match=r"blocks of 128 x 128 .* need \[2, 3\]"):
        drafted(tmp_path, {"a.weight": ONES, "a.weight_scale_inv": scale}, DYNAMIC)


def test_static_needs_an_input_scale_and_says_where_it_is_missing(tmp_path: Path) -> None:
    scale = torch.tensor(2.0)
    tensors = {
        "a.weight": ONES,
        "a.weight_scale": scale,
        "a.input_scale": torch.tensor(0.5),
        "b.weight": ONES.clone(),
        "b.weight_scale": scale.clone(),
    }
    plan = drafted(tmp_path, tensors, STATIC).plan
    asked = {layer.path: str(layer.pieces[0].activation) for layer in plan.layers}
    assert asked == {"a": "fp8:tensor:static", "b": "fp8:token:dynamic"}
    assert "first 'b'" in plan.notes[0]


@pytest.mark.parametrize("block", [DYNAMIC, {"activation_scheme": "dynamic"}])
def test_the_header_may_declare_it_too(block: dict[str, Any], tmp_path: Path) -> None:
    tensors = {"a.weight": ONES, "a.weight_scale": torch.tensor(2.0)}
    metadata = {"quantization_config": json.dumps(block)}
    assert drafted(tmp_path, tensors, metadata=metadata).plan.format == "fp8"


def test_scales_without_a_declaration_are_an_error(tmp_path: Path) -> None:
    tensors = {"a.weight": ONES, "a.weight_scale": torch.tensor(2.0)}
    with pytest.raises(FormatError, match="nothing in it says how"):
        drafted(tmp_path, tensors)
    with pytest.raises(FormatError, match="no raw cast"):
        drafted(tmp_path, tensors, hints=RAW)


def test_a_lost_scale_is_named(tmp_path: Path) -> None:
    (problem,) = drafted(tmp_path, {"a.weight": ONES}, DYNAMIC).problems
    assert problem.tensor == "a.weight" and "without its scale" in problem.what


# raw ---------------------------------------------------------------------------------------------


def test_raw_float8_is_read_when_a_person_says_so_and_only_then(tmp_path: Path) -> None:
    tensors = {
        "a.weight": ONES,
        "a.bias": torch.ones(256, dtype=torch.float8_e4m3fn),
        "norm.weight": torch.ones(4, dtype=torch.float8_e4m3fn),
    }
    with pytest.raises(FormatError, match="nothing in it says how"):
        drafted(tmp_path, tensors)
    drawn = drafted(tmp_path, tensors, hints=RAW)
    assert not drawn.problems and drawn.plan.format == "raw_fp8"
    assert torch.equal(weight(drawn.plan), ONES.float())
    assert drawn.plan.layers[0].pieces[0].activation is None


def test_e5m2_is_not_read_as_e4m3(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.full((4, 8), 1.75).to(torch.float8_e5m2)}
    assert torch.equal(weight(drafted(tmp_path, tensors, hints=RAW).plan), torch.full((4, 8), 1.75))


def test_the_word_does_not_outvote_a_format(tmp_path: Path) -> None:
    tensors = {"a.weight": ONES, "a.weight_scale": torch.tensor(2.0)}
    assert drafted(tmp_path, tensors, DYNAMIC, hints=RAW).plan.format == "fp8"


def test_integers_are_no_raw_float8(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="'a.weight' is I8"):
        drafted(tmp_path, {"a.weight": ONES.view(torch.int8)}, hints=RAW)
