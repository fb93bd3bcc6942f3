"""Quantized diffusion transformers: every dialect read, on any machine, never silently wrong.

    import diffquant
    pipeline = diffquant.load("black-forest-labs/FLUX.1-dev", transformer_path="…-modelopt-fp8")
    print(diffquant.report(pipeline).truth_lines)

Importing this package imports no torch; the first call that needs it does.
"""

import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from diffquant.compare.comparison import Comparison
    from diffquant.loading import Inspection, Report
    from diffquant.plan import Plan

__all__ = ["__version__", "compare", "inspect", "load", "load_component", "plan", "report"]

__version__ = "0.1.0"


def load(
    model_path: str | None = None,
    *,
    components: "Mapping[str, Any] | None" = None,
    **flags: Any,
) -> Any:
    """The diffusers pipeline at `model_path` with its quantized transformer in place.

    model_path  directory, `org/repo[@revision]` or bundled name; None: the bundled pipeline
    components  some that are there already and are not loaded: {"processor": mine}
    flags       the command line's names: transformer_path, transformer_weights_path,
                component_paths, component_weights_paths, device, dtype, numerics, kernel, strict,
                lora (each "SOURCE[:scale]"),
                local_files_only, revision …

    Raises DiffquantError with a hint for anything that does not fit, UsageError for unknown flags.
    """
    from diffquant.loading import load as load_pipeline

    return load_pipeline(*_sorted_flags(model_path, flags), components=components)


def load_component(
    component: str = "transformer", model_path: str | None = None, **flags: Any
) -> Any:
    """One component of the pipeline `load` would build, such as the transformer, as a module."""
    import torch

    from diffquant.loading import DTYPES, build, dry_run

    dry = dry_run(*_sorted_flags(model_path, flags))
    dtype = getattr(torch, DTYPES[dry.run.dtype])
    return build(dry, component, torch.device(dry.device.torch_name), dtype)


def plan(model_path: str | None = None, **flags: Any) -> "Mapping[str, Plan]":
    """The plan of each transformer that `load` would build, from headers alone."""
    from diffquant.loading import dry_run

    return dry_run(*_sorted_flags(model_path, flags)).plans


def inspect(source: str, *, deep: bool = False, **where: Any) -> "Inspection":
    """Format, family, plan and audit of one checkpoint; `deep` reads its weights too."""
    from diffquant.loading import inspect as inspect_source

    return inspect_source(source, deep=deep, **where)


def compare(
    model_path: str | None = None,
    *,
    prompts: Sequence[str] = (),
    seeds: Sequence[int] = (),
    candidates: Sequence[Mapping[str, Any]] = (),
    reference: Mapping[str, Any] | None = None,
    level: str = "smoke",
    thresholds: Mapping[str, float] | None = None,
    saved_reference: "Path | None" = None,
    save_reference: "Path | None" = None,
    repeat: int = 1,
    **flags: Any,
) -> "Comparison":
    """Draw the same noise with the BF16 base and with each candidate, and judge: see `.ok`,
    `.first_failure`, `.candidates`, `.to_json()`, `.to_markdown()`, `.to_html()`.

    prompts, seeds    every prompt is drawn with every seed; no seed means 42
    candidates        flags of `load` that each candidate has of its own; none: one, by `flags`
    reference         flags of `load` that the reference has of its own
    thresholds        limits in place of the level's: {"psnr": 28}
    saved_reference   a capture to use instead of drawing; save_reference: where to keep one
    repeat            rounds in which time and memory are measured, the sides in turns
    flags             those of `load`, for all candidates, and width, height, num_inference_steps …

    Raises DiffquantError where a side cannot be loaded, or the comparison would be unfair.
    """
    from diffquant.compare import Question, requests
    from diffquant.compare import compare as answer
    from diffquant.compare.asking import sides
    from diffquant.run import Request

    drawing = {name: flags.pop(name) for name in list(flags) if name in Request.__slots__}
    model, run = _sorted_flags(model_path, flags)
    ours, theirs = sides(model, run, reference=reference or {}, candidates=candidates)
    settings = Request(**drawing)
    asked = requests(settings, prompts, seeds) if prompts or not saved_reference else ()
    return answer(
        Question(
            reference=ours,
            candidates=theirs,
            requests=asked,
            settings=settings,
            seeds=tuple(seeds),
            level=level,
            thresholds=thresholds or {},
            saved=saved_reference,
            save_reference=save_reference,
            repeat=repeat,
        )
    )


def report(pipeline: Any) -> "Report":
    """Plan, choices and tally of a pipeline that `load` returned."""
    from diffquant.loading import report as report_of

    return report_of(pipeline)


def _sorted_flags(model_path: str | None, flags: Mapping[str, Any]) -> tuple[Any, Any]:
    """Flags into those about models and those about running; an unknown one is refused by name."""
    import difflib
    from dataclasses import fields

    from diffquant.errors import UsageError
    from diffquant.loading import RunFlags
    from diffquant.resolve import ModelFlags

    of_model = {item.name for item in fields(ModelFlags)}
    of_run = {item.name for item in fields(RunFlags)}
    for name in flags:
        if name not in of_model | of_run:
            near = difflib.get_close_matches(name, of_model | of_run, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see help(diffquant.load)"
            raise UsageError(f"unknown flag {name!r}", hint=hint)
    model = {name: value for name, value in flags.items() if name in of_model}
    run = {name: value for name, value in flags.items() if name in of_run}
    return ModelFlags(model_path=model_path, **model), RunFlags(**run)


class _Face(ModuleType):
    """This package as people see it: `diffquant.load` and `diffquant.plan` are the functions above,
    also after Python has imported the modules of the same names and would put them in their place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
