"""Options that several commands share, and the flags they become. Names are fields of the flags."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from diffquant import ranks
from diffquant.cli._arguments import Prepared
from diffquant.errors import UsageError
from diffquant.kernels import KERNELS
from diffquant.loading import DTYPES, RunFlags
from diffquant.online import SCOPES
from diffquant.residence import MODES
from diffquant.resolve import ModelFlags

Command = TypeVar("Command", bound=Callable[..., Any])
Flags = TypeVar("Flags", ModelFlags, RunFlags)

SOURCE = "DIR, ORG/REPO or ORG/REPO@REVISION"


def _patterns(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in value.split(",") if word.strip()) if value else ()


def _existing(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Files that are there, before seconds are spent on loading; None where none was named."""
    for path in (value,) if isinstance(value, str) else value or ():
        if not Path(path).is_file():
            raise UsageError(f"{param.opts[0]} {path!r}: there is no such file")
    return value or None


def _at_least_one(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise UsageError(f"{param.opts[0]} {value} is too small", hint=f"{param.opts[0]} 1")
    return value


def _known_kernel(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        KERNELS.load(value)
    return value


def _number(name: str, unit: str, help: str) -> Callable[[Any], Any]:
    return click.option(name, type=int, metavar=unit, callback=_at_least_one, help=help)


MODEL = (
    click.option("--model-path", metavar="SOURCE", help=f"Base pipeline: {SOURCE}. [bundled]"),
    click.option(
        "--transformer-path", metavar="SOURCE", help="Transformer with a config.json of its own."
    ),
    click.option(
        "--transformer-weights-path",
        metavar="SOURCE",
        help="Weights only, a file or a folder; the config stays the base's.",
    ),
    click.option("--model-id", metavar="NAME", help="What the base is known as: FLUX.1-dev."),
    click.option("--revision", metavar="REVISION", help="Of the base, on the hub."),
    click.option("--local-files-only", is_flag=True, help="Never ask the hub."),
    click.option(
        "--quantization", metavar="NAME", help="Quantize dense weights while loading: fp8, int8 …"
    ),
    click.option(
        "--quantization-ignored-layers",
        metavar="PATTERNS",
        callback=_patterns,
        help="Layers to leave as they are: attn.to_,proj_out.",
    ),
    click.option(
        "--quantization-scope", type=click.Choice(SCOPES), help="Which layers to quantize. [all]"
    ),
    click.option(
        "--quantization-preset",
        metavar="NAME",
        help="Which layers stay: a preset's name or TOML file. [the family's]",
    ),
    click.option(
        "--quantize-all", is_flag=True, help="Quantize layers too that are known to be sensitive."
    ),
    click.option(
        "--requantize", is_flag=True, help="Quantize what is quantized already, a second time."
    ),
    click.option("--enable-svdquant", is_flag=True, help="The weights are SVDQuant (Nunchaku)."),
    click.option(
        "--quantization-precision",
        type=click.Choice(["int4", "nvfp4"]),
        help="Of SVDQuant weights whose name does not tell.",
    ),
    click.option("--quantization-rank", type=int, metavar="RANK", help="Of SVDQuant weights."),
    click.option(
        "--nvfp4-nibbles", type=click.Choice(["low", "high"]), help="Which half byte comes first."
    ),
    click.option(
        "--scale-layout", type=click.Choice(["linear", "tiles"]), help="Order of block scales."
    ),
    click.option("--raw-fp8", is_flag=True, help="Accept float8 weights without any scale."),
)
RUN = (
    click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps … [the best here]"),
    click.option("--dtype", type=click.Choice(list(DTYPES)), help="To compute in. [bfloat16]"),
    click.option(
        "--numerics",
        type=click.Choice(["auto", "faithful", "weight-only"]),
        help="Quantize activations where hardware can, as the file asks, or never. [auto]",
    ),
    click.option(
        "--kernel",
        metavar="NAME",
        callback=_known_kernel,
        help="Run encoded layers through this kernel only: see `diffquant formats`.",
    ),
    click.option("--strict", is_flag=True, help="Fail where no native kernel runs."),
    click.option(
        "--lora",
        metavar="SOURCE[:SCALE]",
        multiple=True,
        help="Load a LoRA; repeatable. transformer_2=SOURCE is for the second of two.",
    ),
    click.option(
        "--offload",
        type=click.Choice(MODES),
        help="Where weights wait: nowhere, in host memory (model, layerwise), on disk. [none]",
    ),
    click.option(
        "--offload-prefetch",
        type=int,
        metavar="BLOCKS",
        help="On their way while one works, layerwise or from disk. [1]",
    ),
    click.option(
        "--resident-layers",
        type=int,
        metavar="BLOCKS",
        help="Of a transformer that stay, layerwise or from disk. [0]",
    ),
    click.option("--compile", is_flag=True, help="Compile the repeated blocks with torch.compile."),
    click.option(
        "--memory-budget",
        metavar="SIZE",
        help="On a CPU, keep weights decoded that gain by it, up to 8GiB, say. [none]",
    ),
    click.option(
        "--ulysses-degree",
        type=int,
        metavar="PROCESSES",
        help="Draw one picture on as many devices; torchrun starts `generate` that often. [1]",
    ),
)
PICTURE = (
    click.option("--prompt", metavar="TEXT", help="What to draw."),
    click.option("--negative-prompt", metavar="TEXT", help="What not to draw."),
    _number("--width", "PIXELS", "Of the picture. [the model's own]"),
    _number("--height", "PIXELS", "Of the picture. [the model's own]"),
    _number("--num-inference-steps", "STEPS", "Of denoising. [the model's own]"),
    click.option("--guidance-scale", type=float, metavar="SCALE", help="How closely to follow."),
    click.option(
        "--true-cfg-scale", type=float, metavar="SCALE", help="Above 1: with the negative prompt."
    ),
    click.option("--seed", type=int, metavar="SEED", help="Of the first picture. [42]"),
    _number("--num-images-per-prompt", "COUNT", "Image i is drawn with seed + i. [1]"),
    click.option(
        "--image",
        multiple=True,
        metavar="FILE",
        callback=_existing,
        help="To edit or to start from; repeatable.",
    ),
    click.option(
        "--mask-image", metavar="FILE", callback=_existing, help="White where to paint over."
    ),
    _number("--num-frames", "FRAMES", "Of the video. [the model's own]"),
    _number("--fps", "FRAMES", "Shown per second. [the model's own, or 16]"),
    click.option(
        "--guidance-scale-2", type=float, metavar="SCALE", help="Of the second of two experts."
    ),
    _number("--max-sequence-length", "TOKENS", "Of the prompt. [the model's own]"),
)
SAVE = (
    click.option(
        "--save-quantized",
        metavar="DIR",
        help="Write what is quantized while loading, for --transformer-path.",
    ),
)
SETTINGS = (
    # Read before click parses, see _arguments; declared here for --help.
    click.option("--config", metavar="FILE", help="Options from JSON or TOML; typed ones win."),
    click.option("--config-from-metadata", metavar="FILE", help="Draw a saved picture again."),
)
JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout.")


def options(*groups: tuple[Callable[[Any], Any], ...]) -> Callable[[Command], Command]:
    """All options of the groups, in order."""

    def decorate(command: Command) -> Command:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return decorate


def model_flags(values: Mapping[str, Any], prepared: Prepared) -> ModelFlags:
    components: dict[str, Any] = {key: dict(named) for key, named in prepared.components.items()}
    lists = "component_quantization_ignored_layers"
    if lists in components:
        components[lists] = {
            name: tuple(text.split(",")) for name, text in components[lists].items()
        }
    return ModelFlags(**given(ModelFlags, values), **components)


def run_flags(values: Mapping[str, Any], prepared: Prepared) -> RunFlags:
    return RunFlags(**given(RunFlags, values), pinned=pinned(prepared.record))


def require_one_process(run: RunFlags, command: str) -> None:
    """Raises UsageError for a command that lets no others draw with it."""
    if run.processes > 1:
        raise UsageError(
            f"{ranks.FLAG} {run.processes}: {command} draws every picture in one process",
            hint=f"leave {ranks.FLAG} out; diffquant generate has it",
        )


def pinned(record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The kernel of every layer of the picture that is to be drawn again."""
    components = record.get("report", {}).get("components", {})
    return {name: dict(component["kernels"]) for name, component in components.items()}


def given(flags: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the fields of `flags` that were given."""
    names = {item.name for item in fields(flags)}
    return {name: value for name, value in values.items() if name in names and value is not None}
