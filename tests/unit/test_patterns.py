"""Patterns mean what their readers expect, and nothing next to it."""

import pytest

from diffquant.patterns import hits, ignores, matches, nearest, select

BLOCKS = tuple(f"blocks.{number}.attn.to_q" for number in range(12))


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("proj_out", "proj_out"),
        ("blocks.*.ff.net.2", "blocks.10.ff.net.2"),
        ("time_embed.*.linear_*", "time_embed.text_embedder.linear_1"),
        ("context_embedder.**", "context_embedder.refiner.blocks.0.attn.to_q"),
        ("**.adaLN_modulation.*", "layers.3.adaLN_modulation.0"),
        ("**.proj_out", "proj_out"),
    ],
)
def test_a_glob_matches_the_whole_path(pattern: str, path: str) -> None:
    assert matches(pattern, path)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("proj_out", "blocks.0.proj_out"),
        ("blocks.*.to_q", "blocks.0.attn.to_q"),
        ("blocks.*", "blocks.0.attn"),
        ("blocks.1.*", "blocks.10.attn"),
        ("**.proj_out", "blocks.0.my_proj_out"),
        ("norm.linear", "normXlinear"),
    ],
)
def test_a_star_does_not_cross_a_dot(pattern: str, path: str) -> None:
    assert not matches(pattern, path)


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [("[:3]", [0, 1, 2]), ("[-2:]", [10, 11]), ("[3:5]", [3, 4]), ("[:]", list(range(12)))],
)
def test_a_slice_counts_blocks_as_python_does(pattern: str, numbers: list[int]) -> None:
    chosen = select(f"blocks.{pattern}.**", (*BLOCKS, "proj_out", "other.40.attn.to_q"))
    assert chosen == tuple(f"blocks.{number}.attn.to_q" for number in numbers)


def test_a_slice_longer_than_the_model_takes_what_is_there() -> None:
    assert select("blocks.[:99].attn.*", BLOCKS) == BLOCKS
    assert select("absent.[:99].attn.*", BLOCKS) == ()


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("attention.to_", "layers.0.attention.to_q"),
        ("attention.to_*", "layers.0.attention.to_out.0"),
        ("blocks.1", "blocks.1.attn.to_q"),
        ("ff", "blocks.1.ff.net.0.proj"),
        ("blocks.*.attn", "blocks.7.attn.to_q"),
        ("proj_out", "proj_out"),
    ],
)
def test_what_was_typed_hits_whole_segments_anywhere(pattern: str, path: str) -> None:
    assert hits(pattern, path)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("to_q", "blocks.0.attn.to_qkv"),
        ("blocks.1", "blocks.10.attn.to_q"),
        ("blocks.1", "single_blocks.1.attn.to_q"),
        ("attention.to", "layers.0.attention.to_q"),
        ("ttention.to_", "layers.0.attention.to_q"),
        ("to_", "attn.into_x"),
    ],
)
def test_what_was_typed_never_hits_a_part_of_a_segment(pattern: str, path: str) -> None:
    assert not hits(pattern, path)


def test_an_ignore_entry_of_a_file_crosses_dots_with_its_star() -> None:
    assert ignores("transformer_blocks.0*", "transformer_blocks.0.attn.to_q")
    assert ignores("proj_out", "proj_out")
    assert not ignores("proj_out", "blocks.0.proj_out")
    assert not ignores("x.y", "xzy")


def test_a_miss_names_the_nearest() -> None:
    assert nearest("attn.to_qq", BLOCKS)[0] == "attn.to_q"
    assert nearest("zzzz", BLOCKS) == ()
