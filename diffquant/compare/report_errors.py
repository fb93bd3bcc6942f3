"""Where a candidate's error comes from: plots along steps, layers and frames, tables of the worst."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from math import isfinite

from diffquant.compare import plots
from diffquant.compare.comparison import BEHIND, Candidate
from diffquant.compare.layers import Layer
from diffquant.compare.report_words import framed, legend, table_row
from diffquant.plan import DENSE

HUES = 6
WORST = 8


def trajectory_plot(candidate: Candidate) -> str:
    """Latents after every step, and the answers to the reference's own inputs."""
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
    key = legend([("hue0", "latents after each step"), ("hue1 dashed", "one-step error")])
    return framed(
        "Along the trajectory",
        "Latents drift as errors compound. The dashed line is the transformer's answer to the "
        "reference's own inputs, so nothing compounds.",
        plots.lines(curves, x="step", y="relative L2") + key,
    )


def _line(name: str, kind: str, values: Sequence[float]) -> plots.Line:
    return plots.Line(
        name=name, kind=kind, points=tuple((float(i), value) for i, value in enumerate(values, 1))
    )


def depth_plot(candidate: Candidate) -> str:
    """Every linear's output error, its weight's error as a tick."""
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
    key = legend([(kind, name) for name, kind in kinds.items()] + [("tick", "weight error")])
    return framed(
        "Along the depth of the network",
        "What each linear gives in one forward from the same input, errors of those before included; "
        "a tick is its weight's own error.",
        plots.bars(items, x="linear", y="relative L2") + key,
    )


def frames_plot(candidate: Candidate) -> str:
    """Every frame of a video; nothing for pictures."""
    runs = [pair.likeness.frames for pair in candidate.pairs]
    if not all(runs):
        return ""
    means = [sum(values) / len(values) for values in zip(*runs, strict=True)]
    thin = [_line("one drawing", "hue0 thin", run) for run in runs] if len(runs) > 1 else []
    drawn = plots.lines(
        [*thin, _line("mean", "hue0", means)], x="frame", y="PSNR, decibels", logarithmic=False
    )
    return framed(
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


def worst_layers(candidate: Candidate) -> str:
    """A table of the layers whose output is furthest off."""
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


def worst_weights(candidate: Candidate) -> str:
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
        f'<div class="card table"><table><tr>{head}</tr>{"".join(map(table_row, rows))}</table></div></details>'
    )


def _path(layer: Layer) -> str:
    return f'<td class="path"><code>{escape(layer.path)}</code></td>'


def _cell(text: str) -> str:
    return f'<td class="number">{text}</td>'


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
