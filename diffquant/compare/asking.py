"""From flags to the sides of a comparison: what is shared, what each side has of its own."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import PurePath
from typing import Any

from diffquant import loading
from diffquant.compare.sides import Side
from diffquant.errors import UsageError
from diffquant.loading import RunFlags
from diffquant.resolve import BUNDLED_PIPELINE, ModelFlags
from diffquant.run import Request

#: Fields of ModelFlags that say where the base is; all others speak of what was done to it.
OF_THE_BASE = ("model_path", "model_id", "revision", "local_files_only")
#: Fields of RunFlags that both sides share.
OF_BOTH = ("device", "dtype", "lora")
#: Options that are typed once for each value.
REPEATED = frozenset({"lora", "image"})
#: Values of flags that nobody typed; 0 is a seed.
UNTYPED: tuple[Any, ...] = (None, "", (), {})
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def sides(
    model: ModelFlags,
    run: RunFlags,
    *,
    reference: Mapping[str, Any],
    candidates: Sequence[Mapping[str, Any]],
) -> tuple[Side, tuple[Side, ...]]:
    """The reference and the candidates.

    model, run   what was typed for all candidates; the reference takes its base, device and dtype
    reference    fields of ModelFlags or RunFlags that the reference has of its own
    candidates   the same for each candidate; none at all means one that is as typed

    Raises UsageError for fields that do not exist, and for a side that resolution refuses.
    """
    base = ModelFlags(**{name: getattr(model, name) for name in OF_THE_BASE})
    if base.model_path is None:
        # Named, so that the bundled override is not taken with it.
        base = replace(base, model_path=BUNDLED_PIPELINE)
    shared = RunFlags(**{name: getattr(run, name) for name in OF_BOTH})
    ours = _side(base, shared, reference)
    theirs = [_side(model, run, own) for own in candidates or ({},)]
    dtype = loading.DTYPES.get(ours.run.dtype, ours.run.dtype)
    named = replace(ours, name=SHORT.get(dtype, dtype))
    return named, _distinct([replace(each, name=_name(each)) for each in theirs])


def generate_command(side: Side, request: Request) -> str:
    """The `diffquant generate` that draws what this side drew."""
    typed = {**asdict(side.model), **asdict(side.run), **request.typed}
    _ = typed.pop("num_images_per_prompt", None)  # one at a time, in every comparison
    words = [word for name, value in typed.items() for word in _words(name, value)]
    return shlex.join(["diffquant", "generate", *words])


def _side(model: ModelFlags, run: RunFlags, own: Mapping[str, Any]) -> Side:
    of_model = {item.name for item in fields(ModelFlags)}
    of_run = {item.name for item in fields(RunFlags)}
    for name in own:
        if name not in of_model | of_run:
            raise UsageError(f"unknown flag {name!r} of one side", hint="see help(diffquant.load)")
    merged: dict[str, Any] = {
        name: {**getattr(model, name), **value} if isinstance(value, Mapping) else value
        for name, value in own.items()
        if name in of_model
    }
    return Side(
        name="",
        model=replace(model, **merged),
        run=replace(run, **{name: value for name, value in own.items() if name in of_run}),
    )


def _name(side: Side) -> str:
    """What a candidate is known by: its recipe, else where its weights come from."""
    # Before anything is loaded, so that what resolution refuses is refused now.
    dry = loading.dry_run(side.model, side.run)
    if side.model.quantization:
        return side.model.quantization
    for component, source in dry.resolution.components.items():
        if source.override:
            return PurePath(source.weights.origin).stem
        if dry.plans[component].quantized:
            return dry.plans[component].format
    return "candidate"


def _distinct(found: Sequence[Side]) -> tuple[Side, ...]:
    """Names that are taken get a number."""
    names = [side.name for side in found]
    return tuple(
        replace(side, name=f"{side.name} ({names[: index + 1].count(side.name)})")
        if names.count(side.name) > 1
        else side
        for index, side in enumerate(found)
    )


def _words(name: str, value: Any) -> list[str]:
    """The option of one flag; a flag that is as it is without typing gives none."""
    option = f"--{name.replace('_', '-')}"
    if name == "pinned" or value is False or value in UNTYPED:
        return []
    if value == getattr(RunFlags(), name, None):
        return []
    if value is True:
        return [option]
    if isinstance(value, Mapping):
        return [word for key, item in value.items() for word in (f"{option}.{key}", _text(item))]
    if name in REPEATED:
        return [word for item in value for word in (option, item)]
    return [option, _text(value)]


def _text(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
