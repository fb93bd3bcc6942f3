"""`diffquant inspect`: what a checkpoint is and whether it is whole, from headers alone."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from diffquant import loading
from diffquant.cli import _layers, _options, _talk
from diffquant.formats import Hints
from diffquant.plan import LayerPlan

if TYPE_CHECKING:
    from diffquant.adapters import Reach
    from diffquant.fidelity import LayerFidelity

PROBLEMS_TOLD = 20
#: Of a comparison with the base: outliers are all told, and at least this many layers.
WORST_TOLD = 10
FACTOR = 3.0
HEADINGS = ("layer", "N x K", "weight", "activation", "why")
FIDELITY = ("layer", "weight", "error", "SQNR", "largest", "x median", "suspicion")


@click.command(short_help="Say what a checkpoint is, from its headers.")
@click.argument("source")
@click.option("--subfolder", metavar="NAME", help="Where the component lies inside the source.")
@click.option("--revision", metavar="REVISION", help="On the hub.")
@click.option("--local-files-only", is_flag=True, help="Never ask the hub.")
@click.option(
    "--nvfp4-nibbles", type=click.Choice(["low", "high"]), help="Which half byte comes first."
)
@click.option(
    "--scale-layout", type=click.Choice(["linear", "tiles"]), help="Order of block scales."
)
@click.option("--raw-fp8", is_flag=True, help="Accept float8 weights without any scale.")
@click.option("--deep", is_flag=True, help="Read the weights too: finite values, sane scales.")
@click.option("--base", metavar="SOURCE", help="The model it was quantized from: compare weights.")
@click.option(
    "--outlier-factor",
    default=FACTOR,
    show_default=True,
    help="With --base: a layer's error over the median of its encoding that fails.",
)
@click.option("--lora", metavar="FILE", help="What this LoRA would reach in SOURCE: a dry run.")
@_options.JSON
def COMMAND(
    source: str,
    subfolder: str | None,
    revision: str | None,
    local_files_only: bool,
    nvfp4_nibbles: str | None,
    scale_layout: str | None,
    raw_fp8: bool,
    deep: bool,
    base: str | None,
    outlier_factor: float,
    lora: str | None,
    as_json: bool,
) -> int:
    """Say what SOURCE is: format and the evidence for it, family, layers, and whether it is whole.

    SOURCE is a file, a folder or a repository of one component. Weights are not read, except with
    --deep and --base. The exit code is 1 when the audit fails, or when a layer is far from the base,
    or when a LoRA reaches nothing or layers of another shape.
    """
    if lora is not None:
        where = {"subfolder": subfolder, "revision": revision, "local_files_only": local_files_only}
        return _tell_reach(loading.inspect_lora(lora, source, **where), lora, as_json)
    hints = Hints(nibbles=nvfp4_nibbles, scales=scale_layout, raw_fp8=raw_fp8)  # type: ignore[arg-type]
    with _comparing(base) as on_layer:
        inspection = loading.inspect(
            source,
            deep=deep,
            base=base,
            hints=hints,
            on_layer=on_layer,
            subfolder=subfolder,
            revision=revision,
            local_files_only=local_files_only,
        )
    layers = inspection.fidelity or ()
    outliers = [layer for layer in layers if layer.is_outlier(outlier_factor)]
    if as_json:
        click.echo(json.dumps(inspection.to_json(), indent=2))
    else:
        click.echo("\n\n".join([_told(inspection), *_compared(layers, outliers)]))
    return 0 if inspection.ok and not outliers else 1


def _tell_reach(reach: "Reach", lora: str, as_json: bool) -> int:
    if as_json:
        click.echo(json.dumps(reach.to_json(), indent=2))
        return 0 if reach.ok else 1
    facts = [
        ("lora", f"{lora} ({reach.spelling} names)"),
        ("rank", ", ".join(map(str, reach.ranks)) or "none"),
        ("matched", f"{_talk.count(len(reach.matched), 'module')}"),
        ("touches", f"{_talk.count(reach.layers, 'layer')}, {reach.encoded} of them encoded"),
        ("not matched", _first_of(reach.unmatched)),
        *(("misfit", text) for text in reach.misfits[:PROBLEMS_TOLD]),
        *([("beside", f"text encoders: {_first_of(reach.beside)}")] if reach.beside else []),
        ("verdict", "fits" if reach.ok else "is for another model"),
    ]
    click.echo(_talk.facts(facts))
    return 0 if reach.ok else 1


def _first_of(names: Sequence[str]) -> str:
    return f"{len(names)}, first {names[0]}" if names else "0"


@contextmanager
def _comparing(base: str | None) -> Iterator[Callable[[int, int], None] | None]:
    """A bar over layers, where layers will be compared."""
    if base is None:
        yield None
        return
    with _talk.progress() as bars:
        task = bars.add_task("comparing", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _compared(layers: "Sequence[LayerFidelity]", outliers: "Sequence[LayerFidelity]") -> list[str]:
    """Layers against the base: outliers, suspected ones, the worst of the rest; and how many."""
    if not layers:
        return []
    suspected = [layer for layer in layers if layer.suspicion and layer not in outliers]
    told = [*outliers, *suspected]
    rest = [layer for layer in layers if layer not in told]
    rows = map(_fidelity, [*told, *rest[: max(0, WORST_TOLD - len(told))]])
    verdict = f"{_talk.count(len(outliers), 'outlier')} of {_talk.count(len(layers), 'layer')}"
    others = f", {len(suspected)} more to look at" if suspected else ""
    return [_talk.table([FIDELITY, *rows]), _talk.facts([("base", verdict + others)])]


def _fidelity(layer: "LayerFidelity") -> tuple[str, ...]:
    figures, suspicion = layer.fidelity, layer.suspicion or ""
    if figures is None:
        return layer.path, layer.encoding, "", "", "", "", suspicion
    return (
        layer.path,
        layer.encoding,
        f"{figures.relative_error:.4f}",
        f"{figures.sqnr_db:.1f} dB",
        f"{figures.max_error:.3g}",
        f"{layer.factor:.2f}",
        suspicion,
    )


def _told(inspection: loading.Inspection) -> str:
    plan = inspection.plan
    size = sum(file.size for file in plan.files)
    facts = [
        ("source", inspection.checkpoint.origin),
        ("format", plan.format),
        *(("evidence", sentence) for sentence in plan.evidence),
        ("family", f"{plan.family} ({plan.config.get('_class_name', 'class unknown')})"),
        ("size", f"{_talk.size(size)} in {_talk.count(len(plan.files), 'file')}"),
        ("layers", _tally(plan.layers)),
        *(("note", note) for note in plan.notes),
        *(("open", f"{question.topic}: {question.why}") for question in plan.open),
        ("audit", _verdict(inspection)),
    ]
    parts = [_talk.facts(facts)]
    if plan.layers:
        parts.append(_talk.table([HEADINGS, *_layers.grouped(map(_row, plan.layers))]))
    if inspection.problems:
        told = inspection.problems[:PROBLEMS_TOLD]
        parts.append(_talk.table((problem.tensor, problem.what) for problem in told))
    return "\n\n".join(parts)


def _row(layer: LayerPlan) -> _layers.Row:
    stored = " + ".join(dict.fromkeys(str(piece.encoding) for piece in layer.pieces))
    asked = dict.fromkeys(
        "-" if piece.activation is None else str(piece.activation) for piece in layer.pieces
    )
    n, k = layer.shape_NK
    return layer.path, (f"{n}x{k}", stored, " + ".join(asked), layer.why)


def _tally(layers: tuple[LayerPlan, ...]) -> str:
    counted = Counter("+".join(layer.encodings) for layer in layers)
    told = ", ".join(f"{count} {name}" for name, count in counted.items())
    return f"{_talk.count(len(layers), 'linear')}: {told}" if layers else "no linears"


def _verdict(inspection: loading.Inspection) -> str:
    if inspection.ok:
        return "whole: every tensor has an owner, every weight its scales"
    return _talk.count(len(inspection.problems), "problem")
