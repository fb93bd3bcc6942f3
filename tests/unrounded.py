"""The float32 smoothing that an export of ModelOpt came from, of which it keeps bfloat16.

ModelOpt multiplies a weight W [N, K] by i [K] in float32, rounds it to the weight's dtype, takes the
low-rank branch off, product and difference both rounded, and makes codes of the rest. The export has
1/i as `pre_quant_scale`, rounded. Every number of the result grows or falls with i, so what a stored
code or scale says about i is an interval, found by halving; an i in all intervals of its column makes
the column's bytes, and where there is none no smoothing of this one layer explains the file.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffquant.encodings import _e2m1 as e2m1

#: E2M1 codes -> numbers that grow as they do; -0 lies below 0.
RANKS = torch.tensor([-0.25 if code == 8 else value for code, value in enumerate(e2m1.VALUES)])
#: Two float32 numbers within a bfloat16 step are at most 2^17 floats apart.
HALVINGS = 18
#: Points of an interval that are looked at.
TRIES = 65
#: Floats left out at both ends of what rounds to one bfloat16.
EDGE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """How one kind of numbers is made.

    rank   value / scale -> what orders the codes it would get
    scale  largest magnitude of a cell, outer scale -> the cell's scale
    """

    rank: Callable[[Tensor], Tensor]
    scale: Callable[[Tensor, Tensor], Tensor]


def _e4m3(amax: Tensor, outer: Tensor) -> Tensor:
    return (amax / (6 * outer)).clamp(2**-9, 448).to(torch.float8_e4m3fn).float()


GRIDS = {
    "nvfp4": Grid(rank=lambda ratio: RANKS[e2m1.codes(ratio).long()], scale=_e4m3),
    "int8": Grid(rank=lambda ratio: ratio.round().clamp(-128, 127), scale=lambda a, _: a / 127),
    "int4": Grid(rank=lambda ratio: ratio.round().clamp(-8, 7), scale=lambda a, _: a / 7),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """One layer of an export beside the weight it came from.

    numbers_NK  what the codes say, ordered as `Grid.rank` orders them
    scale_NG    float32; outer is 1 where there is none
    low_NK      the low-rank branch in the weight's dtype, or zero
    """

    grid: Grid
    weight_NK: Tensor
    smooth_K: Tensor
    numbers_NK: Tensor
    scale_NG: Tensor
    outer: Tensor
    low_NK: Tensor

    def smoothed(self, inverse: Tensor) -> Tensor:
        """What was encoded, where i is `inverse` [K] or [N, K]."""
        return (self.weight_NK.float() * inverse).to(self.weight_NK.dtype) - self.low_NK

    def found(self) -> tuple[Tensor, Tensor]:
        """i [K], and the columns for which it makes every code without leaving a scale [K]."""
        low, high = _around(self.smooth_K)
        first, last = self._fitting(low, high)
        possible = first <= last
        first, last = (torch.where(possible, end, (low + high) // 2) for end in (first, last))
        steps = torch.linspace(1, 0, TRIES, dtype=torch.float64)[:, None]
        return self._reaching(_floats(first + ((last - first) * steps).long())), possible

    def _fitting(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Ends of the interval in which each column has the stored codes, below the stored scales."""
        wanted = self._sign * self.numbers_NK
        return (
            self._least(low, high, lambda i: self._rank(i) >= wanted)
            .maximum(self._least(low, high, lambda i: self._scale(i, -1) <= self._stored))
            .amax(0),
            self._least(low, high, lambda i: self._rank(i) > wanted)
            .minimum(self._least(low, high, lambda i: self._scale(i, 1) > self._stored))
            .amin(0)
            .sub(1),
        )

    def _reaching(self, tries_TK: Tensor) -> Tensor:
        """Of every column's tries the first, or one with which more cells come to their scale."""
        reach_TNK = torch.stack([self._reaches(inverse) for inverse in tries_TK])
        taken = torch.zeros(tries_TK.shape[1], dtype=torch.long)
        for start in range(0, len(taken), self._columns):
            columns = range(start, start + self._columns)
            for column in columns:
                others = [other for other in columns if other != column]
                held_N = reach_TNK[taken[others], :, others].any(0)
                taken[column] = (reach_TNK[:, :, column] | held_N).sum(1).argmax()
        return tries_TK.gather(0, taken[None])[0]

    def _reaches(self, inverse: Tensor) -> Tensor:
        size = self.smoothed(inverse).float().abs()
        return self.grid.scale(size, self.outer) == self._stored

    def _rank(self, inverse: Tensor) -> Tensor:
        """What grows with i and orders the codes."""
        return self._sign * self.grid.rank(self.smoothed(inverse) / (self._stored * self.outer))

    def _scale(self, inverse: Tensor, side: int) -> Tensor:
        """The scale each number asks for if it lies on that side of zero, W taken as positive."""
        grown = side * self._sign * self.smoothed(inverse).float()
        return self.grid.scale(grown.clamp(min=0), self.outer)

    def _least(self, low: Tensor, high: Tensor, is_true: Callable[[Tensor], Tensor]) -> Tensor:
        """The least bits of i from `low` to `high` for which it is true, `high` + 1 where it never is."""
        top = high.expand_as(self.weight_NK)
        least, beyond = low.expand_as(self.weight_NK), top + 1
        for _ in range(HALVINGS):
            middle = least + (beyond - least) // 2
            good, wide = is_true(_floats(torch.minimum(middle, top))), least < beyond
            least, beyond = (
                torch.where(wide & ~good, middle + 1, least),
                torch.where(wide & good, middle, beyond),
            )
        return least

    @property
    def _sign(self) -> Tensor:
        return torch.where(self.weight_NK < 0, -1.0, 1.0)

    @property
    def _columns(self) -> int:
        """Columns under one scale."""
        return self.weight_NK.shape[1] // self.scale_NG.shape[1]

    @property
    def _stored(self) -> Tensor:
        return self.scale_NG.repeat_interleave(self._columns, 1)


def _around(smooth_K: Tensor) -> tuple[Tensor, Tensor]:
    """The float32 numbers, as bits, whose inverse rounds to `smooth_K`."""
    if smooth_K.dtype == torch.float32:
        return _bits(1 / smooth_K), _bits(1 / smooth_K)
    bits, middle = smooth_K.view(torch.int16), smooth_K.float()
    below, above = ((bits + step).view(smooth_K.dtype).float() for step in (-1, 1))
    # The ends themselves round elsewhere.
    return _bits(2 / (middle + above)) + EDGE, _bits(2 / (middle + below)) - EDGE


def _bits(positive: Tensor) -> Tensor:
    return positive.view(torch.int32).long()


def _floats(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)
