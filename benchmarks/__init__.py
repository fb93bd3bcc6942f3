"""`python -m benchmarks`: every performance table of this project, measured here and now.

One file per section, each with a `SECTION`; its module's name is what is typed. A section returns
Markdown, and RESULTS.md keeps the last result of each. Numbers are ratios of times taken in turns,
because a machine's speed changes from minute to minute and less within a round.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to measure.

    rounds   how often everything is measured, at most; sections may need fewer
    work     folder for generated checkpoints, kept between runs
    threads  of torch, one per core
    """

    rounds: int
    work: Path
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One heading of RESULTS.md. `order` is its place; `run` returns what stands below it."""

    order: int
    title: str
    run: Callable[[Settings], str]
