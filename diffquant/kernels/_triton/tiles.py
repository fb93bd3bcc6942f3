"""Which part of the product a program makes, and how large such parts are."""

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Rows, columns and depth of the part of a product one program makes, and how it is worked on.

    Fixed by the number of rows and never by timing, so that a picture does not depend on timing.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


#: Programs that share rows of the weight run next to each other, in groups of so many.
NEIGHBOURS = 8


@triton.jit
def place(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """The tile of this program, (down, across): neighbours read the same weights from the cache."""
    program = tl.program_id(0)
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = program // (NEIGHBOURS * across)
    height = min(down - band * NEIGHBOURS, NEIGHBOURS)
    inside = program % (NEIGHBOURS * across)
    return band * NEIGHBOURS + inside % height, inside // height


def programs(m: int, n: int, tile: Tile) -> tuple[int]:
    """The grid: one program per tile."""
    return (triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),)
