"""Scales of every granularity as one thing: a grid of cells over the weight, one scale per cell.

    tensor [] one cell · channel [N] whole rows · groups [N, G] parts of a row
    blocks [ceil(N / rows), ceil(K / columns)] cells of rows x columns, the last ones ragged

Weights are walked in spans of rows that fit the cache, so that no full-size temporary exists.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from diffquant.encodings import Recipe
from diffquant.errors import PlanError
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_ELEMENTS = 1 << 17

ROLES = {
    "tensor": Role.TENSOR_SCALE,
    "channel": Role.CHANNEL_SCALE,
    "group": Role.BLOCK_SCALE,
    "block": Role.BLOCK_SCALE,
}


class Cell(NamedTuple):
    """Rows and columns of the weight that share a scale."""

    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Grid:
    """One value per cell, as a matrix of cells; one value for everything is a scalar ()."""

    values: "Tensor"
    cell: Cell

    def over(self, rows: slice, columns: int) -> "Tensor":
        """The cells of these rows, [rows, columns] or broadcastable to it."""
        import torch

        values, (cell_rows, cell_columns) = self.values, self.cell
        if values.ndim == 0:
            return values
        if len(values) > 1:
            numbers = torch.arange(rows.start or 0, rows.stop, device=values.device)
            values = values[rows] if cell_rows == 1 else values[numbers // cell_rows]
        if values.shape[1] == 1:
            return values
        wide = values[:, :, None].expand(-1, -1, cell_columns)
        return wide.reshape(len(values), -1)[:, :columns]


def row_spans(shape_NK: tuple[int, int]) -> Iterator[slice]:
    """Spans of rows that hold about a cache's worth of elements, in order."""
    rows, columns = shape_NK
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


# reading -------------------------------------------------------------------------------------


def as_e4m3(scale: "Tensor") -> "Tensor":
    """Scales in e4m3, which some writers store as bare bytes; any other dtype as it is."""
    from torch import float8_e4m3fn, uint8

    return scale.view(float8_e4m3fn) if scale.dtype == uint8 else scale


def tensor_grid(scale: "Tensor", shape_NK: tuple[int, int]) -> Grid:
    """One value for the whole weight, stored as () or (1,)."""
    return Grid(scale.reshape(()), Cell(*shape_NK))


def channel_grid(scale: "Tensor", shape_NK: tuple[int, int]) -> Grid:
    """One value per row, stored as [N] or [N, 1]. Raises PlanError when N differs."""
    if scale.numel() != shape_NK[0]:
        raise PlanError(f"{scale.numel()} channel values for a weight of {shape_NK[0]} rows")
    return Grid(scale.reshape(-1, 1), Cell(1, shape_NK[1]))


def group_grid(scale: "Tensor", shape_NK: tuple[int, int], group: int | None = None) -> Grid:
    """Values [N, G], one per row and `group` columns; group is K / G when it is not given.

    Raises PlanError when they do not cover the weight.
    """
    rows, columns = shape_NK
    if group is None:
        group = max(1, columns // scale.shape[-1])
    wanted = [rows, -(-columns // group)]
    if list(scale.shape) != wanted:
        raise PlanError(
            f"scales of shape {list(scale.shape)} on a weight of {list(shape_NK)}, "
            f"groups of {group} need {wanted}"
        )
    return Grid(scale, Cell(1, group))


def block_grid(scale: "Tensor", shape_NK: tuple[int, int], cell: Cell) -> Grid:
    """Values of two-dimensional blocks, or of groups when every row has values of its own."""
    blocks = (-(-shape_NK[0] // cell.rows), -(-shape_NK[1] // cell.columns))
    if scale.numel() == blocks[0] * blocks[1] and tuple(scale.shape) != (shape_NK[0], blocks[1]):
        return Grid(scale.reshape(blocks), cell)
    # Rows taken from two-dimensional blocks have scales of their own and ragged columns still.
    return group_grid(scale, shape_NK, cell.columns if scale.shape[-1] == blocks[1] else None)


def grids(
    parts: "Mapping[Role, Tensor]", shape_NK: tuple[int, int], cell: Cell
) -> tuple[Grid, ...]:
    """The grids of the weight scales among `parts`, block scale first; `cell` is a block's.

    Raises PlanError when there is none: a missing scale is never 1.
    """
    found = []
    if (scale := parts.get(Role.BLOCK_SCALE)) is not None:
        found.append(block_grid(scale, shape_NK, cell))
    if (scale := parts.get(Role.CHANNEL_SCALE)) is not None:
        found.append(channel_grid(scale, shape_NK))
    if (scale := parts.get(Role.TENSOR_SCALE)) is not None:
        found.append(tensor_grid(scale, shape_NK))
    if not found:
        raise PlanError(f"a weight of {list(shape_NK)} has codes and no scale")
    return tuple(found)


def offset_grid(offset: "Tensor | None", shape_NK: tuple[int, int]) -> Grid | None:
    """Zero points of a tensor (), of rows [N] or of groups [N, G], in float32; None for none."""
    if offset is None:
        return None
    offset = offset.float()
    if offset.numel() == 1:
        return tensor_grid(offset, shape_NK)
    if offset.numel() == shape_NK[0]:
        return channel_grid(offset, shape_NK)
    return group_grid(offset, shape_NK)


def decode_rows(
    codes: "Tensor",
    read: "Callable[[Tensor], Tensor]",
    shape_NK: tuple[int, int],
    scales: tuple[Grid, ...],
    *,
    minus: Grid | None = None,
    plus: Grid | None = None,
) -> "Tensor":
    """weight_NK = (read(codes) - minus) * scale * scale … + plus, float32, rounded in that order.

    A scale of zero gives zero whatever the codes are: exporters write NaN codes beside it.
    """
    import torch

    weight = torch.empty(shape_NK, dtype=torch.float32, device=codes.device)
    scales = tuple(Grid(grid.values.float(), grid.cell) for grid in scales)
    hollow = [not bool(grid.values.all()) for grid in scales]
    for rows in row_spans(shape_NK):
        chunk = weight[rows]
        chunk.copy_(read(codes[rows]))
        if minus is not None:
            chunk.sub_(minus.over(rows, shape_NK[1]))
        for grid, has_zeros in zip(scales, hollow, strict=True):
            scale = grid.over(rows, shape_NK[1])
            chunk.mul_(scale)
            if has_zeros:
                chunk.masked_fill_(scale == 0, 0.0)
        if plus is not None:
            chunk.add_(plus.over(rows, shape_NK[1]))
    return weight


# writing -------------------------------------------------------------------------------------


def cell_of(recipe: Recipe, shape_NK: tuple[int, int], group: int) -> Cell:
    """The cell a recipe means; `group` where it names none."""
    group = recipe.group or group
    return {
        "tensor": Cell(*shape_NK),
        "channel": Cell(1, shape_NK[1]),
        "group": Cell(1, group),
        "block": Cell(group, group),
    }[recipe.granularity]


def amax(values_NK: "Tensor", cell: Cell) -> "Tensor":
    """Largest magnitude of every cell, as a matrix of cells in the dtype of the values."""
    from torch.nn.functional import pad

    rows, columns = values_NK.shape
    across = -(-columns // cell.columns)
    if ragged := across * cell.columns - columns:
        values_NK = pad(values_NK, (0, ragged))
    each = _largest(values_NK.reshape(rows, across, cell.columns))
    down = -(-rows // cell.rows)
    if ragged := down * cell.rows - rows:
        each = pad(each, (0, 0, 0, ragged))
    return each.view(down, cell.rows, across).amax(dim=1)


def _largest(values: "Tensor") -> "Tensor":
    """Largest magnitude along the last of three axes.

    Without its sign a float is ordered as its bits are, and integers are compared some times faster.
    """
    import torch

    kinds = {2: (torch.int16, 0x7FFF), 4: (torch.int32, 0x7FFF_FFFF)}
    if values.is_meta or values.element_size() not in kinds:
        low, high = values.aminmax(dim=2)
        return torch.maximum(-low, high)
    integer, magnitude = kinds[values.element_size()]
    found = torch.empty(values.shape[:2], dtype=integer, device=values.device)
    for rows in row_spans((values.shape[0], values.shape[1] * values.shape[2])):
        torch.amax(values[rows].view(integer) & magnitude, 2, out=found[rows])
    return found.view(values.dtype)


def stored(grid: Grid, recipe: Recipe) -> "dict[Role, Tensor]":
    """A grid as the part its granularity is stored in."""
    shape = {"tensor": (), "channel": (-1,)}.get(recipe.granularity, grid.values.shape)
    return {ROLES[recipe.granularity]: grid.values.reshape(shape)}


def symmetric_grid(values_NK: "Tensor", recipe: Recipe, limit: float, group: int) -> Grid:
    """scale = amax / limit in float32 for every cell, or the given scales of that granularity."""
    shape_NK = (values_NK.shape[0], values_NK.shape[1])
    cell = cell_of(recipe, shape_NK, group)
    scale = recipe.scale if recipe.scale is not None else amax(values_NK, cell).float() / limit
    if recipe.granularity == "tensor":
        return tensor_grid(scale.float(), shape_NK)
    return Grid(scale.float().reshape(-1, -(-shape_NK[1] // cell.columns)), cell)


def divided_rows(values_NK: "Tensor", *grids: Grid) -> "Iterator[tuple[slice, Tensor]]":
    """Spans of rows divided by the product of their scales, zero where that is zero.

    A scalar scale divides in the dtype of the values and any other in float32, which is what torch
    promotes to and what ModelOpt's codes come from; rounding elsewhere moves some percent of them.
    """
    columns = values_NK.shape[1]
    # A weight without data (meta) is encoded for its shapes only.
    hollow = not (values_NK.is_meta or all(bool(grid.values.all()) for grid in grids))
    # Operators on meta tensors are slow whatever the size: one span of all rows.
    spans = [slice(len(values_NK))] if values_NK.is_meta else row_spans((len(values_NK), columns))
    for rows in spans:
        scale, *others = (grid.over(rows, columns) for grid in grids)
        for other in others:
            scale = scale * other
        ratio = values_NK[rows] / scale
        yield rows, ratio.masked_fill_(scale == 0, 0.0) if hollow else ratio
