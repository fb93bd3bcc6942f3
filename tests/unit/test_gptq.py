"""GPTQ, AWQ and AutoRound beyond what `test_owner_files` holds against their owners."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffquant import aliases, headers, planner, sources
from diffquant.errors import FormatError, PlanError
from diffquant.formats import FORMATS
from diffquant.layouts import awq
from diffquant.pieces import canonical, decoded
from diffquant.plan import Layout, Piece, Plan, Role, Span
from diffquant.tensors import Weights

DATA = Path(__file__).resolve().parents[1] / "data"
CASES = DATA / "gptq" / "cases.safetensors"
AWQ = DATA / "awq" / "cases.safetensors"
ROUND = DATA / "auto_round" / "auto_gptq.safetensors"


def planned(path: Path) -> Plan:
    checkpoint = sources.checkpoint(str(path))
    return planner.plan(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)


def piece(layer: str, path: Path = CASES) -> Piece:
    return planned(path).layer(f"blocks.0.{layer}").pieces[0]


def weight(piece: Piece, path: Path = CASES) -> Tensor:
    return decoded(piece, canonical(piece, Weights([path])))


def with_layout(piece: Piece, role: Role, layout: Layout) -> Piece:
    parts = (replace(part, layout=layout) if part.role is role else part for part in piece.parts)
    return replace(piece, parts=tuple(parts))


def rewritten(folder: Path, source: Path, without: str = "", **told: Any) -> Path:
    """The file with other words in its configuration, or without a tensor."""
    with safe_open(source, "pt") as stored:
        block = json.loads(stored.metadata()["quantization_config"]) | told
    tensors = {name: each for name, each in load_file(source).items() if name != without}
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"quantization_config": json.dumps(block)})
    return path


@pytest.mark.parametrize("layer", ["int4", "int8", "reordered"])
def test_zero_points_one_too_small_are_another_weight(layer: str) -> None:
    right = piece(layer)
    zeros = next(part for part in right.parts if part.role is Role.ZERO_POINT)
    plain = tuple(pair for pair in zeros.layout.options if pair[0] != "numbers")
    wrong = with_layout(right, Role.ZERO_POINT, Layout("gptq", plain))
    assert (weight(wrong) - weight(right)).norm() > weight(right).norm() / 200


def test_columns_taken_in_order_are_another_weight() -> None:
    right = piece("reordered")
    parts = tuple(part for part in right.parts if part.role is not Role.GROUP_INDEX)
    assert len(parts) == len(right.parts) - 1
    wrong = weight(replace(right, parts=parts))
    assert (wrong - weight(right)).norm() > weight(right).norm() / 20


def test_an_index_in_order_is_not_carried() -> None:
    plan = planned(CASES)
    assert Role.GROUP_INDEX not in piece("int4").roles
    assert {ref.name for ref in plan.unused} == {"blocks.0.int4.g_idx", "blocks.0.int8.g_idx"}


def test_rows_of_a_word_in_their_own_order_are_another_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = weight(piece("a", AWQ), AWQ)
    monkeypatch.setattr(awq, "PLACES", tuple(range(8)))
    wrong = weight(piece("a", AWQ), AWQ)
    assert (wrong - right).norm() > right.norm() / 2


def test_rows_are_cut_after_words_are_unpacked() -> None:
    for layer in ("reordered", "int8"):
        right = piece(layer)
        cut = replace(right, take=(Span(5, 17),), out=Span(0, 12))
        assert torch.equal(weight(cut), weight(right)[5:17])


@pytest.mark.parametrize(
    ("source", "told", "words"),
    [
        (CASES, {"checkpoint_format": "bitblas"}, "packed as bitblas"),
        (CASES, {"is_marlin_format": True}, "packed as marlin"),
        (CASES, {"group_size": 128}, "group_size 128, and .* has 3 groups of 96"),
        (AWQ, {"version": "gemv"}, "packed for gemv, gemm is read"),
        (ROUND, {"packing_format": "auto_round:llm_compressor"}, "packed as auto_round:llm_comp"),
        (ROUND, {"data_type": "mx_fp"}, "says mx_fp packed as"),
    ],
)
def test_other_packings_are_refused_by_name(
    tmp_path: Path, source: Path, told: dict[str, Any], words: str
) -> None:
    with pytest.raises(FormatError, match=words):
        planned(rewritten(tmp_path, source, **told))


def test_version_two_takes_zero_points_as_they_are(tmp_path: Path) -> None:
    path = rewritten(tmp_path, CASES, checkpoint_format="gptq_v2")
    scale = load_file(CASES)["blocks.0.int4.scales"].float().t().repeat_interleave(32, 1)
    assert torch.allclose(
        weight(piece("int4", path), path), weight(piece("int4")) + scale, atol=1e-6
    )


def test_what_is_missing_stops_the_load(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no zero points 'blocks.0.int4.qzeros'"):
        planned(rewritten(tmp_path, CASES, "blocks.0.int4.qzeros"))
    with pytest.raises(FormatError, match=r"'blocks.0.reordered.qweight' has columns in another"):
        planned(rewritten(tmp_path, CASES, "blocks.0.reordered.g_idx"))
    with pytest.raises(PlanError, match=r"'blocks.0.int4.qweight' is int4.* without its scale"):
        planned(rewritten(tmp_path, CASES, "blocks.0.int4.scales"))


def test_a_file_that_does_not_say_how_zero_points_are_stored_is_not_guessed_at(
    tmp_path: Path,
) -> None:
    save_file(load_file(CASES), tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="looks quantized and nothing in it says how"):
        planned(tmp_path / "model.safetensors")


def test_the_older_file_beside_the_weights_says_it_too(tmp_path: Path) -> None:
    save_file(load_file(CASES), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    told = {"bits": 4, "group_size": 32, "desc_act": True}
    (tmp_path / "quantize_config.json").write_text(json.dumps(told))
    assert torch.equal(weight(piece("reordered", tmp_path)), weight(piece("reordered")))


@pytest.mark.parametrize("word", ["gptq", "gptq_marlin", "awq", "awq_marlin", "auto-round"])
def test_what_people_call_it_is_a_format(word: str) -> None:
    assert aliases.quantizations()[word].format in FORMATS.names()


def test_a_layer_without_rows_is_refused(tmp_path: Path) -> None:
    empty = {"x.qweight": torch.zeros(16, 0, dtype=torch.int32)}
    empty |= {"x.qzeros": torch.zeros(1, 0, dtype=torch.int32), "x.scales": torch.zeros(1, 0)}
    block = json.dumps({"quant_method": "gptq", "bits": 4, "group_size": 128})
    save_file(empty, tmp_path / "model.safetensors", metadata={"quantization_config": block})
    with pytest.raises(FormatError, match=r"'x.qweight' has no rows"):
        planned(tmp_path / "model.safetensors")
