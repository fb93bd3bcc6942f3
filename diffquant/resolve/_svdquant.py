"""Rule 7: what a file's name or the flags promise about SVDQuant, for the tensors to confirm."""

import re
from dataclasses import replace
from pathlib import Path

from diffquant import headers, planner
from diffquant.errors import FormatError, UsageError
from diffquant.formats import Hints
from diffquant.resolve._flags import ModelFlags
from diffquant.resolve._overrides import Override
from diffquant.resolve._rules import PLAIN_FORMAT, Log
from diffquant.sources import Checkpoint

#: What a name says, by our word for it: fp4 in a name is nvfp4 everywhere else.
PRECISIONS = {"int4": "int4", "fp4": "nvfp4"}
SVDQUANT_NAME = re.compile(r"svdq-(?P<precision>int4|fp4)_r(?P<rank>\d+)")


def rule_7_svdquant(
    name: str, override: Override | None, weights: Checkpoint, flags: ModelFlags, log: Log
) -> Hints:
    """What a name or the flags promise about SVDQuant is handed to the format to be confirmed."""
    hints = Hints(
        nibbles=flags.nvfp4_nibbles,  # type: ignore[arg-type]  # the command line checks the choice
        scales=flags.scale_layout,  # type: ignore[arg-type]
        raw_fp8=flags.raw_fp8,
    )
    named = _promised_by_name(override, weights)
    precision, rank = flags.quantization_precision, flags.quantization_rank
    if override is None and named is None and not flags.enable_svdquant:
        return hints
    if named is not None:
        said = f"{named[0]} of rank {named[1]}"
        if precision not in (None, named[0]) or rank not in (None, named[1]):
            raise UsageError(
                f"the name {weights.origin!r} promises SVDQuant {said}, the flags say "
                f"{precision or named[0]} of rank {rank or named[1]}",
                hint="leave out --quantization-precision and --quantization-rank",
            )
        log.fire("7", name=Path(weights.origin).name, precision=named[0], rank=named[1])
        precision, rank = named
    elif flags.enable_svdquant or precision or rank:
        log.fire("7b", precision=precision or "of any kind", rank=rank or "that is stored")
    else:
        return hints
    _require_quantized(name, weights)
    return replace(hints, svdquant=True, precision=precision, rank=rank)  # type: ignore[arg-type]


def _promised_by_name(override: Override | None, weights: Checkpoint) -> tuple[str, int] | None:
    typed = (override.weights or override.path or "") if override else ""
    for text in (typed, *(path.name for path in weights.files)):
        if found := SVDQUANT_NAME.search(text):
            return PRECISIONS[found["precision"]], int(found["rank"])
    return None


def _require_quantized(name: str, weights: Checkpoint) -> None:
    found, evidence = planner.identify(weights, headers.read(weights.files))
    if found == PLAIN_FORMAT:
        raise FormatError(
            f"SVDQuant was promised for {name!r}, and {weights.origin!r} is not quantized: {evidence}",
            hint="leave out --enable-svdquant and its companions, or name the quantized file",
        )
