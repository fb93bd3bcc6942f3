"""`diffquant compare`: BF16 against quantized, with numbers, a verdict and an exit code."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffquant import aliases
from diffquant.cli import _options, _talk
from diffquant.cli._arguments import ModelCommand, Prepared
from diffquant.errors import UsageError

if TYPE_CHECKING:
    from diffquant.compare import Candidate, Comparison, Question
    from diffquant.compare.comparison import Mean

FAILED = 1
WORST = 5  # layers named in a table
#: Options of `generate` that mean something else here, or nothing.
NOT_HERE = frozenset({"prompt", "num_images_per_prompt"})
PICTURE = tuple(
    option
    for option in _options.PICTURE
    if not NOT_HERE & {_options.field_of(option)}
) if hasattr(_options, "field_of") else _options.PICTURE


def _pairs(ctx: click.Context, param: click.Parameter, value: Sequence[str]) -> dict[str, str]:
    """`C=P` words as a mapping; hyphens of component names are underscores."""
    found = {}
    for word in value:
        name, equals, text = word.partition("=")
        if not (name and equals and text):
            raise UsageError(f"{param.opts[0]} {word!r} is not of the form NAME=VALUE")
        found[name.replace("-", "_")] = text
    return found


def _thresholds(
    ctx: click.Context, param: click.Parameter, value: Sequence[str]
) -> dict[str, float]:
    try:
        return {name: float(text) for name, text in _pairs(ctx, param, value).items()}
    except ValueError as error:
        raise UsageError(f"{param.opts[0]}: {error}", hint="--threshold psnr=28") from error


def _seeds(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in (value or "").split(",") if word.strip())
    except ValueError:
        raise UsageError(f"--seeds {value!r} is no list of numbers", hint="--seeds 0,1,2") from None
