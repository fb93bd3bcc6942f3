"""A comparison as one HTML page that holds everything it shows and asks no network."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from math import isfinite, isnan
from pathlib import Path

from diffquant.compare import plots
from diffquant.compare.comparison import BEHIND, MEANS, Candidate, Comparison
from diffquant.compare.cost import Cost
from diffquant.compare.layers import Layer
from diffquant.compare.means import Mean
from diffquant.compare.pictures import article, references
from diffquant.compare.verdict import FIGURES, Check
from diffquant.plan import DENSE

HERE = Path(__file__).parent
#: The figures of tiles that are means over drawings, and how MEANS calls them.
MEAN_OF = {"psnr": "psnr_db", "ssim": "ssim", "cosine": "cosine", "relative_l2": "relative_l2"}
HUES = 6
WORST = 8
#: Commands that are shown without being asked for.
FEW = 4


def page(comparison: Comparison) -> str:
    """The whole page."""
    drawn = comparison.candidates[0].pairs
    body = [
        _head(comparison),
        _summary(comparison),
        _tabs(comparison),
        *(_candidate(each, comparison) for each in comparison.candidates),
        _costs(comparison),
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


# ---------------------------------------------------------------------------------------------- head


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
    rows = "".join(_row(_summed(each, comparison)) for each in comparison.candidates)
    return f'<div class="card table summary"><table><tr>{head}</tr>{rows}</table></div>'


def _summed(candidate: Candidate, comparison: Comparison) -> Iterator[str]:
    against = comparison.against_first(candidate)["psnr_db"]
    is_first = candidate is comparison.candidates[0]
    cost, weight = candidate.cost, candidate.figures["weight"]
    yield f'<td class="outcome {_outcome(candidate)}">{escape(candidate.name)}</td>'
    numbers = (
        FIGURES["psnr"].shown(candidate.mean(MEANS["psnr_db"]).value),
        "" if is_first else _signed(against),
        f"{candidate.mean(MEANS['relative_l2']).value:.4f}",
        "" if weight is None else f"{weight:.4f}",
        _megabytes(cost.weight_bytes),
        _seconds(cost.step.value),
    )
    yield from (f'<td class="number">{text}</td>' for text in numbers)


def _signed(difference: Mean) -> str:
    """With how sure it is, where that is known."""
    said = f"{difference.value:+.1f} dB"
    if difference.low is not None and difference.high is not None:
        said += f" <small>{_between(difference, '+.1f')}</small>"
    return said.replace("-", "−")


def _between(found: Mean, form: str) -> str:
    return f"{found.low:{form}} to {found.high:{form}}"


def _tabs(comparison: Comparison) -> str:
    if len(comparison.candidates) == 1:
        return ""
    buttons = "".join(
        f'<button type="button" role="tab" class="{_outcome(each)}">{escape(each.name)}</button>'
        for each in comparison.candidates
    )
    return f'<div class="tabs" role="tablist" aria-label="Candidates">{buttons}</div>'


def _outcome(candidate: Candidate) -> str:
    return "kept" if candidate.verdict.ok else "missed"


# ----------------------------------------------------------------------------------------- candidate


def _candidate(candidate: Candidate, comparison: Comparison) -> str:
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
        f'<div class="plots">{_trajectory(candidate)}{_depth(candidate)}{_frames(candidate)}</div>'
        f"{_worst(candidate)}{_weights(candidate)}</section>"
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
    yield _tile("weights", _megabytes(ours.weight_bytes), _times(Mean(value=size)))
    yield _tile("per step", _seconds(ours.step.value), _times(comparison.slowdown(candidate)))


def _interval(candidate: Candidate, figure: str) -> str:
    """Where the mean over drawings lies, where there are several."""
    of = MEANS.get(MEAN_OF.get(figure, ""))
    found = None if of is None else candidate.mean(of)
    if found is None or found.low is None or found.high is None:
        return ""
    return f"<small>{_between(found, f'.{FIGURES[figure].digits}f')} (95 %)</small>"


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
    return f"{said}<small>{_between(ratio, '.2f')} (95 %)</small>"


# --------------------------------------------------------------------------------------------- plots


def _trajectory(candidate: Candidate) -> str:
    runs = [[step.relative_l2 for step in pair.steps] for pair in candidate.pairs]
    means = [sum(values) / len(values) for values in zip(*runs, strict=True)]
    by_step: dict[int, list[float]] = {}
    for each in candidate.one_step:
        by_step.setdefault(each.step, []).append(each.distance.relative_l2)
    alone = [sum(values) / len(values) for _, values in sorted(by_step.items())]
    thin = [_line("one drawing", "hue0 thin", run) for run in runs] if len(runs) > 1 else []
    curves = [
        *thin,
        _line("latents, mean", "hue0", means),
        _line("one step from the reference", "hue1 dashed", alone),
    ]
    legend = _legend([("hue0", "latents after each step"), ("hue1 dashed", "one-step error")])
    return _plot(
        "Along the trajectory",
        "Latents drift as errors compound. The dashed line is the transformer's answer to the "
        "reference's own inputs, so nothing compounds.",
        plots.lines(curves, x="step", y="relative L2") + legend,
    )


def _line(name: str, kind: str, values: Sequence[float]) -> plots.Line:
    return plots.Line(
        name=name, kind=kind, points=tuple((float(i), value) for i, value in enumerate(values, 1))
    )


def _depth(candidate: Candidate) -> str:
    kinds = _kinds(layer.encoding for layer in candidate.layers)
    weight = BEHIND["weight"]
    items = [
        plots.Bar(
            title=_told(layer),
            kind=kinds[layer.encoding],
            value=layer.output or 0.0,
            mark=weight(layer) or None,
        )
        for layer in candidate.layers
    ]
    legend = _legend([(kind, name) for name, kind in kinds.items()] + [("tick", "weight error")])
    return _plot(
        "Along the depth of the network",
        "What each linear gives in one forward from the same input, errors of those before included; "
        "a tick is its weight's own error.",
        plots.bars(items, x="linear", y="relative L2") + legend,
    )


def _frames(candidate: Candidate) -> str:
    """Every frame of a video; nothing for pictures."""
    runs = [pair.likeness.frames for pair in candidate.pairs]
    if not all(runs):
        return ""
    means = [sum(values) / len(values) for values in zip(*runs, strict=True)]
    thin = [_line("one drawing", "hue0 thin", run) for run in runs] if len(runs) > 1 else []
    drawn = plots.lines(
        [*thin, _line("mean", "hue0", means)], x="frame", y="PSNR, decibels", logarithmic=False
    )
    return _plot(
        "Frame by frame",
        "PSNR of every frame. Up is truer; a dip is a moment to look at.",
        drawn,
    )


def _kinds(encodings: Iterable[str]) -> dict[str, str]:
    """A colour for each encoding; dense layers are grey."""
    found = dict.fromkeys(encodings)
    hued = [name for name in found if name != DENSE.name]
    return {
        name: DENSE.name if name == DENSE.name else f"hue{hued.index(name) % HUES}"
        for name in found
    }


def _told(layer: Layer) -> str:
    figures = [f"output {layer.output:.4f}"] if layer.output is not None else []
    figures += [
        f"{name} {value:.4f}"
        for name in ("weight", "kernel")
        if (value := BEHIND[name](layer)) is not None
    ]
    return "\n".join([layer.path, f"{layer.encoding}, {layer.choice}", *figures])


def _plot(title: str, text: str, drawn: str) -> str:
    return f'<div class="card plot"><h3>{title}</h3><p>{text}</p>{drawn}</div>'


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    spans = "".join(f'<span class="{kind}">{escape(name)}</span>' for kind, name in entries)
    return f'<div class="legend">{spans}</div>'


def _worst(candidate: Candidate) -> str:
    rows = [
        (
            _path(layer),
            f"<td>{escape(layer.encoding)}</td><td>{escape(layer.choice)}</td>",
            *(_cell(_error(of(layer))) for of in BEHIND.values()),
        )
        for layer in candidate.worst(BEHIND["output"], WORST)
    ]
    heads = ("layer", "encoding", "kernel", *(f"{name} error" for name in BEHIND))
    return _folded(f"The {len(rows)} layers with the largest output error", heads, 3, rows)


def _weights(candidate: Candidate) -> str:
    """What the file did to the weights: outliers first, then those left unquantized."""
    known = [layer for layer in candidate.layers if layer.weight is not None]
    odd = [layer for layer in known if layer.weight is not None and layer.weight.suspicion]
    worst = candidate.worst(BEHIND["weight"], WORST)
    chosen = list({layer.path: layer for layer in (*worst, *odd)}.values())
    rows = [(_path(layer), *_weight_cells(layer)) for layer in chosen[: 3 * WORST]]
    heads = ("layer", "encoding", "suspicion", "weight error", "SQNR", "times the usual")
    return _folded("The weights that lost most, and what may have happened to them", heads, 3, rows)


def _weight_cells(layer: Layer) -> Iterator[str]:
    each = layer.weight
    assert each is not None, "only layers with a figure are listed"
    figures = each.fidelity
    yield f"<td>{escape(layer.encoding)}</td><td>{escape(each.suspicion or '')}</td>"
    yield _cell("" if figures is None else _error(figures.relative_error))
    yield _cell(
        "" if figures is None or not isfinite(figures.sqnr_db) else f"{figures.sqnr_db:.1f} dB"
    )
    yield _cell(f"{each.factor:.2f}")


def _folded(title: str, heads: Sequence[str], words: int, rows: Sequence[Iterable[str]]) -> str:
    """A table behind its title; the first `words` columns hold words, the others numbers."""
    head = "".join(
        f'<th class="{"" if index < words else "number"}">{name}</th>'
        for index, name in enumerate(heads)
    )
    return (
        f"<details><summary>{title}</summary>"
        f'<div class="card table"><table><tr>{head}</tr>{"".join(map(_row, rows))}</table></div></details>'
    )


def _path(layer: Layer) -> str:
    return f'<td class="path"><code>{escape(layer.path)}</code></td>'


def _cell(text: str) -> str:
    return f'<td class="number">{text}</td>'


def _row(cells: Iterable[str]) -> str:
    return f"<tr>{''.join(cells)}</tr>"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


# --------------------------------------------------------------------------------------------- costs


def _costs(comparison: Comparison) -> str:
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
        + _plot("Bytes against error", "Down is truer, left is smaller.", bytes_plot)
        + _plot("Time against error", "Down is truer, left is faster.", seconds_plot)
        + "</div>"
    )


def _against_error(comparison: Comparison, of: Callable[[Cost], float], x: str) -> str:
    items = [
        plots.Dot(
            name=each.name,
            kind=_outcome(each),
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
        _seconds(cost.step.value) + _sure(cost.step),
        _seconds(cost.load.value) + _sure(cost.load),
        _megabytes(cost.weight_bytes),
        "unknown" if cost.peak is None else _megabytes(cost.peak),
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
    return f" <small>{_seconds(seconds.low)} to {_seconds(seconds.high)}</small>"


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


# --------------------------------------------------------------------------------------------- words


def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _megabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1000:.1f} ms" if value < 0.1 else f"{value * 1000:.0f} ms"
