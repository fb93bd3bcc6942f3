"""What every format with a way out promises: what it writes is read back as what it was.

A new `write` and a new checkpoint under `tests/data` are tested on arrival, each against all others.
"""

import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffquant import exporting, headers, planner, settle, sources
from diffquant.errors import DiffquantError, FormatError
from diffquant.formats import FORMATS, Export
from diffquant.pieces import bias_of, canonical, decoded
from diffquant.plan import ROW_MAJOR, LayerPlan, Piece, Plan, Role
from diffquant.tensors import Weights

DATA = Path(__file__).resolve().parents[1] / "data"
WRITERS = exporting.writable()
#: The one plain model among them; others are what quantized ones were made from.
PLAIN = "modelopt/wan/bf16"
#: How many checkpoints each dialect can say at least, so that a writer cannot refuse its way through.
SAID = {
    "modelopt": 20,
    "comfy": 20,
    "fp8": 5,
    "nunchaku": 1,
    "bfl": 1,
    "diffusers": 1,
    "compressed_tensors": 12,
}


@cache
def plans() -> dict[str, Plan]:
    """Every whole checkpoint under tests/data as a settled plan; other files there are no models."""
    folders = {path.parent for path in DATA.rglob("config.json")}
    lone = {path for path in DATA.rglob("*.safetensors") if path.parent not in folders}
    found = {}
    for source in sorted(folders | lone):
        try:
            found[str(source.relative_to(DATA))] = read(source)
        except DiffquantError:
            continue
    bare = set(found) - {PLAIN}
    return {name: plan for name, plan in found.items() if name not in bare or plan.quantized}


def read(source: Path, like: Plan | None = None) -> Plan:
    checkpoint = sources.checkpoint(str(source))
    header = headers.read(checkpoint.files)
    if like is None:
        return settle.settle(planner.plan(checkpoint, header, config=checkpoint.config))
    inventory = planner.inventory_of(like)
    return planner.plan(checkpoint, header, config=like.config, inventory=inventory)


def written(plan: Plan, name: str, folder: Path, export: Export | None = None) -> Plan:
    """The plan of the file that was written."""
    prepared = exporting.prepare(plan, name, export=export)
    output = folder / ("component" if prepared.is_folder else "model.safetensors")
    exporting.save(prepared, output, overwrite=True)
    return read(output, plan)


def weights(plan: Plan) -> Weights:
    return Weights([Path(file.path) for file in plan.files])


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def values(layer: LayerPlan, held: Weights) -> list[Tensor]:
    """Decoded weights, bias, and whatever stands before or beside the product."""
    parts = [canonical(piece, held) for piece in layer.pieces]
    found = [decoded(piece, part) for piece, part in zip(layer.pieces, parts, strict=True)]
    bias = bias_of(layer, parts)
    beside = {Role.SMOOTH, Role.LOWRANK_DOWN, Role.LOWRANK_UP, Role.INPUT_SCALE}
    others = [part[role] for part in parts for role in sorted(beside & part.keys())]
    return [*found, *others, *([] if bias is None else [bias])]


def differs(one: Plan, other: Plan) -> str | None:
    """The first layer or parameter whose numbers are not the same bits."""
    held, back = weights(one), weights(other)
    for layer in one.layers:
        pairs = zip(values(layer, held), values(other.layer(layer.path), back), strict=False)
        if any(not torch.equal(bits(first), bits(second)) for first, second in pairs):
            return layer.path
    return None


def meaning(piece: Piece) -> tuple[object, ...]:
    return (piece.encoding, piece.out, piece.cols, piece.shift, piece.rotation, piece.lowrank_input)


@pytest.mark.parametrize("name", WRITERS)
def test_what_it_writes_is_read_back_as_the_plan_it_was(name: str, tmp_path: Path) -> None:
    said = 0
    for case, plan in plans().items():
        try:
            back = written(plan, name, tmp_path)
        except FormatError as refusal:
            assert str(refusal), case
            continue
        said += 1
        assert [layer.path for layer in back.layers] == [layer.path for layer in plan.layers], case
        for layer in plan.layers:
            found = back.layer(layer.path).pieces
            assert [meaning(piece) for piece in found] == [meaning(it) for it in layer.pieces], case
        assert {item.name for item in back.plain} == {item.name for item in plan.plain}, case
        assert differs(plan, back) is None, case
    assert said >= SAID.get(name, 1)


@pytest.mark.parametrize("name", WRITERS)
def test_its_own_files_come_out_byte_for_byte(name: str, tmp_path: Path) -> None:
    own = {case: plan for case, plan in plans().items() if plan.format == name}
    for case, plan in own.items():
        try:
            back = written(plan, name, tmp_path)
        except FormatError as refusal:
            assert "4 are read" in str(refusal), case  # ComfyUI's 8-bit variant of asym_w4a8
            continue
        held, again = weights(plan), weights(back)
        for layer in plan.layers:
            for piece, other in zip(layer.pieces, back.layer(layer.path).pieces, strict=True):
                assert piece.activation == other.activation, case
                for part in piece.parts:
                    twin = other.part(part.role)
                    assert twin is not None
                    if part.layout == twin.layout:
                        first = held.tensor(part.ref.file, part.ref.name)
                        second = again.tensor(twin.ref.file, twin.ref.name)
                        assert torch.equal(bits(first), bits(second)), (case, part)


@pytest.mark.parametrize("name", WRITERS)
def test_it_names_every_layer_or_refuses(name: str) -> None:
    writer = FORMATS.load(name).write
    assert writer is not None
    refused = 0
    for plan in plans().values():
        try:
            export = writer(plan)
        except FormatError:
            refused += 1
            continue
        members = {member for layer in export.layers for member in layer.members}
        assert {path for path, _ in members} == {layer.path for layer in plan.layers}
    assert refused or name == "modelopt"


def test_writers_need_no_torch() -> None:
    """Which tensors a file will have is known from headers alone."""
    code = """
import sys
from diffquant import headers, planner, sources
from diffquant.formats import FORMATS
found = sources.checkpoint(sys.argv[1])
plan = planner.plan(found, headers.read(found.files), config=found.config)
sizes = {name: len(FORMATS.load(name).write(plan).layers) for name in ("modelopt", "comfy", "fp8")}
assert set(sizes.values()) == {len(plan.layers)} and "torch" not in sys.modules
"""
    source = str(DATA / "modelopt" / "wan" / "fp8")
    subprocess.run([sys.executable, "-c", code, source], check=True)


@pytest.mark.parametrize("role", [Role.CODES, Role.BLOCK_SCALE])
def test_a_wrong_layout_in_the_export_breaks_it(role: Role, tmp_path: Path) -> None:
    plan = plans()["comfy/nvfp4.safetensors"]
    writer = FORMATS.load("comfy").write
    assert writer is not None
    right = writer(plan)
    (layer,) = right.layers
    parts = (replace(part, layout=ROW_MAJOR) if part.role is role else part for part in layer.parts)
    wrong = replace(right, layers=(replace(layer, parts=tuple(parts)),))
    assert differs(plan, written(plan, "comfy", tmp_path, right)) is None
    assert differs(plan, written(plan, "comfy", tmp_path, wrong)) == layer.name


def test_rows_follow_the_reader_whatever_order_members_come_in(tmp_path: Path) -> None:
    plan = plans()["nunchaku/tiny_flux/svdq-int4_r32-tiny-flux.safetensors"]
    writer = FORMATS.load("nunchaku").write
    assert writer is not None
    right = writer(plan)
    fused = next(layer for layer in right.layers if len(layer.members) == 3)
    turned = replace(fused, members=fused.members[::-1])
    layers = tuple(turned if layer is fused else layer for layer in right.layers)
    back = written(plan, "nunchaku", tmp_path, replace(right, layers=layers))
    assert differs(plan, back) is None
