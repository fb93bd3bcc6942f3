"""The whole sentence: flags -> resolution -> plans -> choices -> transformers -> pipeline.

`dry_run` and `inspect` stop before torch; `load` goes on. run, serve, compare, converters and the
public API all come through here.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from diffquant import (
    adapters,
    audit,
    device,
    experts,
    headers,
    online,
    planner,
    ranks,
    resolve,
    sources,
)
from diffquant.compiling import require_compiler
from diffquant.device import Device
from diffquant.errors import UsageError
from diffquant.families import FAMILIES, Inventory
from diffquant.formats import NO_HINTS, Hints
from diffquant.kernels import WITHOUT_FLOAT8, Choice, Numerics, choose, wanted
from diffquant.plan import DENSE, LayerPlan, Plan, Problem
from diffquant.residence import BUDGET, MODES, Mode, Residence, bytes_of
from diffquant.resolve import ComponentSource, ModelFlags, Resolution
from diffquant.sources import Checkpoint

if TYPE_CHECKING:
    from torch import nn

    from diffquant.fidelity import LayerFidelity
    from diffquant.lora import Adapter
    from diffquant.paging import Keep

#: component, layers done, layers in all
Progress = Callable[[str, int, int], None]
DTYPES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "float32": "float32",
    "fp32": "float32",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFlags:
    """What was typed about running: device, compute dtype, numerics and kernels.

    pinned  component -> layer -> kernel, from a picture's metadata: run exactly these
    lora    each `[COMPONENT=]SOURCE[:scale]`, all active together
    save_quantized  a folder to write what is quantized while loading to; it must not exist
    offload         where weights live while drawing, with how many blocks ahead and to stay: see
                    `residence`
    compile         the repeated blocks of transformers
    memory_budget   such as 8GiB, for weights that stay decoded where that is faster: see `keeping`
    ulysses_degree  processes that draw one picture together, each on its own device: see `ulysses`
    """

    device: str | None = None
    dtype: str = "bfloat16"
    numerics: Numerics = "auto"
    kernel: str | None = None
    strict: bool = False
    lora: tuple[str, ...] = ()
    save_quantized: str | None = None
    offload: Mode = "none"
    offload_prefetch: int | None = None
    resident_layers: int | None = None
    compile: bool = False
    memory_budget: str | None = None
    ulysses_degree: int | None = None
    pinned: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        resolve.require_choice("numerics", self.numerics, get_args(Numerics))
        resolve.require_choice("dtype", self.dtype, tuple(DTYPES))
        resolve.require_choice("offload", self.offload, MODES)
        Residence.wished(self.offload, self.offload_prefetch, self.resident_layers)
        clashing = {
            "--offload": self.offload != "none",
            "--compile": self.compile,
            "--save-quantized": self.save_quantized is not None,
        }
        ranks.require_sense(self.processes, clashing)
        if self.memory_budget is not None:
            self._require_room(self.memory_budget)

    def _require_room(self, budget: str) -> None:
        """Raises UsageError for a budget that is no size, or beside what leaves it nothing to keep."""
        bytes_of(BUDGET, budget)
        others = {"--compile": self.compile, f"--offload {self.offload}": self.offload != "none"}
        for flag, typed in others.items():
            if typed:
                raise UsageError(
                    f"{BUDGET} keeps weights decoded in memory, and {flag} does not let it",
                    hint=f"leave out {BUDGET} or {flag}",
                )

    @property
    def processes(self) -> int:
        """How many draw one picture."""
        return 1 if self.ulysses_degree is None else self.ulysses_degree

    @property
    def residence(self) -> Residence:
        """Where weights are to live, on whatever device."""
        return Residence.wished(self.offload, self.offload_prefetch, self.resident_layers)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a loaded pipeline runs: plans, choices, the rules that fired, the truth lines, and the
    LoRAs it was loaded with.

    weightless  schedulers, tokenizers and processors that were taken from elsewhere
    digests  of the plans as headers alone told them, by which a picture knows its weights again
    """

    plans: Mapping[str, Plan]
    choices: Mapping[str, tuple[Choice, ...]]
    fired: tuple[resolve.Fired, ...]
    truth_lines: tuple[str, ...]
    device: str
    dtype: str
    numerics: str
    digests: Mapping[str, str]
    lora: "tuple[Adapter, ...]" = ()
    weightless: Mapping[str, resolve.Weightless] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plan digests, the kernel of each layer and the truth lines, as JSON values."""
        settings = {
            name: {"class": each.class_name, "origin": each.origin, "digest": each.digest}
            for name, each in self.weightless.items()
        }
        return {
            "truth": list(self.truth_lines),
            "rules": [f"rule {fired.rule}: {fired.sentence}" for fired in self.fired],
            "device": self.device,
            "dtype": self.dtype,
            "numerics": self.numerics,
            "lora": [adapter.to_json() for adapter in self.lora],
            **({"settings": settings} if settings else {}),
            "components": {
                name: {
                    "format": plan.format,
                    "family": plan.family,
                    "digest": self.digests[name],
                    "notes": list(plan.notes),
                    "kernels": {choice.path: choice.kernel for choice in self.choices[name]},
                }
                for name, plan in self.plans.items()
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What headers tell about one checkpoint; `problems` is empty when the audit passes.

    fidelity  its layers held against a base, the worst first; None where no base was given
    """

    checkpoint: Checkpoint
    plan: Plan
    problems: tuple[Problem, ...]
    fidelity: "tuple[LayerFidelity, ...] | None" = None

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Stable keys: format, family, evidence, files, notes, layers[], audit, fidelity[]."""
        compared = {} if self.fidelity is None else {"fidelity": _fidelity_json(self.fidelity)}
        return {
            "format": self.plan.format,
            "family": self.plan.family,
            "evidence": list(self.plan.evidence),
            "digest": self.plan.digest,
            "files": [{"path": file.path, "size": file.size} for file in self.plan.files],
            "notes": list(self.plan.notes),
            "open": [question.topic for question in self.plan.open],
            "layers": [_layer_json(layer) for layer in self.plan.layers],
            "plain": len(self.plan.plain),
            "unused": {ref.name: why for ref, why in self.plan.unused.items()},
            "audit": {
                "ok": self.ok,
                "problems": [
                    {"tensor": problem.tensor, "what": problem.what} for problem in self.problems
                ],
            },
            **compared,
        }


_REPORTS: "weakref.WeakKeyDictionary[Any, Report]" = weakref.WeakKeyDictionary()


def dry_run(model: ModelFlags, run: RunFlags | None = None) -> DryRun:
    """Resolution, plans and kernel choices, from headers alone."""
    run = run or RunFlags()
    resolution = resolve.resolve(model)
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
    place, dtype = torch.device(dry.device.torch_name), _dtype(dry.run.dtype)
    if dry.run.processes > 1:
        ulysses.require_split({name: each.config for name, each in dry.transformers.items()})
        ulysses.join(dry.run.processes, place)
    if dry.run.save_quantized:
        save_quantized(dry, on_progress=on_progress)
    digests = {name: plan.digest for name, plan in dry.plans.items()}
    dry = _respelled(dry)
    keep = Spill().keep if dry.residence.mode == "disk" else None
    modules = {
        name: build(dry, name, place, dtype, keep=keep, on_progress=on_progress)
        for name in dry.plans
    }
    kept = _kept(dry, modules)
    pipeline = attach(
        dry.resolution.pipeline.root,
        modules,
        device=place,
        dtype=dtype,
        residence=dry.residence,
        keep=keep,
        compile=dry.run.compile,
        handed=handed,
    )
    if dry.run.processes > 1:
        ulysses.split({name: modules[name] for name in dry.transformers}, dry.run.processes, place)
    lora.prepare(pipeline)
    lora.load(pipeline, dry.run.lora, local_files_only=model.local_files_only)
    _REPORTS[pipeline] = Report(
        plans=dry.plans,
        choices=dry.choices,
        fired=dry.resolution.fired,
        truth_lines=(*dry.truth_lines, *kept),
        device=dry.device.torch_name,
        dtype=str(dtype).removeprefix("torch."),
        numerics=dry.run.numerics,
        digests=digests,
        lora=lora.adapters(pipeline) if dry.run.lora else (),
        weightless=dry.resolution.weightless,
    )
    return pipeline


def _kept(dry: DryRun, modules: "Mapping[str, nn.Module]") -> tuple[str, ...]:
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


def _respelled(dry: DryRun) -> DryRun:
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


def report(pipeline: Any) -> Report:
    """What `load` decided for this pipeline. Raises UsageError for any other pipeline."""
    found = _REPORTS.get(pipeline)
    if found is None:
        raise UsageError(
            "this pipeline was not loaded by diffquant", hint="pipeline = diffquant.load(...)"
        )
    return found


def inspect(
    source: str,
    *,
    deep: bool = False,
    base: str | None = None,
    hints: Hints = NO_HINTS,
    on_layer: Callable[[int, int], None] | None = None,
    **where: Any,
) -> Inspection:
    """Format, plan and audit of one checkpoint, from headers; `deep` reads weights too.

    base      the model it was quantized from: its layers are decoded and held against the base's,
              and its config describes a file that comes without one
    on_layer  called with (layers compared, layers in all)
    where     revision, local_files_only, subfolder: as `sources.checkpoint` takes them
    """
    checkpoint = sources.checkpoint(source, **where)
    original = None if base is None else sources.checkpoint(base)
    header = headers.read(checkpoint.files)
    config = described_by(checkpoint, original)
    drawn = planner.draft(checkpoint, header, config=config, hints=hints)
    problems = drawn.problems + audit.audit(drawn.plan, header, deep=deep and not drawn.problems)
    if original is None or problems:
        return Inspection(checkpoint=checkpoint, plan=drawn.plan, problems=problems)
    plan, fidelity = _compared(drawn.plan, original, config, on_layer)
    return Inspection(checkpoint=checkpoint, plan=plan, problems=(), fidelity=fidelity)


def inspect_lora(lora: str, source: str, **where: Any) -> adapters.Reach:
    """What the LoRA at `lora` would reach in the model at `source`, from the headers of both."""
    checkpoint = sources.checkpoint(source, **where)
    plan = planner.plan(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)
    return _reach(lora, plan, local_files_only=bool(where.get("local_files_only")))


def reaches(dry: DryRun, *, local_files_only: bool = False) -> dict[str, adapters.Reach]:
    """What each typed LoRA would reach in its transformer, from headers. Only a forecast: loading
    goes through diffusers' converters, which may know spellings that this does not."""
    asked = {text: adapters.parsed(text) for text in dry.run.lora}
    return {
        text: _reach(each.source, dry.plans[each.component], local_files_only=local_files_only)
        for text, each in asked.items()
        if each.component in dry.plans
    }


def _reach(lora: str, plan: Plan, *, local_files_only: bool) -> adapters.Reach:
    files = sources.checkpoint(lora, local_files_only=local_files_only).files
    return adapters.reach(headers.read(files), plan)


def described_by(checkpoint: Checkpoint, base: Checkpoint | None) -> Mapping[str, Any]:
    """The config of the module: the checkpoint's own, else that of its base."""
    if base is None or "_class_name" in checkpoint.config:
        return checkpoint.config
    return base.config


def _compared(
    plan: Plan,
    base: Checkpoint,
    config: Mapping[str, Any],
    on_layer: Callable[[int, int], None] | None,
) -> "tuple[Plan, tuple[LayerFidelity, ...]]":
    """The settled plan and its layers against those of the base."""
    from diffquant import fidelity, settle

    base_plan = planner.plan(base, headers.read(base.files), config=base.config or config)
    settled = settle.settle(plan, settle.of_plan(base_plan))
    return settled, fidelity.compare_plans(settled, base_plan, on_layer)


def tally(plan: Plan, choices: tuple[Choice, ...]) -> str:
    """`25/34 linears fp8 via cpu_fp8, 9 bf16`: numbers from the plan, kernels from the choices."""
    kernels = {choice.path: choice for choice in choices}
    total = len(plan.layers)
    counted = Counter(_way(layer, kernels[layer.path]) for layer in plan.quantized)
    plain = Counter(_short(layer.dtype) for layer in plan.layers if layer not in plan.quantized)
    quantized = [f"{count}/{total} linears {way}" for way, count in counted.items()]
    rest = [f"{count} {dtype}" for dtype, count in plain.items()]
    return ", ".join([*(quantized or [f"0/{total} linears quantized"]), *rest])


def _way(layer: LayerPlan, choice: Choice) -> str:
    names = "+".join(name for name in layer.encodings if name != DENSE.name)
    if any(piece.recode for piece in layer.pieces):
        names += " (online)"
    return f"{names} via {choice.kernel}{_arithmetic(layer, choice)}"


def _arithmetic(layer: LayerPlan, choice: Choice) -> str:
    """Said only where the file asks for quantized activations: whether it gets them."""
    asked = [wanted(piece) for piece in layer.pieces]
    if not any(asked):
        return ""
    if all(spec.activation is None for spec in choice.specs):
        return " (weight-only)"
    return (
        " (activations emulated)" if "reference" in choice.kernels else " (activations quantized)"
    )


def _short(dtype: str) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(dtype, dtype)


def _demanded(layer: LayerPlan, kernel: str | None) -> str | None:
    """A demand speaks of encoded layers; plain ones have nothing to choose."""
    return None if layer.is_ordinary or kernel == "dense" else kernel


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, DTYPES[name])


def _fidelity_json(layers: "tuple[LayerFidelity, ...]") -> list[dict[str, Any]]:
    return [layer.to_json() for layer in layers]


def _layer_json(layer: LayerPlan) -> dict[str, Any]:
    first = layer.pieces[0]
    return {
        "path": layer.path,
        "shape": list(layer.shape_NK),
        "encoding": {"name": first.encoding.name, "options": dict(first.encoding.options)},
        "activation": None if first.activation is None else str(first.activation),
        "pieces": [str(piece.encoding) for piece in layer.pieces],
        "why": layer.why,
    }
