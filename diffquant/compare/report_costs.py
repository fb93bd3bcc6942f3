"""What each side costs in time and memory, and what that buys."""

from collections.abc import Callable, Sequence
from html import escape

from diffquant.compare import plots
from diffquant.compare.comparison import MEANS, Comparison
from diffquant.compare.cost import Cost
from diffquant.compare.means import Mean
from diffquant.compare.report_words import framed, megabytes, outcome, seconds_text


def costs_section(comparison: Comparison) -> str:
    """A table of all sides, and plots where there are several candidates."""
    everyone = [
        (comparison.reference, comparison.reference_cost, "reference"),
        *((each.name, each.cost, "") for each in comparison.candidates),
    ]
    most = [max(_bars_of(cost)[i] or 0 for _, cost, _ in everyone) for i in range(4)]
    rows = "".join(_cost_row(*one, most) for one in everyone)
    heads = ("", "per step", "loading", "weights", "peak memory")
    head = "".join(f'<th class="{"number" if name else ""}">{name}</th>' for name in heads)
    table = f'<div class="card table"><table><tr>{head}</tr>{rows}</table></div>'
    return (
        f"<h2>What it costs, what it saves</h2><p>{_measured(comparison.reference_cost)} Steps are "
        "medians without the first of each drawing. Peak memory is above what lay there before "
        "loading: the device's, or on a CPU the whole process's.</p>"
        f"{_savings(comparison)}{table}"
    )


def _measured(cost: Cost) -> str:
    rounds = len(cost.step_seconds)
    if rounds == 1:
        return (
            "Measured once: the reference came first and paid for what a process does but once. "
            "--repeat 5 takes turns, and tells how sure the numbers are."
        )
    return f"Measured in {rounds} rounds, the sides in turns; small numbers hold 95 % of means."


def _savings(comparison: Comparison) -> str:
    """Bytes and seconds against error, where there are several to choose from."""
    if len(comparison.candidates) == 1:
        return ""
    bytes_plot = _against_error(
        comparison, lambda cost: cost.weight_bytes / 1e6, "megabytes of weights"
    )
    seconds_plot = _against_error(
        comparison, lambda cost: cost.step.value * 1000, "milliseconds per step"
    )
    return (
        '<div class="plots stacked">'
        + framed("Bytes against error", "Down is truer, left is smaller.", bytes_plot)
        + framed("Time against error", "Down is truer, left is faster.", seconds_plot)
        + "</div>"
    )


def _against_error(comparison: Comparison, of: Callable[[Cost], float], x: str) -> str:
    items = [
        plots.Dot(
            name=each.name,
            kind=outcome(each),
            x=of(each.cost),
            y=each.mean(MEANS["relative_l2"]).value,
        )
        for each in comparison.candidates
    ]
    wall = (comparison.reference, of(comparison.reference_cost))
    return plots.dots(items, x=x, y="relative L2 of the latents", wall=wall)


def _bars_of(cost: Cost) -> tuple[float | None, ...]:
    return cost.step.value, cost.load.value, cost.weight_bytes, cost.peak


def _cost_row(name: str, cost: Cost, kind: str, most: Sequence[float]) -> str:
    shown = (
        seconds_text(cost.step.value) + _sure(cost.step),
        seconds_text(cost.load.value) + _sure(cost.load),
        megabytes(cost.weight_bytes),
        "unknown" if cost.peak is None else megabytes(cost.peak),
    )
    cells = "".join(
        f'<td class="number">{text}<span class="meter"><i style="width:{100 * (value or 0) / (top or 1):.0f}%">'
        "</i></span></td>"
        for text, value, top in zip(shown, _bars_of(cost), most, strict=True)
    )
    return f'<tr class="{kind}"><td>{escape(name)}</td>{cells}</tr>'


def _sure(seconds: Mean) -> str:
    if seconds.low is None or seconds.high is None:
        return ""
    return f" <small>{seconds_text(seconds.low)} to {seconds_text(seconds.high)}</small>"
