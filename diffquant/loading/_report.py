"""What runs in a loaded pipeline, for whoever asks later."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from diffquant import resolve
from diffquant.errors import UsageError
from diffquant.kernels import Choice
from diffquant.loading._choosing import DryRun
from diffquant.loading._flags import DTYPES
from diffquant.plan import Plan

if TYPE_CHECKING:
    from diffquant.lora import Adapter

#: By pipeline, and by each model that was built, which other pipelines may share.
_REPORTS: "weakref.WeakKeyDictionary[Any, Report]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a loaded pipeline runs: plans, choices, the rules that fired, the truth lines, and the
    LoRAs it was loaded with.

    digests     of the plans as headers alone told them, by which a picture knows its weights again
    weightless  schedulers, tokenizers and processors that were taken from elsewhere
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

    @classmethod
    def of(
        cls, dry: DryRun, named: DryRun, *, kept: tuple[str, ...], lora: "tuple[Adapter, ...]"
    ) -> Self:
        """Of what headers alone told, `dry`, and the same in the names of the classes that run;
        `kept` are the lines about what stays decoded."""
        return cls(
            plans=named.plans,
            choices=named.choices,
            fired=dry.resolution.fired,
            truth_lines=(*named.truth_lines, *kept),
            device=dry.device.torch_name,
            dtype=DTYPES[dry.run.dtype],
            numerics=dry.run.numerics,
            digests={name: plan.digest for name, plan in dry.plans.items()},
            lora=lora,
            weightless=dry.resolution.weightless,
        )

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


def remember(pipeline: Any, report: Report) -> None:
    """From now on `report(pipeline)` gives it, as long as the pipeline lives, and so it does for
    pipelines that are made of the same models: `from_pipe(pipeline)`."""
    _REPORTS[pipeline] = report
    for name in report.plans:
        _REPORTS[pipeline.components[name]] = report


def report(pipeline: Any) -> Report:
    """What `load` decided for this pipeline. Raises UsageError for any other pipeline."""
    found = _REPORTS.get(pipeline) or _of_models(pipeline)
    if found is None:
        raise UsageError(
            "this pipeline was not loaded by diffquant", hint="pipeline = diffquant.load(...)"
        )
    return found


def _of_models(pipeline: Any) -> Report | None:
    """Of the pipeline whose models these are, where all it speaks of are here."""
    models = [part for part in getattr(pipeline, "components", {}).values() if _is_known(part)]
    reports = {id(_REPORTS[model]): _REPORTS[model] for model in models}
    whole = [found for found in reports.values() if len(found.plans) == len(models)]
    return whole[0] if len(reports) == 1 and whole else None


def _is_known(part: Any) -> bool:
    """Not everything in a pipeline can be looked up: tuples and None are components too."""
    return hasattr(part, "state_dict") and part in _REPORTS
