"""Times taken in turns, and what they say: ratios to one of them, the least and the median."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each thing in every round, in the order of the rounds."""

    seconds: Mapping[str, tuple[float, ...]]

    def least(self, name: str) -> float:
        return min(self.seconds[name])

    def median(self, name: str) -> float:
        return median(self.seconds[name])

    def ratio(self, name: str, to: str) -> "Ratio":
        """Of the least times, and the median of the ratios of each round."""
        rounds = zip(self.seconds[name], self.seconds[to], strict=True)
        return Ratio(
            least=self.least(name) / self.least(to), median=median(own / its for own, its in rounds)
        )


@dataclass(frozen=True, slots=True)
class Ratio:
    """A time as a multiple of another."""

    least: float
    median: float


@dataclass(frozen=True, slots=True)
class Goal:
    """A number that should not be exceeded; met or missed by the median."""

    limit: float

    def is_met(self, ratio: Ratio) -> bool:
        return ratio.median <= self.limit

    def verdict(self, ratio: Ratio) -> str:
        return f"≤ {self.limit:.2f} {'met' if self.is_met(ratio) else '**missed**'}"


def in_turns(tasks: Mapping[str, Callable[[], object]], rounds: int) -> Times:
    """Each task once per round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    gc.collect()
    for turn in range(rounds + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return Times({name: tuple(measured) for name, measured in seconds.items()})
