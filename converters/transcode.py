"""One dialect -> another of the same encoding: names, order and marks change, no number does.

    modelopt, fp8, diffusers   a component folder: config.json and weights, sharded where they are many
    comfy, nunchaku, bfl       one .safetensors file

Codes and scales are moved, never computed again: what cannot be said without quantizing twice is
refused with the layer and the reason. Before the first byte is written the other dialect's own reader
has read the header that will be; what it understands differently (how inputs are quantized) is
said, and everything else is proved the same. At most one tensor is in memory at a time.
"""

from dataclasses import dataclass
from pathlib import Path

import click

from diffquant import exporting
from diffquant.converters._command import ConverterCommand
from diffquant.converters._contract import Judge, settled, stamped
from diffquant.converters._options import Reading, Writing, reading_options, writing_argument
from diffquant.converters._progress import Bar, bar, told
from diffquant.converters._report import NOTHING, Report
from diffquant.errors import ConvertError
from diffquant.exporting import Prepared
from diffquant.plan import Plan
from diffquant.writing import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcoded:
    """The plan that was read, what was or would be written, and where; no files in a dry run."""

    plan: Plan
    prepared: Prepared
    files: tuple[Path, ...] = ()
    report: Report = NOTHING

    @property
    def verdict(self) -> str:
        """`lossless`, or what is lost."""
        return "; ".join(self.prepared.losses) or "lossless"


def transcode(
    source: str,
    output: Path,
    *,
    to: str,
    reading: Reading = Reading(),  # noqa: B008 - frozen
    dry_run: bool = False,
    max_shard_size: int = 10 * GIB,
    max_error: float | None = None,
    report: Path | None = None,
    no_check: bool = False,
    overwrite: bool = False,
    bars: Bar | None = None,
) -> Transcoded:
    """Write the component that `source` stores as a file of the dialect `to`.

    dry_run    everything but the writing
    max_error  relative error that no layer may have; 0 is what is expected
    report     a file for the figures of all layers
    no_check   do not decode what was written

    Raises FormatError for what the dialect cannot say, PlanError when source and model do not fit,
    ConvertError when nothing is quantized or the output is in the way.
    """
    plan = settled(source, reading)
    if not plan.quantized and to != "diffusers":
        raise ConvertError(
            f"nothing in {source!r} is quantized", hint="--to diffusers writes plain weights"
        )
    prepared = exporting.prepare(plan, to)
    if dry_run:
        return Transcoded(plan=plan, prepared=prepared)
    judge = Judge(
        plan,
        prepared.export.config,
        max_error=max_error,
        saved_to=report,
        on_progress=told(bars, "checking"),
    )
    files = exporting.save(
        prepared,
        output,
        origin=stamped(plan),
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        check=None if no_check else judge,
        on_progress=told(bars, "writing"),
    )
    return Transcoded(plan=plan, prepared=prepared, files=files, report=judge.report)


# the command -----------------------------------------------------------------------------------------


@click.command(cls=ConverterCommand, short_help="Another dialect; no number changes.")
@click.argument("source")
@writing_argument
@click.option("--to", required=True, type=click.Choice(exporting.writable()), help="The dialect.")
@reading_options
def main(source: str, writing: Writing, to: str, reading: Reading) -> None:
    """Rewrite quantized weights for another tool, without quantizing them again.

    SOURCE is a file, a folder or a repository of any format that `diffquant inspect` knows. OUTPUT is
    a folder (modelopt, fp8, diffusers) or a .safetensors file (comfy, nunchaku, bfl).
    """
    with bar() as bars:
        done = transcode(
            source,
            writing.output_dir,
            to=to,
            reading=reading,
            dry_run=writing.dry_run,
            max_shard_size=writing.shard_bytes,
            max_error=writing.max_error,
            report=writing.report,
            no_check=writing.no_check,
            overwrite=writing.overwrite,
            bars=bars,
        )
    plan, prepared = done.plan, done.prepared
    click.echo(
        f"{len(plan.quantized)} of {len(plan.layers)} quantized linears, {plan.format} to {to}: "
        f"{done.verdict}"
    )
    size = f"{len(prepared.tensors)} tensors, {prepared.total_size / 1e6:.1f} MB"
    place = "nothing written (--dry-run)" if writing.dry_run else writing.output_dir
    click.echo(f"{size}: {place}{done.report.sentence}")


if __name__ == "__main__":
    main()
