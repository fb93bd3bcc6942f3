"""From stored bytes to canonical parts: layout first, then rows, then columns."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffquant.pieces import bias_of, canonical, decoded, dense, logical_shape
from diffquant.plan import (
    DENSE,
    BiasOffset,
    Encoding,
    LayerPlan,
    Layout,
    Part,
    Piece,
    Role,
    Rotation,
    Span,
    TensorRef,
)
from diffquant.tensors import Weights

WEIGHT = torch.arange(24.0).reshape(4, 6)
INT8 = Encoding("int8")


def stored(folder: Path, tensors: dict[str, Tensor]) -> Weights:
    save_file(tensors, folder / "a.safetensors")
    return Weights([folder / "a.safetensors"])


def parts_of(**names: str) -> tuple[Part, ...]:
    return tuple(Part(Role(role), TensorRef(0, name)) for role, name in names.items())


def piece(parts: tuple[Part, ...], shape_NK: tuple[int, int] = (4, 6), **changed: object) -> Piece:
    settings: dict[str, object] = {
        "encoding": DENSE,
        "stored_NK": shape_NK,
        "out": Span(0, shape_NK[0]),
        "cols": Span(0, shape_NK[1]),
    }
    return Piece(parts=parts, **{**settings, **changed})  # type: ignore[arg-type]


def layer(*pieces: Piece, shape_NK: tuple[int, int] = (4, 6)) -> LayerPlan:
    return LayerPlan(path="it", shape_NK=shape_NK, pieces=pieces, dtype="float32", why="a test")


def test_rows_are_taken_in_the_order_asked(tmp_path: Path) -> None:
    weights = stored(tmp_path, {"w": WEIGHT, "b": torch.arange(4.0)})
    cut = piece(parts_of(codes="w", bias="b"), take=(Span(2, 4), Span(0, 1)), out=Span(0, 3))
    parts = canonical(cut, weights)
    assert torch.equal(parts[Role.CODES], WEIGHT[[2, 3, 0]])
    assert parts[Role.BIAS].tolist() == [2, 3, 0]


def test_one_cut_reaches_codes_scales_and_low_rank_together(tmp_path: Path) -> None:
    tensors = {
        "w": WEIGHT.to(torch.int8),
        "s": torch.arange(1.0, 5.0),
        "u": torch.arange(8.0).reshape(4, 2),
        "d": torch.arange(12.0).reshape(2, 6),
    }
    names = parts_of(codes="w", channel_scale="s", lowrank_up="u", lowrank_down="d")
    cut = piece(names, encoding=INT8, take=(Span(1, 4, 2),), out=Span(0, 2))
    parts = canonical(cut, stored(tmp_path, tensors))
    assert torch.equal(decoded(cut, parts), WEIGHT[[1, 3]] * torch.tensor([[2.0], [4.0]]))
    assert torch.equal(parts[Role.LOWRANK_UP], tensors["u"][[1, 3]])
    assert torch.equal(parts[Role.LOWRANK_DOWN], tensors["d"])


def test_the_layout_is_undone_before_a_row_is_taken(tmp_path: Path) -> None:
    part = Part(Role.CODES, TensorRef(0, "w"), Layout("transposed"))
    cut = piece((part,), take=(Span(1, 2),), out=Span(0, 1))
    weights = stored(tmp_path, {"w": WEIGHT.T.contiguous()})
    assert torch.equal(canonical(cut, weights)[Role.CODES], WEIGHT[1:2])


def test_rows_taken_from_two_dimensional_blocks_keep_their_scale(tmp_path: Path) -> None:
    tensors = {
        "w": torch.ones(256, 256).to(torch.float8_e4m3fn),
        "s": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    }
    cut = piece(
        parts_of(codes="w", block_scale="s"),
        (256, 256),
        encoding=Encoding("fp8"),
        take=(Span(120, 136),),
        out=Span(0, 16),
    )
    weight = decoded(cut, canonical(cut, stored(tmp_path, tensors)))
    assert weight[:, 0].tolist() == [1.0] * 8 + [3.0] * 8
    assert weight[:, 255].tolist() == [2.0] * 8 + [4.0] * 8


def test_rows_taken_from_a_last_block_that_is_lower_keep_their_scale(tmp_path: Path) -> None:
    tensors = {
        "w": torch.ones(192, 128).to(torch.float8_e4m3fn),
        "s": torch.tensor([[1.0], [3.0]]),
    }
    cut = piece(
        parts_of(codes="w", block_scale="s"),
        (192, 128),
        encoding=Encoding("fp8"),
        take=(Span(90, 136),),
        out=Span(0, 46),
        cols=Span(0, 128),
    )
    weight = decoded(cut, canonical(cut, stored(tmp_path, tensors)))
    assert weight[:, 0].tolist() == [1.0] * 38 + [3.0] * 8


def test_padded_columns_are_dropped_from_codes_and_scales(tmp_path: Path) -> None:
    tensors = {
        "w": torch.arange(2 * 64).reshape(2, 64).to(torch.int8),
        "s": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    }
    names = parts_of(codes="w", block_scale="s")
    cut = piece(names, (2, 64), encoding=INT8, cols=Span(0, 32))
    parts = canonical(cut, stored(tmp_path, tensors))
    assert parts[Role.CODES].shape == (2, 32)
    assert parts[Role.BLOCK_SCALE].tolist() == [[1.0], [3.0]]


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((3, 1, 2, 1), (3, 2)),
        ((3, 1, 1, 1), (3, 1)),
        ((1, 1, 2, 1), (1, 2)),
        ((3, 2), (3, 2)),
        ((352, 2), (352, 2)),
        ((352, 2, 1), (352, 2)),
    ],
)
def test_block_scales_in_any_spelling_are_a_matrix(
    shape: tuple[int, ...], wanted: tuple[int, int]
) -> None:
    found = logical_shape(Role.BLOCK_SCALE, torch.ones(shape), Encoding("fp8"), (352, 256))
    assert found == wanted


def test_a_bias_alone_keeps_its_own_memory(tmp_path: Path) -> None:
    weights = stored(tmp_path, {"w": WEIGHT, "b": torch.arange(4.0).bfloat16()})
    whole = layer(piece(parts_of(codes="w", bias="b")))
    held = [canonical(whole.pieces[0], weights)]
    bias = bias_of(whole, held)
    assert bias is not None and bias.dtype == torch.bfloat16
    assert bias.data_ptr() == held[0][Role.BIAS].data_ptr()


def test_biases_of_stacked_pieces_are_put_in_their_place_and_offset(tmp_path: Path) -> None:
    weights = stored(tmp_path, {"w": WEIGHT, "b": torch.arange(4.0)})
    names = parts_of(codes="w", bias="b")
    upper = piece(names, take=(Span(0, 2),), out=Span(0, 2))
    lower = piece(
        names, take=(Span(2, 4),), out=Span(2, 4), bias_offsets=(BiasOffset(Span(0, 1), -1.0),)
    )
    stacked = layer(upper, lower)
    bias = bias_of(stacked, [canonical(it, weights) for it in stacked.pieces])
    assert bias is not None and bias.tolist() == [0, 1, 1, 3]


def test_a_layer_without_bias_has_none(tmp_path: Path) -> None:
    bare = layer(piece(parts_of(codes="w")))
    assert bias_of(bare, [canonical(bare.pieces[0], stored(tmp_path, {"w": WEIGHT}))]) is None
    assert dense(bare, stored(tmp_path, {"w": WEIGHT}))[1] is None


def equation(it: Piece, tensors: dict[str, Tensor], x_MK: Tensor) -> Tensor:
    """The docstring of `plan`, written out for one dense piece."""
    from diffquant.rotation import rotated

    h_MK = x_MK + it.shift
    h_MK = h_MK * tensors["s"] if it.smooth == "multiply" else h_MK / tensors["s"]
    low = x_MK if it.lowrank_input == "raw" else h_MK
    y_MN = rotated(h_MK, it.rotation) @ tensors["w"].T
    return y_MN + (low @ tensors["d"].T) @ tensors["u"].T + tensors["b"]


@pytest.mark.parametrize("smooth", ["multiply", "divide"])
@pytest.mark.parametrize("lowrank", ["raw", "smoothed"])
@pytest.mark.parametrize("shift", [0.0, 0.25])
@pytest.mark.parametrize("rotation", [None, Rotation("regular_hadamard", 4)])
def test_the_dense_weight_of_a_piece_is_the_plans_equation(
    smooth: str, lowrank: str, shift: float, rotation: Rotation | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    tensors = {
        "w": torch.randn(5, 8),
        "s": torch.rand(8) + 0.5,
        "u": torch.randn(5, 2),
        "d": torch.randn(2, 8),
        "b": torch.randn(5),
    }
    names = parts_of(codes="w", smooth="s", lowrank_up="u", lowrank_down="d", bias="b")
    it = piece(names, (5, 8), smooth=smooth, lowrank_input=lowrank, shift=shift, rotation=rotation)
    weight, bias = dense(layer(it, shape_NK=(5, 8)), stored(tmp_path, tensors))
    x_MK = torch.randn(3, 8)
    assert bias is not None
    assert torch.allclose(x_MK @ weight.T + bias, equation(it, tensors, x_MK), atol=1e-4)
    assert not torch.allclose(x_MK @ tensors["w"].T + bias, equation(it, tensors, x_MK), atol=0.1)


def test_pieces_side_by_side_along_k_add_up(tmp_path: Path) -> None:
    weights = stored(
        tmp_path, {"left": WEIGHT[:, :2].contiguous(), "right": WEIGHT[:, 2:].contiguous()}
    )
    left = piece(parts_of(codes="left"), (4, 2))
    right = piece(parts_of(codes="right"), (4, 4), cols=Span(2, 6))
    assert torch.equal(dense(layer(left, right), weights)[0], WEIGHT)
    misplaced = piece(parts_of(codes="right"), (4, 4), cols=Span(0, 4))
    assert not torch.equal(dense(layer(left, misplaced), weights)[0], WEIGHT)
