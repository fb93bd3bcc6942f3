"""What a quantized model may cost, as a person says it, and the layers that have to stay for that.

    error=0.05     the one-step error, see `alone`
    size=20MB      bytes of the transformer;  size=0.4  a share of what it has dense
    level=strict   whatever `compare` asks of the drawings at that level

Layers stay in one order, those first that take away most of the squared error for a byte: errors of
layers are nearly independent, so their squares add. How many stay is decided by measuring.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from diffquant.compare.alone import Unit
from diffquant.compare.verdict import LEVELS, judge, limits
from diffquant.errors import ConvertError, UsageError

SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>kB|MB|GB)?", re.IGNORECASE)
SCALES = {"kb": 1e3, "mb": 1e6, "gb": 1e9}

Units = Sequence[Unit]


class Trial(Protocol):
    """A model with some layers kept dense, as often as one wants to look.

    always  units that stay in every case
    order   all others, the one that should stay first in front
    """

    @property
    def always(self) -> Units: ...
    @property
    def order(self) -> Units: ...
    @property
    def wide_bytes(self) -> int: ...
    def bytes(self, kept: Units) -> int: ...
    def error(self, kept: Units) -> float: ...
    def figures(self, kept: Units) -> Mapping[str, float | None]: ...


@dataclass(frozen=True, slots=True)
class ErrorBudget:
    """A one-step error that is not exceeded."""

    most: float

    @staticmethod
    def parsed(text: str) -> "ErrorBudget":
        return ErrorBudget(_number(text, "error=0.05"))

    def __str__(self) -> str:
        return f"one-step error {self.most:g}"

    def kept(self, trial: Trial) -> tuple[Unit, ...]:
        """The units that stay, `trial.always` among them. Raises ConvertError where none suffice."""
        return _fewest(trial, lambda kept: trial.error(kept) <= self.most, str(self))


@dataclass(frozen=True, slots=True)
class SizeBudget:
    """Bytes that are not exceeded; a share of the dense model's where `is_share`."""

    most: float
    is_share: bool

    @staticmethod
    def parsed(text: str) -> "SizeBudget":
        found = SIZE.fullmatch(text.strip())
        if found is None:
            raise UsageError(f"--budget size={text} is no size", hint="--budget size=20MB")
        number, unit = float(found["number"]), found["unit"]
        if unit is None and number > 1:
            raise UsageError(
                f"--budget size={text} is neither a share nor has it a unit",
                hint=f"--budget size={text}MB, or a share such as size=0.4",
            )
        return SizeBudget(number if unit is None else number * SCALES[unit.lower()], unit is None)

    def __str__(self) -> str:
        return f"{self.most:.0%} of the dense size" if self.is_share else f"{self.most / 1e6:g} MB"

    def kept(self, trial: Trial) -> tuple[Unit, ...]:
        """As many as there is room for. Raises ConvertError where there is none for the others."""
        most = self.most * trial.wide_bytes if self.is_share else self.most
        kept = tuple(trial.always)
        if (least := trial.bytes(kept)) > most:
            raise ConvertError(
                f"{self} cannot be met: with every layer quantized that may be, "
                f"{least / 1e6:.2f} MB are left",
                hint=f"--budget size={least / 1e6 + 0.01:.2f}MB",
            )
        for unit in trial.order:
            if trial.bytes((*kept, unit)) <= most:
                kept = (*kept, unit)
        return kept


@dataclass(frozen=True, slots=True)
class LevelBudget:
    """Drawings that `compare` would pass."""

    name: str

    @staticmethod
    def parsed(text: str) -> "LevelBudget":
        limits(text, {})
        return LevelBudget(text)

    def __str__(self) -> str:
        return f"level {self.name}"

    def kept(self, trial: Trial) -> tuple[Unit, ...]:
        """The units that stay, `trial.always` among them. Raises ConvertError where none suffice."""
        return _fewest(trial, lambda kept: judge(self.name, {}, trial.figures(kept)).ok, str(self))


#: What a model may cost.
Budget = ErrorBudget | SizeBudget | LevelBudget

KINDS: Mapping[str, Callable[[str], Budget]] = {
    "error": ErrorBudget.parsed,
    "size": SizeBudget.parsed,
    "level": LevelBudget.parsed,
}


def parsed(text: str) -> Budget:
    """`error=0.05`, `size=20MB`, `size=0.4` or `level=strict`. Raises UsageError for anything else."""
    kind, equals, value = text.partition("=")
    if not equals or kind not in KINDS:
        raise UsageError(
            f"--budget {text!r} is not of the form {'|'.join(KINDS)}=VALUE",
            hint=f"--budget error=0.05, size=20MB, size=0.4 or level={list(LEVELS)[-1]}",
        )
    return KINDS[kind](value)


def worth(error: float, unit: Unit) -> float:
    """Squared error that keeping the unit takes away, for each byte that this costs."""
    return error**2 / max(1, unit.saved)


def _fewest(trial: Trial, holds: Callable[[Units], bool], what: str) -> tuple[Unit, ...]:
    """The shortest beginning of the order that holds, found by halving; every look is a measurement."""
    always, order = tuple(trial.always), tuple(trial.order)
    low, high = 0, len(order)
    if high == 0 or not holds((*always, *order[:-1])):
        raise ConvertError(
            f"{what} cannot be met: not even one of the layers may be quantized",
            hint="a larger budget, or an --encoding of more bits",
        )
    high -= 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds((*always, *order[:middle])) else (middle + 1, high)
    return (*always, *order[:high])


def _number(text: str, example: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise UsageError(f"{text!r} is no positive number", hint=f"--budget {example}")
    return value
