"""Smoothing: what to divide each input channel by, so that inputs and weight both fit few bits.

The candidates for s [K] are x^a / w^b of the largest magnitudes x of the input and w of the weight
in each channel, and no smoothing at all. Each is tried on samples of true input with everything the
layer will do: inputs quantized, weight in codes beside a sketched low-rank branch. The one whose
output is nearest to the dense layer's is taken. Source of the candidates: SmoothQuant and SVDQuant
(one exponent, or one for each side).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffquant.activations import quantized
from diffquant.encodings import ENCODINGS
from diffquant.plan import Recode
from diffquant.recode._codes import codes

#: Exponents (a, b) that are tried.
EXPONENTS = tuple(
    (tenths / 10, other / 10) for tenths in (2, 3.5, 5, 6.5, 8) for other in (0, 10 - tenths)
)
#: Rows of the weight whose outputs are looked at; the others go by these.
ROWS = 384
#: Channels with less than this part of the largest value count as having that much.
LEAST = 1e-4

LowRank = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What candidates are judged by: the layer [N, K], rows of its weight, inputs, true outputs."""

    weights: Sequence[Tensor]
    recode: Recode
    samples_MK: Tensor
    shift: float
    rows: Tensor
    truth_MN: Tensor


def chosen(
    weights: Sequence[Tensor],
    recode: Recode,
    samples_MK: Tensor,
    shift: float,
    lowrank: LowRank,
) -> Tensor:
    """s [K] in bfloat16, which divides the input; ones where smoothing does not help.

    lowrank  (weight, rank, powers=) -> U, D
    """
    samples_MK = samples_MK.to(weights[0].device).float()
    n = sum(len(weight) for weight in weights)
    rows = torch.linspace(0, n - 1, min(n, ROWS)).long()
    picked = _picked(weights, rows)
    trial = Trial(
        weights=weights,
        recode=recode,
        samples_MK=samples_MK,
        shift=shift,
        rows=rows,
        truth_MN=samples_MK @ picked.T,
    )
    return min(_candidates(weights, samples_MK, shift), key=lambda s: _error(s, trial, lowrank))


def _candidates(weights: Sequence[Tensor], samples_MK: Tensor, shift: float) -> Iterator[Tensor]:
    inputs = _magnitude([samples_MK + shift])
    ours = _magnitude(weights)
    yield torch.ones_like(inputs, dtype=torch.bfloat16)
    for a, b in EXPONENTS:
        candidate = inputs**a / ours**b
        yield (candidate / candidate.log().mean().exp()).to(torch.bfloat16)


def _magnitude(rows: Sequence[Tensor]) -> Tensor:
    """The largest magnitude of every column, far from zero."""
    largest = torch.stack([part.abs().amax(0).float() for part in rows]).amax(0)
    return largest.clamp(min=float(largest.max().clamp(min=1e-12)) * LEAST)


def _error(smooth: Tensor, trial: Trial, lowrank: LowRank) -> float:
    """Squared distance of the outputs from the true ones."""
    recode, wide = trial.recode, smooth.float()
    assert recode.rank is not None
    whole = torch.cat([weight.float() * wide for weight in trial.weights])
    up, down = lowrank(whole, recode.rank, powers=0)
    up_RN, down_RK = up[trial.rows].float(), down.float()
    rest = whole[trial.rows] - up_RN @ down_RK
    held = ENCODINGS.load(recode.encoding.name).decode(
        codes(rest, recode), recode.encoding, (rest.shape[0], rest.shape[1])
    )
    divided = ((trial.samples_MK + trial.shift) / wide).to(torch.bfloat16)
    inputs = divided if recode.activation is None else quantized(divided, recode.activation, {})
    found = (inputs.float() - trial.shift / wide) @ held.T
    found += (trial.samples_MK / wide) @ down_RK.T @ up_RN.T
    return float((found - trial.truth_MN).square().sum())


def _picked(weights: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Rows of the weights, counted as if these lay under each other."""
    ends = torch.tensor([len(weight) for weight in weights]).cumsum(0)
    starts = [0, *ends.tolist()]
    inside = [
        weight[rows[(rows >= start) & (rows < start + len(weight))] - start].float()
        for weight, start in zip(weights, starts, strict=False)
    ]
    return torch.cat(inside)
