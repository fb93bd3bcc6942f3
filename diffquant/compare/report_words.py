"""Words, figures and frames that several parts of the page use."""

from collections.abc import Iterable
from html import escape

from diffquant.compare.comparison import Candidate
from diffquant.compare.means import Mean


def outcome(candidate: Candidate) -> str:
    """What became of the candidate, in one word that is a colour too."""
    return "kept" if candidate.verdict.ok else "missed"


def between(found: Mean, form: str) -> str:
    """The interval of a mean, in a figure's own form."""
    return f"{found.low:{form}} to {found.high:{form}}"


def megabytes(count: int) -> str:
    """Bytes as a person says them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def seconds_text(value: float) -> str:
    """Seconds as a person says them."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1000:.1f} ms" if value < 0.1 else f"{value * 1000:.0f} ms"


def framed(title: str, text: str, drawn: str) -> str:
    """A plot under its title and a sentence of what it shows."""
    return f'<div class="card plot"><h3>{title}</h3><p>{text}</p>{drawn}</div>'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Which colour is which."""
    spans = "".join(f'<span class="{kind}">{escape(name)}</span>' for kind, name in entries)
    return f'<div class="legend">{spans}</div>'


def table_row(cells: Iterable[str]) -> str:
    """Cells as a row."""
    return f"<tr>{''.join(cells)}</tr>"
