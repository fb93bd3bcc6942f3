"""The plan as data: canonical strings, stable digests, JSON that another tool can read."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from diffquant import headers, planner, sources
from diffquant.plan import (
    DENSE,
    Activation,
    Encoding,
    Layout,
    Plan,
    Role,
    Span,
    to_json,
)

FP8 = Path(__file__).resolve().parents[1] / "data" / "modelopt" / "flux" / "fp8"


def planned(source: Path) -> Plan:
    checkpoint = sources.checkpoint(str(source))
    return planner.plan(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned(FP8)


def test_the_digest_does_not_depend_on_the_directory(plan: Plan, tmp_path: Path) -> None:
    moved = planned(shutil.copytree(FP8, tmp_path / "else" / "where"))
    assert moved.files != plan.files
    assert moved.digest == plan.digest
    assert len(plan.digest) == 16


def test_the_digest_is_the_same_every_day(plan: Plan) -> None:
    assert plan.digest == planned(FP8).digest
    reordered = dataclasses.replace(plan, unused=dict(reversed(list(plan.unused.items()))))
    assert reordered.digest == plan.digest


@pytest.mark.parametrize(
    "change",
    [
        {"format": "comfy"},
        {"notes": ("something to know",)},
        {"config": {}},
        {"layers": ()},
    ],
)
def test_the_digest_sees_every_change(plan: Plan, change: dict[str, object]) -> None:
    assert dataclasses.replace(plan, **change).digest != plan.digest  # type: ignore[arg-type]


def test_the_digest_sees_one_activation(plan: Plan) -> None:
    first, *rest = plan.layers
    (piece,) = first.pieces
    changed = dataclasses.replace(first, pieces=(dataclasses.replace(piece, activation=None),))
    assert piece.activation is not None
    assert dataclasses.replace(plan, layers=(changed, *rest)).digest != plan.digest


def test_json_holds_names_and_not_directories(plan: Plan) -> None:
    told = json.loads(json.dumps(to_json(plan)))
    assert told["files"][0]["name"] == "diffusion_pytorch_model.safetensors"
    assert str(FP8) not in json.dumps(told)
    layer = next(layer for layer in told["layers"] if layer["path"].endswith("0.attn.to_q"))
    assert layer["pieces"][0]["encoding"] == "fp8"
    assert layer["pieces"][0]["activation"] == "fp8:tensor:static"


def test_every_layer_says_why(plan: Plan) -> None:
    quantized = {layer.why for layer in plan.quantized}
    assert quantized == {"config.json quantization_config FP8"}
    assert plan.layer("proj_out").why == "stored bfloat16"


@pytest.mark.parametrize(
    ("value", "spelled"),
    [
        (DENSE, "dense"),
        (Encoding("nvfp4", (("nibbles", "high"), ("block", "32"))), "nvfp4;block=32;nibbles=high"),
        (Layout("tiles_128x4"), "tiles_128x4"),
        (Activation(number="fp8", granularity="token", mode="dynamic"), "fp8:token:dynamic"),
        (
            Activation(number="int4", granularity="group", group=64, mode="dynamic", unsigned=True),
            "int4:group64:dynamic:unsigned",
        ),
        (
            Activation(number="int8", granularity="tensor", mode="static", symmetric=False),
            "int8:tensor:static:asymmetric",
        ),
    ],
)
def test_canonical_strings(value: object, spelled: str) -> None:
    assert str(value) == spelled


def test_spans_count_what_they_take() -> None:
    assert len(Span(2, 10)) == 8
    assert len(Span(1, 10, 3)) == len(range(10)[Span(1, 10, 3).as_slice()]) == 3


def test_parts_are_found_by_role(plan: Plan) -> None:
    (piece,) = plan.quantized[0].pieces
    scale = piece.part(Role.TENSOR_SCALE)
    assert scale is not None and scale.ref.name.endswith(".weight_scale")
    assert piece.part(Role.SMOOTH) is None
    assert Role.CODES in piece.roles


def test_a_plan_cannot_be_changed_in_place(plan: Plan) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.format = "comfy"  # type: ignore[misc]
