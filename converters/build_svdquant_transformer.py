"""Build a Nunchaku SVDQuant transformer from plain weights: one file that Nunchaku's readers take.

    --precision   weights and inputs                          behind GELU
    int4          int4 in groups of 64                        inputs shifted by 0.171875, unsigned
    nvfp4         e2m1 in groups of 16, an outer scale        as everywhere

Every quantized layer is codes beside a low-rank branch of 16 bits; q, k and v are one weight,
modulation layers are 4-bit weight-only, and what published files keep dense stays dense. Branch and
codes are taken in turn, each from what the other leaves.

With --calibrate, rows of what each layer reads are kept while prompts are drawn: smoothing is chosen
by them, what is lost counts by the size of the inputs, and biases make up for what the average input
loses. Without it only the weights are looked at, and nothing is smoothed.

The file is called svdq-{int4|fp4}_r{rank}-NAME.safetensors where --output-dir names a folder.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import click

from diffquant.converters import _svdquant_samples as samples
from diffquant.converters._command import ConverterCommand
from diffquant.converters._contract import Converted, convert, plain, quantized, tell
from diffquant.converters._options import Choosing, Writing, choosing_options, writing_options
from diffquant.converters.calibrate import prompts_of
from diffquant.errors import UsageError
from diffquant.families import FAMILIES
from diffquant.plan import LayerPlan, Plan
from diffquant.resolve import SVDQUANT_NAME

DIALECT = "nunchaku"
#: Value of --precision -> scheme, and the word for it in names of files.
PRECISIONS = {"int4": ("svdq_int4", "int4"), "nvfp4": ("svdq_nvfp4", "fp4")}
#: The kernels multiply branches in steps of 16, up to 1024.
RANKS = range(16, 1025, 16)
#: Rounds of refinement; twice as many lose 2 % less.
ROUNDS = 8
COMPONENTS = ("transformer",)


def build(
    writing: Writing,
    *,
    from_bf16: str,
    precision: Literal["int4", "nvfp4"] = "int4",
    rank: int = 32,
    rounds: int = ROUNDS,
    name: str | None = None,
    calibrate: Path | None = None,
    calibration: Path | None = None,
    save_calibration: Path | None = None,
    choosing: Choosing = Choosing(),  # noqa: B008 - frozen
) -> Converted:
    """Write the transformer that `from_bf16` names as one Nunchaku file.

    rounds       of taking branch and codes from what the other leaves; 1 is a plain SVD
    name         the last part of the file's name, where `writing.output_dir` is a folder
    calibrate    a file of prompts to draw, one a line; or
    calibration  samples that `save_calibration` kept in a former run

    Raises UsageError for a rank the kernels do not have, for options that contradict each other and
    for a name that promises something else; what `_contract.plain`, `quantized`, `convert` raise.
    """
    _require_consistent(rank, calibrate, calibration, save_calibration)
    scheme, word = PRECISIONS[precision]
    output = _output(writing.output_dir, f"svdq-{word}_r{rank}", name or _model(from_bf16))
    truth = plain(from_bf16)
    _require_naming(truth)
    plan = _with_branch(quantized(truth, scheme, choosing), rank, rounds)
    with _samples(from_bf16, calibrate, calibration, save_calibration, writing) as known:
        plan = plan if known is None else samples.smoothed(plan, known)
        return convert(plan, truth, DIALECT, replace(writing, output_dir=output))


def _require_consistent(
    rank: int, calibrate: Path | None, calibration: Path | None, kept: Path | None
) -> None:
    if rank not in RANKS:
        raise UsageError(
            f"--rank {rank}: Nunchaku's kernels have multiples of 16 from 16 to 1024",
            hint="--rank 32",
        )
    if calibrate is not None and calibration is not None:
        raise UsageError(
            "--calibrate draws prompts and --calibration names a file of what they gave",
            hint="leave one of the two out",
        )
    if kept is not None and calibrate is None:
        raise UsageError("--save-calibration has nothing to save", hint="add --calibrate PROMPTS")


def _require_naming(plan: Plan) -> None:
    """Before prompts are drawn for hours: whether Nunchaku has names for this architecture at all."""
    if DIALECT not in FAMILIES.load(plan.family).namings:
        known = [name for name, each in FAMILIES.load_all().items() if DIALECT in each.namings]
        raise UsageError(
            f"Nunchaku has no names for a {plan.config.get('_class_name')} (family {plan.family})",
            hint=f"families it knows: {', '.join(known)}; `build_mx_transformer` takes any",
        )


def _output(typed: Path, prefix: str, model: str) -> Path:
    """The file: the one that was typed, unless its name promises something else, or one in a folder."""
    if typed.suffix != ".safetensors":
        return typed / f"{prefix}-{model}.safetensors"
    promised = SVDQUANT_NAME.search(typed.name)
    if promised is not None and promised.group() != prefix:
        raise UsageError(
            f"{typed.name!r} promises {promised.group()}, --precision and --rank make {prefix}",
            hint=f"--output-dir {typed.parent} finds a name of its own",
        )
    return typed


def _model(source: str) -> str:
    """What the model is called: its folder or repository, not the component inside it."""
    parts = [part for part in re.split(r"[/@:]", source.rstrip("/")) if part not in ("", ".", "..")]
    named = [part for part in parts if part not in COMPONENTS]
    return (named or parts or ["model"])[-1].lower().removesuffix(".safetensors")


def _with_branch(plan: Plan, rank: int, rounds: int) -> Plan:
    return replace(plan, layers=tuple(_branched(layer, rank, rounds) for layer in plan.layers))


def _branched(layer: LayerPlan, rank: int, rounds: int) -> LayerPlan:
    pieces = tuple(
        replace(piece, recode=replace(piece.recode, rank=rank, rounds=rounds))
        if piece.recode is not None and piece.recode.rank is not None
        else piece
        for piece in layer.pieces
    )
    return replace(layer, pieces=pieces)


@contextmanager
def _samples(
    source: str,
    prompts: Path | None,
    calibration: Path | None,
    kept: Path | None,
    writing: Writing,
) -> Iterator[Path | None]:
    """The file of samples; one that nobody wants to keep is gone afterwards."""
    if prompts is None or writing.dry_run:
        yield calibration
        return
    with tempfile.TemporaryDirectory(prefix="diffquant-") as folder:
        path = Path(folder) / "samples.safetensors" if kept is None else kept
        samples.save(samples.drawn(source, prompts_of(prompts)), path)
        yield path


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(cls=ConverterCommand, short_help="Nunchaku's SVDQuant file of plain BF16.")
@click.option("--from-bf16", required=True, metavar="SOURCE", help="Plain weights to quantize.")
@click.option("--precision", type=click.Choice(list(PRECISIONS)), default="int4", show_default=True)
@click.option("--rank", default=32, show_default=True, help="Of the low-rank branch: 32, 128 …")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=ROUNDS,
    show_default=True,
    help="Of refining branch and codes; 1 is a plain SVD.",
)
@click.option("--name", metavar="NAME", help="Last part of the file's name.")
@click.option(
    "--calibrate",
    type=FILE,
    metavar="PROMPTS",
    help="Choose smoothing by what layers read while drawing these prompts, one a line.",
)
@click.option("--calibration", type=FILE, metavar="FILE", help="What --save-calibration wrote.")
@click.option(
    "--save-calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep the samples that --calibrate took (.safetensors).",
)
@choosing_options
@writing_options
def main(
    from_bf16: str,
    precision: Literal["int4", "nvfp4"],
    rank: int,
    rounds: int,
    name: str | None,
    calibrate: Path | None,
    calibration: Path | None,
    save_calibration: Path | None,
    choosing: Choosing,
    writing: Writing,
) -> None:
    """Quantize plain weights to Nunchaku's SVDQuant: 4 bits beside a low-rank branch.

    Prints what was done as JSON, and the layers that lost most on stderr.
    """
    done = build(
        writing,
        from_bf16=from_bf16,
        precision=precision,
        rank=rank,
        rounds=rounds,
        name=name,
        calibrate=calibrate,
        calibration=calibration,
        save_calibration=save_calibration,
        choosing=choosing,
    )
    tell(done.report, done.to_json(), writing)


if __name__ == "__main__":
    main()
