"""What can be typed to every converter, each group of options as one value.

Each decorator gives a command one parameter: `writing_options` (`writing_argument` where the output is
no option, `writing_path` where it is called --output-path) `writing`, `choosing_options` `choosing`, `calibration_options` `calibration` and
`reading_options` `reading`. The command never sees the single options.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import click

from diffquant.converters.calibrate import METHODS, PERCENTILE
from diffquant.errors import UsageError
from diffquant.formats import Hints
from diffquant.writing import GIB

Command = Callable[..., Any]

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW = click.Path(path_type=Path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """Where the result goes, and what it must be to stay there.

    max_error  relative error that no layer may exceed; None: any
    report     a file for the figures of all layers
    no_check   do not decode what was written
    """

    output_dir: Path
    max_shard_size: float = 10.0
    max_error: float | None = None
    report: Path | None = None
    no_check: bool = False
    overwrite: bool = False
    dry_run: bool = False

    @property
    def shard_bytes(self) -> int:
        return int(self.max_shard_size * GIB)

    def __post_init__(self) -> None:
        if self.no_check and (self.max_error is not None or self.report is not None):
            raise UsageError(
                "--no-check decodes nothing that --max-error or --report could speak of",
                hint="leave --no-check out",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a source does not say about itself.

    base  the model it was quantized from: answers open questions, and describes weights that come
          without a config.json
    """

    base: str | None = None
    subfolder: str | None = None
    nvfp4_nibbles: Literal["low", "high"] | None = None
    scale_layout: Literal["linear", "tiles"] | None = None
    raw_fp8: bool = False

    @property
    def hints(self) -> Hints:
        return Hints(nibbles=self.nvfp4_nibbles, scales=self.scale_layout, raw_fp8=self.raw_fp8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choosing:
    """Which layers stay as they are.

    preset             auto: the family's own; none: no layer; else a preset's name or TOML file
    keep_bf16_pattern  regular expressions, searched in the names of layers
    """

    preset: str = "auto"
    keep_bf16_pattern: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Where the scales of inputs come from: prompts to draw, or the file of an earlier run."""

    calibrate: Path | None = None
    calibration: Path | None = None
    save_calibration: Path | None = None
    calibration_method: str = "max"
    percentile: float = PERCENTILE


def _grouped(
    name: str, kind: type, *options: Callable[[Command], Command]
) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        @wraps(command)
        def called(**typed: Any) -> Any:
            own = {each.name: typed.pop(each.name) for each in fields(kind)}
            return command(**typed, **{name: kind(**own)})

        decorated: Command = called
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


_WRITING = (
    click.option("--max-shard-size", metavar="GIB", type=float, default=10.0, show_default=True),
    click.option(
        "--max-error",
        metavar="X",
        type=float,
        help="Write nothing when a layer's relative error is larger.",
    ),
    click.option("--report", type=NEW, metavar="FILE", help="Figures of every layer, as JSON."),
    click.option("--no-check", is_flag=True, help="Do not decode what was written: no report."),
    click.option("--overwrite", is_flag=True, help="Replace the output."),
    click.option("--dry-run", is_flag=True, help="Say what would be written."),
)
_OUTPUT_DIR = click.option(
    "--output-dir",
    required=True,
    type=NEW,
    help="A folder, or the file of a dialect of single files.",
)
_OUTPUT = click.argument("output_dir", metavar="OUTPUT", type=NEW)

_OUTPUT_PATH = click.option("--output-path", "output_dir", required=True, type=NEW)

writing_options = _grouped("writing", Writing, _OUTPUT_DIR, *_WRITING)
writing_argument = _grouped("writing", Writing, _OUTPUT, *_WRITING)
writing_path = _grouped("writing", Writing, _OUTPUT_PATH, *_WRITING)

reading_options = _grouped(
    "reading",
    Reading,
    click.option("--base", metavar="SOURCE", help="The model it was quantized from."),
    click.option("--subfolder", metavar="NAME", help="Where the component lies inside SOURCE."),
    click.option("--nvfp4-nibbles", type=click.Choice(["low", "high"]), help="Which comes first."),
    click.option("--scale-layout", type=click.Choice(["linear", "tiles"]), help="Of block scales."),
    click.option("--raw-fp8", is_flag=True, help="Accept float8 weights without any scale."),
)

choosing_options = _grouped(
    "choosing",
    Choosing,
    click.option(
        "--preset",
        metavar="NAME",
        default="auto",
        show_default=True,
        help="Layers that stay: auto (what the family needs), none, a preset's name or TOML file.",
    ),
    click.option("--keep-bf16-pattern", multiple=True, metavar="REGEX", help="May be repeated."),
)

calibration_options = _grouped(
    "calibration",
    Calibration,
    click.option(
        "--calibrate",
        type=FILE,
        metavar="PROMPTS",
        help="Measure inputs while drawing these prompts, one a line.",
    ),
    click.option("--calibration", type=FILE, metavar="FILE", help="What --save-calibration wrote."),
    click.option(
        "--save-calibration", type=NEW, metavar="FILE", help="Keep what --calibrate measured."
    ),
    click.option(
        "--calibration-method", type=click.Choice(METHODS), default="max", show_default=True
    ),
    click.option("--percentile", default=PERCENTILE, show_default=True, help="For that method."),
)
