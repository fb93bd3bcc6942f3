"""The one contract of every converter from plain weights to a dialect.

    plain          headers -> the plan of a dense model; nothing is read yet
    quantized      that plan with a recode for each layer that the preset does not keep
    settled        the same for a checkpoint of any dialect, its open questions answered
    convert        what must travel together, the file's own reader, the writing, the report

Every number is checked on headers before the first byte is written, the result lies in a temporary
place until its layers were decoded and held against the source, and at most one layer is in memory.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant import exporting, headers, online, planner, settle, sources
from diffquant.converters._component import spellings
from diffquant.converters._options import Choosing, Reading, Writing
from diffquant.converters._progress import bar
from diffquant.converters._report import NOTHING, Report, compared, tell
from diffquant.errors import ConvertError, UsageError
from diffquant.exporting import Prepared
from diffquant.families import FAMILIES
from diffquant.loading import described_by
from diffquant.online import Online, Stay
from diffquant.plan import Plan
from diffquant.sources import Checkpoint
from diffquant.writing import Progress, require_absent

__all__ = [
    "Converted",
    "Judge",
    "convert",
    "plain",
    "quantized",
    "settled",
    "stamped",
    "tell",
    "typed",
]

GENERIC = "generic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What was written or would be, and what it cost; no files and no report in a dry run.

    kept  what stays as it is and why, a rule in a sentence
    """

    plan: Plan
    prepared: Prepared
    kept: tuple[str, ...]
    files: tuple[Path, ...] = ()
    report: Report = NOTHING

    def to_json(self) -> dict[str, Any]:
        """Counts, bytes, what stays and why, and the worst layers."""
        plan = self.plan
        dynamic = sum(_is_dynamic(layer.pieces) for layer in plan.quantized)
        return {
            "format": self.prepared.format,
            "quantized_layers": len(plan.quantized),
            "kept_layers": len(plan.layers) - len(plan.quantized),
            "dynamic_inputs": dynamic,
            "tensors": len(self.prepared.tensors),
            "bytes": self.prepared.total_size,
            "losses": list(self.prepared.losses),
            "kept": list(self.kept),
            "files": [str(path) for path in self.files],
            "fidelity": self.report.to_json(),
        }


def plain(source: str, *, subfolder: str | None = None) -> Plan:
    """The plan of plain weights: a component, or the transformer of a pipeline.

    Raises ConvertError when they are quantized already, PlanError when they are no whole model.
    """
    checkpoint = sources.checkpoint(source, subfolder=subfolder)
    plan = planner.plan(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)
    if plan.quantized:
        raise ConvertError(
            f"plain weights were needed, {plan.quantized[0].path!r} of {source!r} is "
            f"{plan.quantized[0].encodings[0]} already ({plan.format})",
            hint=f"diffquant convert dequantize {source} OUTPUT makes plain ones, or transcode",
        )
    return plan


def quantized(
    plan: Plan,
    scheme: str,
    choosing: Choosing = Choosing(),  # noqa: B008 - frozen
    amax: Mapping[str, float] | None = None,
    *,
    keep: Mapping[str, Stay] = online.NOTHING,
) -> Plan:
    """The plan with every layer that may be quantized going to `scheme`, a module of `schemes/`.

    amax  layer -> largest magnitude of its input; layers without stay dynamic
    keep  layers that stay beside those that `choosing` names, and why

    Raises UsageError for a pattern that matches nothing and for inputs that have no static scale,
    PresetError for a preset that does not fit.
    """
    known = choosing.preset not in ("auto", "none")
    if choosing.preset == "auto" and plan.family == GENERIC:
        raise ConvertError(
            "nothing is known about which layers of a "
            f"{plan.config.get('_class_name')} may be quantized",
            hint="--preset none quantizes every linear; --keep-bf16-pattern leaves some out",
        )
    wish = Online(
        scheme=scheme,
        preset=choosing.preset if known else None,
        quantize_all=choosing.preset == "none",
    )
    keep = {**keep, **typed(plan, choosing.keep_bf16_pattern)}
    found = online.requantized(plan, wish, keep=keep)
    return online.calibrated(found, amax) if amax else found


def typed(plan: Plan, expressions: Sequence[str]) -> dict[str, Stay]:
    """Layers that --keep-bf16-pattern names, by any name they have."""
    family = FAMILIES.load(plan.family)
    names = {layer.path: spellings(layer.path, family) for layer in plan.layers}
    found: dict[str, Stay] = {}
    for expression in expressions:
        searched = re.compile(expression)
        hit = [path for path, known in names.items() if any(map(searched.search, known))]
        if not hit:
            raise UsageError(
                f"--keep-bf16-pattern {expression!r} matches no linear layer",
                hint=f"names are like {next(iter(names))!r}",
            )
        found |= dict.fromkeys(hit, Stay(f"--keep-bf16-pattern {expression}"))
    return found


def convert(plan: Plan, truth: Plan, dialect: str, writing: Writing) -> Converted:
    """Write `plan` as a file of `dialect`, and hold every layer of the file against `truth`.

    truth  the plan of the plain weights, before `quantized`

    Raises FormatError for what the dialect cannot say, ConvertError where the output is in the way
    or a layer lost more than `writing.max_error`; then nothing stays.
    """
    prepared = exporting.prepare(plan, dialect)
    kept = plan.notes[len(truth.notes) + 2 :]  # the first two count what does not stay
    _require_room(prepared, writing)
    if writing.dry_run:
        return Converted(plan=plan, prepared=prepared, kept=kept)
    with bar() as shown:
        judge = Judge(
            truth,
            prepared.export.config,
            max_error=writing.max_error,
            saved_to=writing.report,
            may_stay=True,
            on_progress=shown.told("checking"),
        )
        files = exporting.save(
            prepared,
            writing.output_dir,
            origin=stamped(plan),
            max_shard_size=writing.shard_bytes,
            overwrite=writing.overwrite,
            check=None if writing.no_check else judge,
            on_progress=shown.told("writing"),
        )
    return Converted(plan=plan, prepared=prepared, kept=kept, files=files, report=judge.report)


class Judge:
    """Reads what was written as anybody would, before it gets its name; `report` is what it found."""

    def __init__(
        self,
        truth: Plan,
        config: Mapping[str, Any] | None,
        *,
        max_error: float | None,
        saved_to: Path | None,
        may_stay: bool = False,
        on_progress: Progress | None,
    ) -> None:
        self.report = NOTHING
        self._truth = truth
        self._config = truth.config if config is None else config
        self._max_error = max_error
        self._saved_to = saved_to
        self._may_stay = may_stay
        self._on_progress = on_progress

    def __call__(self, files: Sequence[Path]) -> None:
        """Raises ConvertError when a layer lost more than `max_error`."""
        written = Checkpoint(
            origin=str(files[0]), root=files[0].parent, files=tuple(files), config=self._config
        )
        plan = planner.plan(written, headers.read(written.files), config=self._truth.config)
        self.report = compared(plan, self._truth, self._on_progress)
        self.report.judge(self._max_error, self._saved_to, may_stay=self._may_stay)


def settled(source: str, reading: Reading) -> Plan:
    """The plan of any checkpoint, its open questions answered."""
    checkpoint = sources.checkpoint(source, subfolder=reading.subfolder)
    base = None if reading.base is None else sources.checkpoint(reading.base)
    config = described_by(checkpoint, base)
    header = headers.read(checkpoint.files)
    plan = planner.plan(checkpoint, header, config=config, hints=reading.hints)
    return settle.settle(plan, settle.of_checkpoint(base, config) if plan.open else None)


def stamped(plan: Plan, *facts: str) -> str:
    """Names what a file is made from, so that only a run of the same is resumed."""
    stamps = [[file.path, Path(file.path).stat().st_mtime_ns] for file in plan.files]
    return json.dumps([plan.digest, *facts, stamps])


def _require_room(prepared: Prepared, writing: Writing) -> None:
    """What `exporting.save` would refuse, said by a dry run too."""
    output = writing.output_dir
    require_absent(output, writing.overwrite)
    if prepared.is_folder == (output.suffix == ".safetensors"):
        kind = "a folder" if prepared.is_folder else "one .safetensors file"
        raise UsageError(f"{prepared.format} is {kind}, --output-dir {output} names something else")


def _is_dynamic(pieces: Any) -> bool:
    """Whether a layer's inputs are quantized by scales taken from themselves."""
    found = [
        piece.activation if piece.recode is None else piece.recode.activation for piece in pieces
    ]
    return any(each is not None and each.mode == "dynamic" for each in found)
