"""Flags -> resolution -> plans -> choices, from headers alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from diffquant import adapters, device, experts, headers, online, planner, ranks, resolve
from diffquant.compiling import require_compiler
from diffquant.device import Device
from diffquant.errors import UsageError
from diffquant.families import FAMILIES, Inventory
from diffquant.kernels import Choice, choose
from diffquant.loading._flags import RunFlags
from diffquant.loading._truth import tally
from diffquant.plan import LayerPlan, Plan
from diffquant.residence import BUDGET, Residence
from diffquant.resolve import ComponentSource, ModelFlags, Resolution


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """Everything decided before a weight is read."""

    resolution: Resolution
    plans: Mapping[str, Plan]
    choices: Mapping[str, tuple[Choice, ...]]
    device: Device
    run: RunFlags

    @property
    def residence(self) -> Residence:
        """Where weights will live on this device."""
        return self.run.residence.on(self.device)

    @property
    def truth_lines(self) -> tuple[str, ...]:
        """One line per component: how many linears are what, through which kernel; and one that
        says how many processes draw a picture, where it is not one."""
        lines = (f"{name}: {tally(plan, self.choices[name])}" for name, plan in self.plans.items())
        return (*lines, *ranks.told(self.run.processes))

    @property
    def transformers(self) -> dict[str, ComponentSource]:
        """The components that take the noise away."""
        sources = self.resolution.components
        return {name: source for name, source in sources.items() if source.is_transformer}


def dry_run(model: ModelFlags, run: RunFlags | None = None) -> DryRun:
    """Resolution, plans and kernel choices, from headers alone. What cannot be read is refused here,
    LoRAs too, before anything large is loaded."""
    run = run or RunFlags()
    resolution = resolve.resolve(model)
    for text in run.lora:
        adapters.file_of(adapters.parsed(text).source, local_files_only=model.local_files_only)
    if run.save_quantized:
        wishes = [source.online for source in resolution.components.values() if source.online]
        online.require_saveable(wishes, Path(run.save_quantized))
    place = _place(run)
    resolution = replace(resolution, fired=(*resolution.fired, *_moved(run, place)))
    if run.compile:
        require_compiler(place)
    if run.memory_budget and place.kind != "cpu":
        raise UsageError(
            f"{BUDGET} is for kernels of the CPU, this is {place.kind}",
            hint=f"leave {BUDGET} out: here weights stay encoded",
        )
    plans = {name: component_plan(source) for name, source in resolution.components.items()}
    held = experts.check(resolution.components, plans)
    resolution = replace(resolution, fired=(*resolution.fired, *held))
    choices = {name: choose_all(plan, place, run, name) for name, plan in plans.items()}
    dry = DryRun(resolution=resolution, plans=plans, choices=choices, device=place, run=run)
    for name, source in dry.transformers.items():
        ranks.require_heads(name, source.config.get("num_attention_heads"), run.processes)
    return dry


def _place(run: RunFlags) -> Device:
    """The device that was named, or the best one here; one of each process's own for several."""
    if run.processes > 1:
        return ranks.own_device(run.device, ranks.here())
    return device.probe() if run.device is None else device.parse(run.device)


def _moved(run: RunFlags, place: Device) -> Iterator[resolve.Fired]:
    """What a person should know about where weights will live."""
    if sentence := run.residence.note(place):
        yield resolve.Fired("offload", sentence, loud=True)


def component_plan(source: ComponentSource) -> Plan:
    """The plan of one component, quantized while loading where that was asked for.

    Raises PlanError when its weights do not fit its config, and what `online.requantized` raises.
    """
    header = headers.read(source.weights.files)
    plan = planner.plan(
        source.weights,
        header,
        config=source.config,
        hints=source.hints,
        inventory=_base_inventory(source),
    )
    return plan if source.online is None else online.requantized(plan, source.online)


def _base_inventory(source: ComponentSource) -> Inventory | None:
    """What the base's own weights tell about a class that nobody described."""
    family = FAMILIES.load(planner.family_of(source.config, headers.read(source.weights.files)))
    if family.is_described or not source.override or source.base is None:
        return None
    header = headers.read(source.base.files)
    return planner.inventory_of(planner.draft(source.base, header, config=source.config).plan)


def choose_all(plan: Plan, place: Device, run: RunFlags, component: str) -> tuple[Choice, ...]:
    """The kernel of every layer on the device; pinned kernels are demanded layer by layer."""
    pinned = run.pinned.get(component, {})
    return tuple(
        choose(
            layer,
            place,
            numerics=run.numerics,
            kernel=_demanded(layer, pinned.get(layer.path, run.kernel)),
            strict=run.strict,
        )
        for layer in plan.layers
    )


def _demanded(layer: LayerPlan, kernel: str | None) -> str | None:
    """A demand speaks of encoded layers; plain ones have nothing to choose."""
    return None if layer.is_ordinary or kernel == "dense" else kernel
