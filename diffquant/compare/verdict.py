"""Figures, limits and the verdict: which of them a candidate keeps, the first that it misses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan

from diffquant.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A number that can be judged.

    higher  whether more is better
    digits  after the point, where it is shown
    """

    title: str
    unit: str = ""
    higher: bool = False
    digits: int = 3

    def shown(self, value: float) -> str:
        return f"{value:.{self.digits}f}{self.unit}"

    def keeps(self, value: float, limit: float) -> bool:
        """Whether the value is no worse than the limit; a value that is no number never is."""
        return not isnan(value) and (value >= limit if self.higher else value <= limit)


#: In the order they are judged. Means over all prompts and seeds, unless the title says otherwise.
FIGURES: Mapping[str, Figure] = {
    "weight": Figure(title="worst layer's weight error", digits=4),
    "kernel": Figure(title="worst kernel error", digits=5),
    "one_step": Figure(title="worst one-step error", digits=4),
    "psnr": Figure(title="PSNR", unit=" dB", higher=True, digits=2),
    "mae": Figure(title="picture MAE", unit="/255", digits=2),
    "cosine": Figure(title="latent cosine", higher=True, digits=5),
    "relative_l2": Figure(title="latent relative L2", digits=4),
    "ssim": Figure(title="SSIM", higher=True, digits=4),
    "ms_ssim": Figure(title="MS-SSIM", higher=True, digits=4),
    "flicker": Figure(title="flicker", unit="/255", digits=2),
    "lpips": Figure(title="LPIPS", digits=4),
    "image_reward": Figure(title="ImageReward gained", higher=True, digits=3),
}
#: Limits by level. PSNR in decibels, MAE in 8-bit steps, the last two of the final latents.
LEVELS: Mapping[str, Mapping[str, float]] = {
    "smoke": {"psnr": 20.0, "mae": 12.0, "cosine": 0.98, "relative_l2": 0.20, "kernel": 0.02},
    "strict": {"psnr": 25.0, "mae": 6.0, "cosine": 0.995, "relative_l2": 0.08, "kernel": 0.005},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One judged figure; `value` is None where it could not be measured."""

    figure: str
    value: float | None
    limit: float

    @property
    def ok(self) -> bool:
        return self.value is not None and FIGURES[self.figure].keeps(self.value, self.limit)

    def __str__(self) -> str:
        figure = FIGURES[self.figure]
        if self.value is None:
            return f"{figure.title}: not measured"
        if self.ok:
            sign = "≥" if figure.higher else "≤"
        else:
            sign = "<" if figure.higher else ">"
        return f"{figure.title} {figure.shown(self.value)} {sign} {figure.shown(self.limit)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a level says of one candidate.

    defects  sentences that no figure can outweigh: blank pictures, exchanged layers
    """

    level: str
    defects: tuple[str, ...]
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return not self.defects and all(check.ok for check in self.checks)

    @property
    def first_failure(self) -> str | None:
        """One line, None when everything holds."""
        failed = [str(check) for check in self.checks if not check.ok]
        return next(iter([*self.defects, *failed]), None)


def limits(level: str, thresholds: Mapping[str, float]) -> dict[str, float]:
    """The level's limits with typed ones in their place. Raises UsageError for unknown names."""
    if level not in LEVELS:
        raise UsageError(f"there is no level {level!r}", hint=f"one of: {', '.join(LEVELS)}")
    for name in thresholds:
        if name not in FIGURES:
            raise UsageError(
                f"there is no figure {name!r} to set a threshold for",
                hint=f"one of: {', '.join(FIGURES)}",
            )
    return {**LEVELS[level], **thresholds}


def judge(
    level: str,
    thresholds: Mapping[str, float],
    figures: Mapping[str, float | None],
    defects: Sequence[str] = (),
) -> Verdict:
    """Hold measured figures against the limits of the level.

    A figure that could not be measured is judged only where a threshold was typed for it, and fails.
    """
    bounds = limits(level, thresholds)
    checks = tuple(
        Check(figure=name, value=figures.get(name), limit=bounds[name])
        for name in FIGURES
        if name in bounds and (figures.get(name) is not None or name in thresholds)
    )
    return Verdict(level=level, defects=tuple(defects), checks=checks)
