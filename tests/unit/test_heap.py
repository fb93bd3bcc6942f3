"""Freed memory goes back to the system, where the C library can be asked."""

import sys
from pathlib import Path

import pytest
import torch

from diffquant import heap

BLOCK = 4 * 2**20


def resident() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_was_freed_between_what_lives_goes_back() -> None:
    large = torch.ones(
        30 * 2**20, dtype=torch.uint8
    )  # once freed, blocks up to this come from the heap
    del large
    blocks = [torch.ones(BLOCK, dtype=torch.uint8) for _ in range(40)]
    del blocks[::2]
    before = resident()
    heap.give_back(above=2**50)
    assert before - resident() < 5 * BLOCK
    heap.give_back(above=5 * BLOCK)
    assert before - resident() > 15 * BLOCK
    assert all(block.sum() == BLOCK for block in blocks)
