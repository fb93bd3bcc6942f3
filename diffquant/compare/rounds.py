"""Further rounds of measuring: every side loaded, drawn with and let go, in turns."""

from collections.abc import Sequence

from diffquant.compare.cost import Cost
from diffquant.compare.sides import Side, measured
from diffquant.compare.trajectory import Progress
from diffquant.run import Request


def further(
    sides: Sequence[Side], request: Request, count: int, on_progress: Progress
) -> list[list[Cost]]:
    """Costs by side, one per round. The first of these rounds goes backwards, for the round before
    it, which captured, went forwards; so do all that follow, in turns."""
    costs: list[list[Cost]] = [[] for _ in sides]
    for number in range(count):
        places = range(len(sides))
        for place in places if number % 2 else reversed(places):
            costs[place].append(measured(sides[place], request, on_progress))
    return costs
