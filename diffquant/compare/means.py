"""Means over prompts, seeds and rounds, each with the interval that resampling gives it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

import torch

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A mean with its 95 % interval (bootstrap); no interval where there is but one value."""

    value: float
    low: float | None = None
    high: float | None = None


def mean(values: Sequence[float]) -> Mean:
    """With the interval that holds 95 % of the means of resampled values."""
    if len(values) < 2 or not all(map(isfinite, values)):
        return Mean(value=fmean(values))
    known = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(
        len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0)
    )
    edges = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    low, high = known[picks].mean(1).quantile(edges).tolist()
    return Mean(value=fmean(values), low=low, high=high)
