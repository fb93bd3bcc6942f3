"""Open questions answered from true files whose answer is known and hidden."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffquant import headers, planner, settle, sources
from diffquant.errors import PlanError
from diffquant.formats._svdquant import MMA, PACKED, ROWS
from diffquant.plan import ROW_MAJOR, Layout, Plan, Question, Role

DATA = Path(__file__).resolve().parents[1] / "data"
SVDQ = DATA / "nunchaku" / "tiny_flux" / "svdq-int4_r32-tiny-flux.safetensors"
SWIZZLED = DATA / "settle" / "wan_nvfp4_swizzle"
TILES = Layout("tiles_128x4")


def planned(source: Path) -> Plan:
    checkpoint = sources.checkpoint(str(source))
    header = headers.read(checkpoint.files)
    return planner.plan(checkpoint, header, config=checkpoint.config)


def layouts(plan: Plan, role: Role) -> set[Layout]:
    """The layouts that parts of that role have."""
    return {
        part.layout
        for layer in plan.quantized
        for piece in layer.pieces
        for part in piece.parts
        if part.role is role
    }


def asked(plan: Plan, topic: str, candidates: dict[Role, tuple[Layout, ...]]) -> Plan:
    """The plan with these layouts put in question, where the first of them is at stake."""
    first, known = next(iter(candidates.items()))
    paths = tuple(
        layer.path
        for layer in plan.quantized
        if any(
            part.role is first and part.layout in known
            for piece in layer.pieces
            for part in piece.parts
        )
    )
    questions = (
        Question(topic=topic, role=role, layouts=pair, paths=paths, why="a test hides it")
        for role, pair in candidates.items()
    )
    return replace(plan, open=tuple(questions))


def packing(plan: Plan, *, rows_first: bool) -> Plan:
    pairs = {role: (MMA, ROWS[role]) for role in PACKED}
    if rows_first:
        pairs = {role: (rows, packed) for role, (packed, rows) in pairs.items()}
    return asked(plan, "nunchaku packing", pairs)


def scales(plan: Plan) -> Plan:
    return asked(plan, "scale layout", {Role.BLOCK_SCALE: (ROW_MAJOR, TILES)})


def doubtful(plan: Plan) -> Plan:
    """The order of scales in question where their shape fits rows as well."""
    (question,) = scales(plan).open
    paths = tuple(path for path in question.paths if plan.layer(path).shape_NK[0] % 128 == 0)
    return replace(plan, open=(replace(question, paths=paths),))


def pieces_of(plan: Plan) -> list[object]:
    return [layer.pieces for layer in plan.layers]


@pytest.fixture(scope="module")
def tiled() -> Plan:
    """The true plan of an export whose scales are all in tiles, though few shapes prove it."""
    return planned(SWIZZLED)


@pytest.mark.parametrize("rows_first", [False, True])
def test_the_largest_codes_tell_nunchakus_packing(rows_first: bool) -> None:
    plan = planned(SVDQ)
    settled = settle.settle(packing(plan, rows_first=rows_first))
    assert pieces_of(settled) == pieces_of(plan) and not settled.open
    assert "without a largest code: " in settled.layer("transformer_blocks.0.attn.to_q").why


def test_shapes_that_only_tiles_explain_answer_for_the_whole_file() -> None:
    plan = planned(SWIZZLED)
    assert layouts(plan, Role.BLOCK_SCALE) == {TILES} and not plan.open


def test_rows_and_columns_of_scales_tell_what_shapes_do_not() -> None:
    plan = planned(SWIZZLED)
    settled = settle.settle(doubtful(plan))
    assert pieces_of(settled) == pieces_of(plan) and not settled.open
    assert "rows and columns leave: row_major" in settled.layer("blocks.0.attn1.to_q").why


def test_answers_agree_with_shapes_that_prove_them(tiled: Plan) -> None:
    (hidden,) = scales(tiled).open
    proved = tuple(path for path in hidden.paths if tiled.layer(path).shape_NK[0] % 128)
    narrowed = replace(tiled, open=(replace(hidden, paths=proved),))
    assert proved and pieces_of(settle.settle(narrowed)) == pieces_of(tiled)


def test_the_base_is_asked_first(tiled: Plan) -> None:
    settled = settle.settle(scales(tiled), settle.of_plan(tiled))
    assert pieces_of(settled) == pieces_of(tiled)
    assert "error against the base: row_major" in settled.layer("blocks.0.attn1.to_q").why


def test_a_base_of_another_model_is_not_believed(tiled: Plan) -> None:
    right = settle.of_plan(tiled)

    def stranger(path: str) -> Tensor | None:
        weight = right(path)
        return None if weight is None else weight.flip(0)

    settled = settle.settle(scales(tiled), stranger)
    assert "variance of scales" in settled.layer("blocks.0.attn1.to_q").why


def test_scales_without_structure_are_refused_with_both_figures(tmp_path: Path) -> None:
    (source,) = SWIZZLED.glob("*.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(source)
    for name, tensor in tensors.items():
        if name.endswith("weight_scale"):
            order = torch.randperm(tensor.numel(), generator=generator)
            shuffled = tensor.view(torch.uint8).flatten()[order].reshape(tensor.shape)
            tensors[name] = shuffled.view(tensor.dtype)
    with safe_open(source, "pt") as opened:
        save_file(tensors, tmp_path / source.name, metadata=opened.metadata())
    (tmp_path / "config.json").write_text((SWIZZLED / "config.json").read_text())
    with pytest.raises(PlanError, match=r"row_major \S+, tiles_128x4") as raised:
        settle.settle(doubtful(planned(tmp_path)))
    assert "--scale-layout linear|tiles" in str(raised.value)


def test_nibbles_of_one_group_cannot_be_told_without_a_base(tiled: Plan) -> None:
    high = Layout("row_major", (("nibbles", "high"),))
    doubtful = asked(tiled, "nibble order", {Role.CODES: (ROW_MAJOR, high)})
    with pytest.raises(PlanError, match="nibble order") as raised:
        settle.settle(doubtful)
    assert "--nvfp4-nibbles low|high" in str(raised.value)
    answered = settle.settle(doubtful, settle.of_plan(tiled))
    assert pieces_of(answered) == pieces_of(tiled)


def test_a_quantized_base_is_no_witness() -> None:
    checkpoint = sources.checkpoint(str(SVDQ))
    assert settle.of_checkpoint(checkpoint, {}) is None
    assert settle.of_checkpoint(None, {}) is None


def test_a_plan_without_questions_is_left_alone() -> None:
    plan = planned(SVDQ)
    assert settle.settle(plan) is plan
