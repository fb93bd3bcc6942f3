"""The words an inventory is written in: what a module of a block holds, said once, then repeated.

A `Table` maps paths to contents. Widths come in the order nn.Linear takes them, (K, N), so that a
table can be read beside the class it describes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffquant.families import Inventory, Shape


@dataclass(frozen=True, slots=True)
class Contents:
    """The parameters at one path: leaf (".weight"; "" for a lone parameter) -> shape."""

    leaves: Mapping[str, Shape]
    is_linear: bool = False


Table = Mapping[str, Contents]
Shapes = Mapping[str, Shape]


def linear(wide: int, out: int, bias: bool = True) -> Contents:
    """nn.Linear(wide, out): weight [N, K], bias [N]."""
    leaves: dict[str, Shape] = {".weight": (out, wide)}
    return Contents(leaves | ({".bias": (out,)} if bias else {}), is_linear=True)


def norm(width: int, bias: bool = False) -> Contents:
    """An affine norm: RMS (weight only), or layer norm (with bias)."""
    leaves: dict[str, Shape] = {".weight": (width,)}
    return Contents(leaves | ({".bias": (width,)} if bias else {}))


def conv(channels: int, out: int, kernel: Sequence[int]) -> Contents:
    """A convolution with bias: weight [out, channels, *kernel]."""
    return Contents({".weight": (out, channels, *kernel), ".bias": (out,)})


def embedding(rows: int, width: int) -> Contents:
    """nn.Embedding(rows, width)."""
    return Contents({".weight": (rows, width)})


def lone(*shape: int) -> Contents:
    """A parameter or persistent buffer that is no module's weight or bias."""
    return Contents({"": shape})


def squares(width: int, *paths: str, bias: bool = True) -> Table:
    """Linears as wide as they are high."""
    return {path: linear(width, width, bias) for path in paths}


def norms(width: int, *paths: str, bias: bool = False) -> Table:
    """Equal affine norms."""
    return {path: norm(width, bias) for path in paths}


def two_linears(path: str, wide: int, out: int, bias: bool = True) -> Table:
    """What diffusers embeds timesteps, guidance and texts with: linear_1, linear_2."""
    return {f"{path}.linear_1": linear(wide, out, bias), f"{path}.linear_2": linear(out, out, bias)}


def feed_forward(path: str, width: int, hidden: int, out: int | None = None) -> Table:
    """diffusers' FeedForward without a gate: net.0.proj, net.2."""
    return {
        f"{path}.net.0.proj": linear(width, hidden),
        f"{path}.net.2": linear(hidden, width if out is None else out),
    }


def repeated(blocks: str, count: int, table: Table) -> Table:
    """`count` equal blocks in the ModuleList `blocks`."""
    return {
        f"{blocks}.{index}.{path}": held for index in range(count) for path, held in table.items()
    }


def inventory(*tables: Table) -> Inventory:
    """The tables as names, shapes and linears."""
    rows = [(path, held) for table in tables for path, held in table.items()]
    return Inventory(
        shapes={path + leaf: shape for path, held in rows for leaf, shape in held.leaves.items()},
        linears=frozenset(path for path, held in rows if held.is_linear),
    )


def count(shapes: Shapes, blocks: str) -> int:
    """How many blocks the ModuleList `blocks` has, judging by the names below it."""
    below = (name[len(blocks) + 1 :] for name in shapes if name.startswith(f"{blocks}."))
    return max((int(name.split(".", 1)[0]) + 1 for name in below), default=0)


def head_width(shapes: Shapes, norm_name: str, width: int) -> int:
    """Width of one attention head: its norm's, else the widest usual one that divides `width`."""
    for name, shape in shapes.items():
        if name.endswith(norm_name):
            return shape[0]
    return next(
        head for head in (128, 96, 80, 64, 48, 32, 24, 16, 8, 6, 4, 2, 1) if width % head == 0
    )


def ratio(hidden: int, width: int) -> float:
    """A factor that makes `width` exactly `hidden` when the product is cut to an integer."""
    factor = hidden / width
    return factor if int(width * factor) == hidden else (hidden + 0.5) / width


def rope_axes(head: int, sixteenths: int) -> tuple[int, int, int]:
    """Even rope widths for (time, height, width) that fill a head; the last two equal."""
    side = head * sixteenths // 32 * 2
    return head - 2 * side, side, side
