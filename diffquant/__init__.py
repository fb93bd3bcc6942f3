"""Quantized diffusion transformers: every dialect read, on any machine, never silently wrong.

    import diffquant
    pipeline = diffquant.load("black-forest-labs/FLUX.1-dev", transformer_path="…-modelopt-fp8")
    print(diffquant.report(pipeline).truth_lines)

Importing this package imports no torch; the first call that needs it does.
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffquant.load import Inspection, Report
    from diffquant.plan import Plan

__all__ = ["__version__", "inspect", "load", "load_component", "plan", "report"]

__version__ = version("diffquant")


def load(model_path: str | None = None, **flags: Any) -> Any:
    """The diffusers pipeline at `model_path` with its quantized transformer in place.

    model_path  directory, `org/repo[@revision]` or bundled name; None: the bundled pipeline
    flags       the command line's names: transformer_path, transformer_weights_path,
                component_paths, component_weights_paths, device, dtype, numerics, kernel, strict,
                local_files_only, revision …

    Raises DiffquantError with a hint for anything that does not fit, UsageError for unknown flags.
    """
    from diffquant.load import load as load_pipeline

    return load_pipeline(*_sorted_flags(model_path, flags))


def load_component(component: str = "transformer", model_path: str | None = None, **flags: Any) -> Any:
    """One component of the pipeline `load` would build, such as the transformer, as a module."""
    import torch

    from diffquant.load import DTYPES, build, dry_run

    dry = dry_run(*_sorted_flags(model_path, flags))
    dtype = getattr(torch, DTYPES[dry.run.dtype])
    return build(dry, component, torch.device(dry.device.torch_name), dtype)


def plan(model_path: str | None = None, **flags: Any) -> "Mapping[str, Plan]":
    """The plan of each transformer that `load` would build, from headers alone."""
    from diffquant.load import dry_run

    return dry_run(*_sorted_flags(model_path, flags)).plans


def inspect(source: str, *, deep: bool = False, **where: Any) -> "Inspection":
    """Format, family, plan and audit of one checkpoint; `deep` reads its weights too."""
    from diffquant.load import inspect as inspect_source

    return inspect_source(source, deep=deep, **where)


def report(pipeline: Any) -> "Report":
    """Plan, choices and tally of a pipeline that `load` returned."""
    from diffquant.load import report as report_of

    return report_of(pipeline)


def _sorted_flags(model_path: str | None, flags: Mapping[str, Any]) -> tuple[Any, Any]:
    """Flags into those about models and those about running; an unknown one is refused by name."""
    import difflib
    from dataclasses import fields

    from diffquant.errors import UsageError
    from diffquant.load import RunFlags
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
