"""The whole sentence: flags -> resolution -> plans -> choices -> transformers -> pipeline.

`dry_run` and `inspect` stop before torch; `load` goes on. run, serve, compare, converters and the
public API all come through here.

  _flags       what was typed about running
  _choosing    resolution, plans and kernel choices
  _truth       the truth line
  _inspecting  one checkpoint by itself
  _building    modules with their weights
  _report      what a loaded pipeline runs
"""

from collections.abc import Mapping
from typing import Any

from diffquant.errors import UsageError
from diffquant.loading._building import (
    Progress,
    build,
    in_names_of_classes,
    keep_decoded,
    save_quantized,
    settled_plan,
)
from diffquant.loading._choosing import DryRun, choose_all, component_plan, dry_run
from diffquant.loading._flags import DTYPES, RunFlags
from diffquant.loading._inspecting import (
    Inspection,
    described_by,
    inspect,
    inspect_lora,
    reaches,
)
from diffquant.loading._report import Report, remember, report
from diffquant.loading._truth import tally
from diffquant.resolve import ModelFlags

__all__ = [
    "DTYPES",
    "DryRun",
    "Inspection",
    "Progress",
    "Report",
    "RunFlags",
    "build",
    "choose_all",
    "component_plan",
    "described_by",
    "dry_run",
    "inspect",
    "inspect_lora",
    "load",
    "reaches",
    "report",
    "save_quantized",
    "settled_plan",
    "tally",
]


def load(
    model: ModelFlags | None = None,
    run: RunFlags | None = None,
    *,
    components: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> Any:
    """The diffusers pipeline, its quantized transformers in place; `report` tells what runs.

    components  some that are there already, by name, and are not loaded: `processor=…`

    Raises UsageError for one the pipeline has no place for, or that is loaded here.
    """
    import torch

    from diffquant import lora, ulysses, weightless
    from diffquant.attach import attach
    from diffquant.paging import Spill

    model = model or ModelFlags()
    dry = dry_run(model, run)
    handed = dict(components or {})
    _require_free(handed, dry)
    handed |= weightless.opened(dry.resolution.weightless)
    place, dtype = torch.device(dry.device.torch_name), getattr(torch, DTYPES[dry.run.dtype])
    together = dry.run.processes > 1
    if together:
        ulysses.require_split({name: each.config for name, each in dry.transformers.items()})
        ulysses.join(dry.run.processes, place)
    if dry.run.save_quantized:
        save_quantized(dry, on_progress=on_progress)
    named = in_names_of_classes(dry)
    keep = Spill().keep if named.residence.mode == "disk" else None
    modules = {
        name: build(named, name, place, dtype, keep=keep, on_progress=on_progress)
        for name in named.plans
    }
    kept = keep_decoded(named, modules)
    pipeline = attach(
        named.resolution.pipeline.root,
        modules,
        device=place,
        dtype=dtype,
        residence=named.residence,
        keep=keep,
        compile=named.run.compile,
        handed=handed,
    )
    if together:
        ulysses.split({name: modules[name] for name in dry.transformers}, dry.run.processes, place)
    lora.prepare(pipeline)
    lora.load(pipeline, dry.run.lora, local_files_only=model.local_files_only)
    adapters = lora.adapters(pipeline) if dry.run.lora else ()
    remember(pipeline, Report.of(dry, named, kept=kept, lora=adapters))
    return pipeline


def _require_free(handed: Mapping[str, Any], dry: DryRun) -> None:
    """A component that is handed over is one of the pipeline's, and of no other source."""
    known = dry.resolution.pipeline.components
    for name in handed:
        if name not in known:
            raise UsageError(
                f"components has {name!r}, and the pipeline has no such component",
                hint=f"its components: {', '.join(known)}",
            )
        if name in dry.plans or name in dry.resolution.weightless:
            raise UsageError(
                f"components has {name!r}, which is loaded from {_origin(name, dry)!r}",
                hint="pipeline.transformer = yours replaces it afterwards",
            )


def _origin(component: str, dry: DryRun) -> str:
    found = dry.resolution.weightless.get(component)
    return found.origin if found else dry.resolution.components[component].weights.origin
