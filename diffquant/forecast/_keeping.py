"""What `--memory-budget` comes to, from kernel choices alone: how much may stay decoded, at most.

Which layers gain by it is measured while loading; here every one does that could be kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffquant.kernels import KERNELS, Choice

#: Rows of input that a product is timed with: `keeping.TOKENS`.
TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Keeping:
    """Bytes of a component that stay decoded once it ran, and bytes that timing its products takes."""

    kept: int = 0
    timing: int = 0


def keeping(
    choices: Mapping[str, Sequence[Choice]], budget: int, compute: int
) -> dict[str, Keeping]:
    """Of every component; the budget is spent in their order.

    compute  bytes of one value of the run's dtype
    """
    found: dict[str, Keeping] = {}
    for name, each in choices.items():
        cells = [_cells(choice) for choice in each if _keeps(choice)]
        # Float16 would be kept in float32, but nobody computes in it on a CPU.
        wide = 2 if compute == 2 else 4
        kept = min(budget, wide * sum(cells))
        budget -= kept
        timing = max((_timing(choice, wide) for choice in each if _keeps(choice)), default=0)
        found[name] = Keeping(kept=kept, timing=timing)
    return found


def _keeps(choice: Choice) -> bool:
    return all(KERNELS.load(kernel).keeps for kernel in choice.kernels)


def _cells(choice: Choice) -> int:
    return sum(spec.shape_NK[0] * spec.shape_NK[1] for spec in choice.specs)


def _timing(choice: Choice, wide: int) -> int:
    """The weight, decoded once, and what goes in and comes out."""
    rows = max(spec.shape_NK[0] + spec.shape_NK[1] for spec in choice.specs)
    return wide * (_cells(choice) + TOKENS * rows)
