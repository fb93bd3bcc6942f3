"""One candidate's part of the page: its figures with their limits, its pictures, its errors."""

from collections.abc import Iterator
from html import escape
from math import isfinite, isnan

from diffquant.compare.comparison import MEANS, Candidate, Comparison
from diffquant.compare.means import Mean
from diffquant.compare.pictures import article
from diffquant.compare.report_errors import (
    WORST,
    depth_plot,
    frames_plot,
    trajectory_plot,
    worst_layers,
    worst_weights,
)
from diffquant.compare.report_words import between, megabytes, seconds_text
from diffquant.compare.verdict import FIGURES, Check

#: The figures of tiles that are means over drawings, and how MEANS calls them.
MEAN_OF = {"psnr": "psnr_db", "ssim": "ssim", "cosine": "cosine", "relative_l2": "relative_l2"}


def candidate_section(candidate: Candidate, comparison: Comparison) -> str:
    """A candidate from its figures to its worst layers."""
    notes = "".join(
        f'<p class="note">{escape(text)}</p>' for text in (*candidate.truth_lines, *candidate.notes)
    )
    defects = "".join(
        f'<p class="failure">{escape(text)}</p>'
        for text in candidate.verdict.defects[:WORST]
        if f"{candidate.name}: {text}" != comparison.first_failure
    )
    pairs = "".join(
        article(pair, index, candidate.name, comparison.reference)
        for index, pair in enumerate(candidate.pairs)
    )
    return (
        f'<section class="candidate"><div class="tiles">{"".join(_tiles(candidate, comparison))}</div>'
        f"{defects}{notes}"
        f"<h2>Pictures</h2><p>Drag across a picture: {escape(comparison.reference)} on the left, "
        f"{escape(candidate.name)} on the right. Beside it what differs, amplified as it says.</p>"
        f'<div class="pairs">{pairs}</div>'
        "<h2>Where the error comes from</h2><p>Relative L2: the size of the difference over the size "
        "of the reference. 0.01 is one percent.</p>"
        f'<div class="plots">{trajectory_plot(candidate)}{depth_plot(candidate)}{frames_plot(candidate)}</div>'
        f"{worst_layers(candidate)}{worst_weights(candidate)}</section>"
    )


def _tiles(candidate: Candidate, comparison: Comparison) -> Iterator[str]:
    checks = {check.figure: check for check in candidate.verdict.checks}
    for name in ("psnr", "ssim", "cosine", "relative_l2", "one_step", "kernel"):
        value = candidate.figures[name]
        if value is not None:
            shown = FIGURES[name].shown(value) if isfinite(value) else _without_number(value)
            below = _limit(checks.get(name)) + _interval(candidate, name)
            yield _tile(FIGURES[name].title, shown, below)
    ours, theirs = candidate.cost, comparison.reference_cost
    size = ours.weight_bytes / theirs.weight_bytes if theirs.weight_bytes else 1.0
    yield _tile("weights", megabytes(ours.weight_bytes), _times(Mean(value=size)))
    yield _tile("per step", seconds_text(ours.step.value), _times(comparison.slowdown(candidate)))


def _interval(candidate: Candidate, figure: str) -> str:
    """Where the mean over drawings lies, where there are several."""
    of = MEANS.get(MEAN_OF.get(figure, ""))
    found = None if of is None else candidate.mean(of)
    if found is None or found.low is None or found.high is None:
        return ""
    return f"<small>{between(found, f'.{FIGURES[figure].digits}f')} (95 %)</small>"


def _without_number(value: float) -> str:
    return "NaN" if isnan(value) else "∞"


def _tile(title: str, value: str, below: str) -> str:
    head = escape(title[:1].upper() + title[1:])
    return f'<div class="tile"><span>{head}</span><strong>{escape(value)}</strong>{below}</div>'


def _limit(check: Check | None) -> str:
    if check is None:
        return "<small>not judged</small>"
    figure = FIGURES[check.figure]
    sign = "at least" if figure.higher else "at most"
    colour, mark = ("good", "✓") if check.ok else ("bad", "✗")
    return f'<small class="{colour}">{mark} {sign} {check.limit:g}{escape(figure.unit)}</small>'


def _times(ratio: Mean) -> str:
    said = f"<small>{ratio.value:.2f} × the reference</small>"
    if ratio.low is None or ratio.high is None:
        return said
    return f"{said}<small>{between(ratio, '.2f')} (95 %)</small>"
