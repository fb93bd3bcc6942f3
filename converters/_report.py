"""What a conversion cost: every quantized layer of the file, decoded, against the weight it was made
from; a few rows at a time, whatever a layer's size.

Letters: N output features, K input features.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import click

from diffquant.converters._options import Writing
from diffquant.errors import ConvertError
from diffquant.fidelity import LayerFidelity, Running
from diffquant.pieces import dense
from diffquant.plan import DENSE, LayerPlan, Piece, Plan, Role, Span
from diffquant.tensors import Passing, Weights
from diffquant.writing import Progress

#: Rows that are decoded together hold about this many weights.
ELEMENTS = 1 << 22
WORST = 10
BIASES = frozenset({Role.BIAS, Role.INT_BIAS})


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of all quantized layers, the worst first; `figures` says what they mean."""

    layers: tuple[LayerFidelity, ...]

    @property
    def worst(self) -> tuple[LayerFidelity, ...]:
        return self.layers[:WORST]

    def judge(self, max_error: float | None, path: Path | None, *, may_stay: bool = False) -> None:
        """Saves it to `path`. Raises ConvertError when a layer lost a larger part of its weight than
        `max_error`; `may_stay` when it can be left as it is instead."""
        if path is not None:
            self.save(path)
        if max_error is None or not self.layers or _error(self.layers[0]) <= max_error:
            return
        over = sum(_error(layer) > max_error for layer in self.layers)
        first = self.layers[0]
        raise ConvertError(
            f"{over} of {len(self.layers)} layers are worse than --max-error {max_error:g}, the "
            f"worst is {first.path!r} with {_error(first):.4g}; nothing was kept",
            hint=f"--keep-bf16-pattern '^{first.path}$' leaves it as it is"
            if may_stay
            else "--report FILE has the figures of every layer",
        )

    def to_json(self) -> dict[str, Any]:
        """Median error, and the worst layers with theirs."""
        errors = [_error(layer) for layer in self.layers]
        return {
            "layers": len(self.layers),
            "median_relative_error": _short(median(errors)) if errors else None,
            "worst": [_figures(layer) for layer in self.worst],
        }

    @property
    def sentence(self) -> str:
        """What decoding showed, to put behind where the files lie."""
        if not self.layers:
            return ""
        if self.is_exact:
            return f"; {self._exactly}"
        first = self.layers[0]
        return f"; {first.path} lost most, relative error {_error(first):.2g}"

    @property
    def is_exact(self) -> bool:
        """Whether no layer lost anything."""
        return not any(map(_error, self.layers[:1]))

    @property
    def _exactly(self) -> str:
        return f"{len(self.layers)} layers decode to the same weights"

    def save(self, path: Path) -> None:
        """All layers as JSON."""
        text = json.dumps([_figures(layer) for layer in self.layers], indent=1)
        path.write_text(text + "\n", "utf-8")

    def table(self) -> str:
        """The worst layers in aligned columns, for people; a sentence when none lost anything."""
        if self.is_exact:
            return self._exactly
        rows = [("layer", "encoding", "relative error", "SQNR dB")]
        for layer in self.worst:
            assert layer.fidelity is not None, "every layer here was measured"
            error, ratio = layer.fidelity.relative_error, layer.fidelity.sqnr_db
            rows.append((layer.path, layer.encoding, f"{error:.4f}", f"{ratio:.1f}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                [
                    *map(str.ljust, row[:2], widths[:2]),
                    *map(str.rjust, row[2:], widths[2:]),
                ]
            )
            for row in rows
        )


#: Nothing was measured.
NOTHING = Report(())


def tell(report: Report, told: Mapping[str, Any], writing: Writing) -> None:
    """The worst layers for people on stderr, everything as JSON on stdout."""
    if report.layers:
        click.echo(report.table(), err=True)
    if writing.dry_run:
        click.echo(f"nothing written (--dry-run): {writing.output_dir}", err=True)
    click.echo(json.dumps(told, indent=2))


def measured(layers: Iterable[LayerFidelity]) -> Report:
    """The report of layers that all have figures."""
    return Report(tuple(sorted(layers, key=_error, reverse=True)))


def compared(plan: Plan, truth: Plan, on_progress: Progress | None = None) -> Report:
    """Every layer that is quantized in one of two plans: the written one, and what it was made from."""
    ours, theirs = _weights(plan), _weights(truth)
    originals = {layer.path: layer for layer in truth.layers}
    paths = {layer.path for layer in (*plan.quantized, *truth.quantized)}
    layers = [layer for layer in plan.layers if layer.path in paths]
    total = sum(_size(layer) for layer in layers)
    done = 0
    found = []
    for layer in layers:
        found.append(_layer(layer, ours, originals[layer.path], theirs))
        done += _size(layer)
        if on_progress is not None:
            on_progress(done, total, layer.path)
    return measured(found)


def row_spans(shape_NK: tuple[int, int], elements: int | None = None) -> Iterator[Span]:
    """All rows, in spans of about `elements` weights; `ELEMENTS` where none are named."""
    n, k = shape_NK
    step = max(1, (elements or ELEMENTS) // max(1, k))
    return (Span(start, stop) for start, stop in pairwise([*range(0, n, step), n]))


def _layer(
    ours: LayerPlan, weights: Weights, truth: LayerPlan, originals: Weights
) -> LayerFidelity:
    running = Running()
    for rows in row_spans(ours.shape_NK):
        reference, _ = dense(_rows_of(truth, rows), originals)
        decoded, _ = dense(_rows_of(ours, rows), weights)
        running.add(reference, decoded)
    names = dict.fromkeys((*truth.encodings, *ours.encodings))
    encoding = "+".join(name for name in names if name != DENSE.name)
    return LayerFidelity(path=ours.path, encoding=encoding, fidelity=running.figures())


def _rows_of(layer: LayerPlan, rows: Span) -> LayerPlan:
    """The layer as if it had those rows only, and no bias."""
    cut = (_piece_of(piece, rows) for piece in layer.pieces)
    pieces = tuple(piece for piece in cut if piece is not None)
    return replace(layer, shape_NK=(len(rows), layer.shape_NK[1]), pieces=pieces)


def _piece_of(piece: Piece, rows: Span) -> Piece | None:
    start, stop = max(piece.out.start, rows.start), min(piece.out.stop, rows.stop)
    if start >= stop:
        return None
    own = Span(start - piece.out.start, stop - piece.out.start)
    return replace(
        piece,
        out=Span(start - rows.start, stop - rows.start),
        take=tuple(_taken(piece.take or (Span(0, piece.stored_NK[0]),), own)),
        parts=tuple(part for part in piece.parts if part.role not in BIASES),
        bias_offsets=(),
    )


def _taken(take: Sequence[Span], own: Span) -> Iterator[Span]:
    """Rows `own` of what `take` takes."""
    before = 0
    for span in take:
        numbers = range(span.start, span.stop, span.step)
        kept = numbers[max(0, own.start - before) : max(0, own.stop - before)]
        if kept:
            yield Span(kept.start, kept.stop, kept.step)
        before += len(numbers)


def _weights(plan: Plan) -> Weights:
    return Passing([Path(file.path) for file in plan.files])


def _size(layer: LayerPlan) -> int:
    """Bytes of its weight in 16 bits."""
    return 2 * layer.shape_NK[0] * layer.shape_NK[1]


def _error(layer: LayerFidelity) -> float:
    assert layer.fidelity is not None, "every layer here was measured"
    return layer.fidelity.relative_error


def _figures(layer: LayerFidelity) -> dict[str, Any]:
    told = layer.to_json()
    return {
        "path": told["path"],
        "encoding": told["encoding"],
        "relative_error": _short(told["relative_error"]),
        "sqnr_db": _short(told["sqnr_db"]),
    }


def _short(value: float | None) -> float | None:
    """Five significant digits."""
    return None if value is None else float(f"{value:.5g}")
