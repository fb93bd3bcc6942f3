"""What headers tell about one checkpoint, or about a LoRA beside one; no pipeline is needed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffquant import adapters, audit, headers, planner, sources
from diffquant.formats import NO_HINTS, Hints
from diffquant.loading._choosing import DryRun
from diffquant.plan import LayerPlan, Plan, Problem
from diffquant.sources import Checkpoint

if TYPE_CHECKING:
    from diffquant.fidelity import LayerFidelity


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
    file = adapters.file_of(lora, local_files_only=local_files_only)
    return adapters.reach(headers.read([file]), plan)


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
