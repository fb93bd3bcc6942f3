"""A dry run -> modules with their weights, and what stays of them on disk."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffquant.kernels import WITHOUT_FLOAT8
from diffquant.loading._choosing import DryRun, choose_all
from diffquant.plan import Plan
from diffquant.residence import BUDGET, bytes_of

if TYPE_CHECKING:
    from torch import nn

    from diffquant.paging import Keep

#: component, layers done, layers in all
Progress = Callable[[str, int, int], None]


def build(
    dry: DryRun,
    component: str,
    place: Any,
    dtype: Any,
    *,
    keep: "Keep | None" = None,
    on_progress: Progress | None = None,
) -> "nn.Module":
    """One component's module: settled plan, choices of the settled plan, weights. They are on `place`
    when they are to stay there, else in host memory; `keep` is what `materialize` takes."""
    import torch

    from diffquant.materialize import materialize

    plan = dry.plans[component]
    settled = settled_plan(dry, component)
    choices = dry.choices[component]
    if settled is not plan:
        choices = choose_all(settled, dry.device, dry.run, component)

    def told(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(component, done, total)

    home = place if dry.residence.mode == "none" else torch.device("cpu")
    # Quantizing rounds to float8, which not every device has.
    workshop = torch.device("cpu") if dry.device.kind in WITHOUT_FLOAT8 else place
    return materialize(
        settled, choices, device=home, dtype=dtype, workshop=workshop, keep=keep, on_layer=told
    )


def save_quantized(dry: DryRun, *, on_progress: Progress | None = None) -> None:
    """Write every component that is quantized while loading to `dry.run.save_quantized`, in the format
    its scheme is saved as. Raises FormatError for what that format cannot say."""
    from diffquant.saving import save

    for component, folder in _saved_folders(dry).items():
        wish = dry.resolution.components[component].online
        assert wish is not None, "only components with a wish have a folder"

        def told(done: int, total: int, name: str = component) -> None:
            if on_progress is not None:
                on_progress(name, done, total)

        save(settled_plan(dry, component), wish, folder, on_progress=told)


def _saved_folders(dry: DryRun) -> dict[str, Path]:
    """The folder itself for one component, one inside it for each of several."""
    output = Path(dry.run.save_quantized or "")
    wishes = [name for name, source in dry.resolution.components.items() if source.online]
    return {name: output / name if len(wishes) > 1 else output for name in wishes}


def settled_plan(dry: DryRun, component: str) -> Plan:
    """The plan of a component in the names of its class, with its open questions answered from data."""
    from diffquant.classes import respelled
    from diffquant.settle import of_checkpoint, settle

    plan, source = dry.plans[component], dry.resolution.components[component]
    return respelled(settle(plan, of_checkpoint(source.base, source.config) if plan.open else None))


def in_names_of_classes(dry: DryRun) -> DryRun:
    """Plans and choices in the names of the classes, which headers alone do not tell."""
    from diffquant.classes import respelled

    plans = {name: respelled(plan) for name, plan in dry.plans.items()}
    choices = {
        name: dry.choices[name]
        if plan is dry.plans[name]
        else choose_all(plan, dry.device, dry.run, name)
        for name, plan in plans.items()
    }
    return replace(dry, plans=plans, choices=choices)


def keep_decoded(dry: DryRun, modules: "Mapping[str, nn.Module]") -> tuple[str, ...]:
    """What stays decoded of each component, said; the budget is spent in their order."""
    if dry.run.memory_budget is None:
        return ()
    from diffquant import keeping

    left, lines = bytes_of(BUDGET, dry.run.memory_budget), []
    for name, choices in dry.choices.items():
        outcome = keeping.keep(modules[name], choices, budget=left, device=dry.device)
        left -= outcome.bytes
        lines.append(f"{name}: {outcome}")
    return tuple(lines)
