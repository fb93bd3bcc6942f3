"""One dialect -> another of the same encoding: names, order and marks change, no number does.

    modelopt, fp8, diffusers   a component folder: config.json and weights, sharded where they are many
    comfy, nunchaku, bfl       one .safetensors file

Codes and scales are moved, never computed again: what cannot be said without quantizing twice is
refused with the layer and the reason. Before the first byte is written the other dialect's own reader
has read the header that will be; what it understands differently (how inputs are quantized) is
said, and everything else is proved the same. At most one tensor is in memory at a time.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from diffquant import exporting, headers, planner, settle, sources
from diffquant.converters._command import ConverterCommand
from diffquant.errors import ConvertError
from diffquant.exporting import Prepared
from diffquant.formats import NO_HINTS, Hints
from diffquant.loading import described_by
from diffquant.plan import Plan
from diffquant.writing import GIB, Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcoded:
    """The plan that was read, what was or would be written, and where; no files in a dry run."""

    plan: Plan
    prepared: Prepared
    files: tuple[Path, ...]

    @property
    def verdict(self) -> str:
        """`lossless`, or what is lost."""
        return "; ".join(self.prepared.losses) or "lossless"


def transcode(
    source: str,
    output: Path,
    *,
    to: str,
    base: str | None = None,
    hints: Hints = NO_HINTS,
    subfolder: str | None = None,
    dry_run: bool = False,
    max_shard_size: int = 10 * GIB,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Transcoded:
    """Write the component that `source` stores as a file of the dialect `to`.

    base     the model it was quantized from: answers open questions, and describes weights that come
             without a config.json
    dry_run  everything but the writing

    Raises FormatError for what the dialect cannot say, PlanError when source and model do not fit,
    ConvertError when nothing is quantized or the output is in the way.
    """
    plan = _settled(source, base, hints, subfolder)
    if not plan.quantized and to != "diffusers":
        raise ConvertError(
            f"nothing in {source!r} is quantized", hint="--to diffusers writes plain weights"
        )
    prepared = exporting.prepare(plan, to)
    files: tuple[Path, ...] = ()
    if not dry_run:
        stamps = [[file.path, Path(file.path).stat().st_mtime_ns] for file in plan.files]
        files = exporting.save(
            prepared,
            output,
            origin=json.dumps([plan.digest, *stamps]),
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    return Transcoded(plan=plan, prepared=prepared, files=files)


def _settled(source: str, base: str | None, hints: Hints, subfolder: str | None) -> Plan:
    checkpoint = sources.checkpoint(source, subfolder=subfolder)
    original = None if base is None else sources.checkpoint(base)
    config = described_by(checkpoint, original)
    header = headers.read(checkpoint.files)
    plan = planner.plan(checkpoint, header, config=config, hints=hints)
    return settle.settle(plan, settle.of_checkpoint(original, config) if plan.open else None)


# the command -----------------------------------------------------------------------------------------


@click.command(cls=ConverterCommand)
@click.argument("source")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(exporting.writable()), help="The dialect.")
@click.option("--base", metavar="SOURCE", help="The model it was quantized from.")
@click.option("--subfolder", metavar="NAME", help="Where the component lies inside SOURCE.")
@click.option("--nvfp4-nibbles", type=click.Choice(["low", "high"]), help="Which comes first.")
@click.option("--scale-layout", type=click.Choice(["linear", "tiles"]), help="Of block scales.")
@click.option("--raw-fp8", is_flag=True, help="Accept float8 weights without any scale.")
@click.option("--max-shard-size", metavar="GIB", type=float, default=10.0, show_default=True)
@click.option(
    "--dry-run", is_flag=True, help="Say what would be written and whether it is lossless."
)
@click.option("--overwrite", is_flag=True, help="Replace the output.")
def main(
    source: str,
    output: Path,
    to: str,
    base: str | None,
    subfolder: str | None,
    nvfp4_nibbles: str | None,
    scale_layout: str | None,
    raw_fp8: bool,
    max_shard_size: float,
    dry_run: bool,
    overwrite: bool,
) -> None:
    """Rewrite quantized weights for another tool, without quantizing them again.

    SOURCE is a file, a folder or a repository of any format that `diffquant inspect` knows. OUTPUT is
    a folder (modelopt, fp8, diffusers) or a .safetensors file (comfy, nunchaku, bfl).
    """
    hints = Hints(nibbles=nvfp4_nibbles, scales=scale_layout, raw_fp8=raw_fp8)  # type: ignore[arg-type]
    with _bar() as on_progress:
        done = transcode(
            source,
            output,
            to=to,
            base=base,
            hints=hints,
            subfolder=subfolder,
            dry_run=dry_run,
            max_shard_size=int(max_shard_size * GIB),
            overwrite=overwrite,
            on_progress=on_progress,
        )
    plan, prepared = done.plan, done.prepared
    click.echo(
        f"{len(plan.quantized)} of {len(plan.layers)} quantized linears, {plan.format} to {to}: "
        f"{done.verdict}"
    )
    size = f"{len(prepared.tensors)} tensors, {prepared.total_size / 1e6:.1f} MB"
    click.echo(f"{size}: {'nothing written (--dry-run)' if dry_run else output}")


@contextmanager
def _bar() -> Iterator[Progress | None]:
    """A bar on stderr, where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    bar: Any
    with click.progressbar(length=1, label="writing", file=sys.stderr) as bar:

        def told(done: int, total: int, name: str) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        yield told


if __name__ == "__main__":
    main()
