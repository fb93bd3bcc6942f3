"""A comparison as one HTML page that holds everything it shows and asks no network."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from diffquant.compare.comparison import MEANS, Candidate, Comparison
from diffquant.compare.means import Mean
from diffquant.compare.pictures import references
from diffquant.compare.report_candidate import candidate_section
from diffquant.compare.report_costs import costs_section
from diffquant.compare.report_words import between, megabytes, outcome, seconds_text, table_row
from diffquant.compare.verdict import FIGURES

HERE = Path(__file__).parent
#: Commands that are shown without being asked for.
FEW = 4


def page(comparison: Comparison) -> str:
    """The whole page."""
    drawn = comparison.candidates[0].pairs
    body = [
        _head(comparison),
        _summary(comparison),
        _tabs(comparison),
        *(candidate_section(each, comparison) for each in comparison.candidates),
        costs_section(comparison),
        _commands(comparison),
        _conditions(comparison),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(_title(comparison))}</title>"
        f"<style>{_text('report.css')}{references(drawn)}</style></head>"
        f"<body><main>{''.join(body)}"
        "<footer>Made by diffquant. Same noise, prompts and steps on both sides; the two were never "
        f"in memory together.</footer></main><script>{_text('report.js')}</script></body></html>\n"
    )


def _title(comparison: Comparison) -> str:
    names = ", ".join(candidate.name for candidate in comparison.candidates)
    return f"{names} against {comparison.reference}"


def _head(comparison: Comparison) -> str:
    first = comparison.candidates[0].pairs
    failure = comparison.first_failure
    said = "" if failure is None else f'<p class="failure">{escape(failure)}</p>'
    notes = "".join(f'<p class="note">{escape(text)}</p>' for text in comparison.notes)
    conditions = comparison.conditions
    facts = (
        conditions.get("pipeline", ""),
        _count(len(first), "drawing"),
        conditions.get("size", ""),
        f"{len(first[0].steps)} steps",
        conditions.get("dtype", ""),
        conditions.get("device", ""),
    )
    return (
        '<header><div class="over"><span>diffquant compare</span>'
        '<button class="theme" type="button">light / dark</button></div>'
        f'<h1>{_sentence(comparison)}</h1><p class="lead">{escape(" · ".join(filter(None, facts)))}</p>'
        f"{said}{notes}</header>"
    )


def _sentence(comparison: Comparison) -> str:
    level = comparison.candidates[0].verdict.level
    kept = sum(candidate.verdict.ok for candidate in comparison.candidates)
    total = len(comparison.candidates)
    colour = "good" if comparison.ok else "bad"
    if total == 1:
        verb = "keeps" if comparison.ok else "misses"
        name = escape(comparison.candidates[0].name)
        return f'{name} <b class="{colour}">{verb} {level}</b>'
    every = "All" if kept == total else f"{kept} of"
    return f'{every} {total} candidates <b class="{colour}">keep {level}</b>'


def _summary(comparison: Comparison) -> str:
    """One line for each of several candidates, and what choosing another than the first changes."""
    if len(comparison.candidates) == 1:
        return ""
    head = "".join(
        f'<th class="{kind}">{text}</th>'
        for text, kind in (
            ("", ""), ("PSNR", "number"), ("against the first", "number"), ("latents", "number"),
            ("worst weight", "number"), ("weights", "number"), ("per step", "number"),
        )
    )  # fmt: skip
    rows = "".join(table_row(_summed(each, comparison)) for each in comparison.candidates)
    return f'<div class="card table summary"><table><tr>{head}</tr>{rows}</table></div>'


def _summed(candidate: Candidate, comparison: Comparison) -> Iterator[str]:
    against = comparison.against_first(candidate)["psnr_db"]
    is_first = candidate is comparison.candidates[0]
    cost, weight = candidate.cost, candidate.figures["weight"]
    yield f'<td class="outcome {outcome(candidate)}">{escape(candidate.name)}</td>'
    numbers = (
        FIGURES["psnr"].shown(candidate.mean(MEANS["psnr_db"]).value),
        "" if is_first else _signed(against),
        f"{candidate.mean(MEANS['relative_l2']).value:.4f}",
        "" if weight is None else f"{weight:.4f}",
        megabytes(cost.weight_bytes),
        seconds_text(cost.step.value),
    )
    yield from (f'<td class="number">{text}</td>' for text in numbers)


def _signed(difference: Mean) -> str:
    """With how sure it is, where that is known."""
    said = f"{difference.value:+.1f} dB"
    if difference.low is not None and difference.high is not None:
        said += f" <small>{between(difference, '+.1f')}</small>"
    return said.replace("-", "−")


def _tabs(comparison: Comparison) -> str:
    if len(comparison.candidates) == 1:
        return ""
    buttons = "".join(
        f'<button type="button" role="tab" class="{outcome(each)}">{escape(each.name)}</button>'
        for each in comparison.candidates
    )
    return f'<div class="tabs" role="tablist" aria-label="Candidates">{buttons}</div>'


def _commands(comparison: Comparison) -> str:
    pictures = [
        (f"A picture by {comparison.reference}", comparison.reference_command),
        *((f"A picture by {each.name}", each.command) for each in comparison.candidates),
    ]
    blocks = "".join(_command(title, command) for title, command in pictures)
    if len(pictures) > FEW:
        blocks = f"<details><summary>One picture by each</summary>{blocks}</details>"
    ours = _command("This comparison", comparison.command) if comparison.command else ""
    return f"<h2>The commands</h2>{ours}{blocks}"


def _command(title: str, command: str) -> str:
    return (
        f'<p class="note">{escape(title)}</p><div class="card command"><pre>{escape(command)}</pre>'
        '<button type="button">copy</button></div>'
    )


def _conditions(comparison: Comparison) -> str:
    absent = {f"not measured: {name}": why for name, why in comparison.unmeasured.items()}
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="path">{escape(value)}</td></tr>'
        for name, value in {**comparison.conditions, **absent}.items()
    )
    return (
        "<details><summary>What both sides share, and what was not measured</summary>"
        f'<div class="card table"><table>{rows}</table></div></details>'
    )


def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
