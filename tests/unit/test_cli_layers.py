"""Layers that are told alike share a row, wherever their blocks stand."""

from diffquant.cli._layers import grouped
from diffquant.cli._talk import count, size, table


def test_blocks_told_alike_share_a_row_with_their_numbers_as_ranges() -> None:
    rows = [(f"blocks.{number}.attn.to_q", ("fp8",)) for number in (0, 1, 2, 5, 7, 8)]
    assert grouped(rows) == [("blocks.0-2,5,7-8.attn.to_q", "fp8")]


def test_blocks_told_differently_and_layers_outside_of_blocks_have_rows_of_their_own() -> None:
    rows = [
        ("x_embedder", ("bf16",)),
        ("blocks.0.ff.net.0", ("fp8",)),
        ("blocks.1.ff.net.0", ("x",)),
    ]
    assert grouped(rows) == [
        ("x_embedder", "bf16"),
        ("blocks.0.ff.net.0", "fp8"),
        ("blocks.1.ff.net.0", "x"),
    ]


def test_columns_are_aligned_and_lines_do_not_trail() -> None:
    assert table([("a", "bb", "c"), ("aaa", "b", "")]) == "  a    bb  c\n  aaa  b"


def test_sizes_and_counts_read_as_people_write_them() -> None:
    assert [size(900), size(1_470_344), size(12_300_000_000)] == [
        "900 bytes",
        "1.47 MB",
        "12.30 GB",
    ]
    assert [count(1, "layer"), count(2, "layer")] == ["1 layer", "2 layers"]
