"""Plan -> a file of some dialect, bit for bit what the plan holds: nothing is quantized again.

A writer names the tensors (`formats.Export`); here their bytes are made: canonical parts, stacked as
the dialect fuses them, in its physical order. Before the first byte is written the header that the
file will have is read by the dialect's own reader. Its plan must be the one that came in, so a file
that would be read differently is refused; and it tells the order of rows, which no writer repeats.

Letters: N output features, K input features. `pad` grows both where the dialect asks for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffquant.errors import ConvertError, FormatError
from diffquant.exporting._parts import Parts, Shapes
from diffquant.exporting._proof import losses_of, read_back, require_one
from diffquant.exporting._stored import declared, sketches_of
from diffquant.formats import FORMATS, Export
from diffquant.plan import DENSE, Plan
from diffquant.tensors import Passing
from diffquant.writing import GIB, Check, Declared, Progress, write, write_file

__all__ = ["Prepared", "prepare", "save", "writable"]

LARGEST_SHARD = 10 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Everything about a file but its bytes.

    plan    what the dialect's own reader will make of it
    losses  what the dialect cannot say; empty: lossless
    """

    format: str
    export: Export
    tensors: tuple[Declared, ...]
    plan: Plan
    losses: tuple[str, ...]

    @property
    def total_size(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def is_folder(self) -> bool:
        return self.export.config is not None


def writable() -> tuple[str, ...]:
    """Dialects that have a way out."""
    return tuple(name for name, known in FORMATS.load_all().items() if known.write is not None)


def prepare(plan: Plan, format_name: str, *, export: Export | None = None) -> Prepared:
    """The file of a dialect that holds a settled plan; pieces with a recode are written as encoded.

    export  what the dialect's writer says, unless it is given

    Raises FormatError for what the dialect cannot say, with the layer and the reason.
    """
    if plan.open:
        raise FormatError(f"{plan.open[0].topic} is open: {plan.open[0].why}")
    export = export or _export(plan, format_name)
    weights = Passing([Path(file.path) for file in plan.files])
    shapes = Parts(plan, Shapes(weights))
    sketches = tuple(sketches_of(plan, export, shapes))
    read = read_back(plan, format_name, export, sketches)
    losses = tuple(losses_of(plan, export, read))
    parts = Parts(plan, weights)
    for layer in export.layers:
        require_one(layer, parts)
    return Prepared(
        format=format_name,
        export=export,
        tensors=tuple(declared(plan, export, parts, read, sketches)),
        plan=read,
        losses=losses,
    )


def save(
    prepared: Prepared,
    output: Path,
    *,
    origin: str = "",
    max_shard_size: int = LARGEST_SHARD,
    overwrite: bool = False,
    check: Check | None = None,
    on_progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Write what was prepared: a component folder, or one file where the dialect is one.

    check  called with the files before they get their names; what it raises removes them

    Raises ConvertError when the output is in the way or of the wrong kind, and for the size of shards
    where there are none.
    """
    export = prepared.export
    if export.config is None:
        if output.suffix != ".safetensors":
            raise ConvertError(
                f"{prepared.format} is one file, {str(output)!r} names a folder",
                hint=f"{output / 'transformer.safetensors'}",
            )
        if max_shard_size != LARGEST_SHARD:
            raise ConvertError(
                f"{prepared.format} is one file, --max-shard-size would divide it",
                hint="leave --max-shard-size out",
            )
        metadata = {"format": "pt", **export.metadata}
        path = write_file(
            output,
            prepared.tensors,
            origin=origin,
            metadata=metadata,
            overwrite=overwrite,
            check=check,
            on_progress=on_progress,
        )
        return (path,)
    done = write(
        output,
        prepared.tensors,
        origin=origin,
        config=export.config,
        metadata=export.metadata,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        check=check,
        on_progress=on_progress,
    )
    return done.shards


def _export(plan: Plan, format_name: str) -> Export:
    format = FORMATS.load(format_name)
    if format.write is None:
        raise FormatError(
            f"nothing writes {format_name} files", hint=f"one of: {', '.join(writable())}"
        )
    _require_encodings(plan, format_name, format.encodings)
    return format.write(plan)


def _require_encodings(plan: Plan, format_name: str, held: Sequence[str]) -> None:
    """Said before anything is said of layouts: another dialect changes no number."""
    for layer in plan.quantized:
        for name in layer.encodings:
            if name not in (*held, DENSE.name):
                raise FormatError(
                    f"{format_name} files hold {' and '.join(held)}, and {layer.path!r} is {name}",
                    hint="diffquant convert dequantize SOURCE OUT, then a build command makes it anew",
                )
