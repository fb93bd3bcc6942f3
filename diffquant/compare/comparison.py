"""What a comparison found, as data: strict JSON, and a table for a model card."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import inf, isfinite, isnan
from typing import Any

import torch
from torch import Tensor

from diffquant.compare.cost import Cost, slowdown
from diffquant.compare.layers import Layer, OneStep
from diffquant.compare.means import Mean, mean
from diffquant.compare.metrics import Distance, Likeness
from diffquant.compare.verdict import Verdict
from diffquant.fidelity import LEFT
from diffquant.run import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One prompt and seed on both sides.

    steps       distance of the latents after every step
    learned     what judges say that are here, by figure: see `judges`
    flaws       what is wrong with the candidate's by itself
    frames      [F, 3, H, W] uint8 of either side, for reports
    """

    request: Request
    timesteps: tuple[float, ...]
    steps: tuple[Distance, ...]
    likeness: Likeness
    flaws: tuple[str, ...]
    reference_flaws: tuple[str, ...]
    reference_frames: Tensor
    candidate_frames: Tensor
    learned: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt": self.request.prompt,
            "seed": self.request.seeds[0],
            "picture": {**asdict(self.likeness), **self.learned},
            "identical": bool(torch.equal(self.reference_frames, self.candidate_frames)),
            "flaws": list(self.flaws),
            "reference_flaws": list(self.reference_flaws),
            "per_step": [
                {"timestep": timestep, **asdict(step)}
                for timestep, step in zip(self.timesteps, self.steps, strict=True)
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Everything about one candidate.

    notes  what makes the figures less than they seem: other devices, missing answers
    """

    name: str
    command: str
    truth_lines: tuple[str, ...]
    verdict: Verdict
    figures: Mapping[str, float | None]
    pairs: tuple[Pair, ...]
    one_step: tuple[OneStep, ...]
    layers: tuple[Layer, ...]
    cost: Cost
    notes: tuple[str, ...] = ()

    def mean(self, of: Callable[[Pair], float]) -> Mean:
        """Of a figure over prompts and seeds."""
        return mean([of(pair) for pair in self.pairs])

    def left_unquantized(self) -> list[str]:
        """Layers whose like are quantized in most blocks."""
        return [
            layer.path
            for layer in self.layers
            if layer.weight is not None and layer.weight.suspicion == LEFT
        ]

    def worst(self, of: Callable[[Layer], float | None], count: int) -> list[Layer]:
        """The layers with the largest value of a figure, the worst first."""
        known = [(value, layer) for layer in self.layers if (value := of(layer)) is not None]
        ranked = sorted(known, key=lambda item: -inf if isnan(item[0]) else -item[0])
        return [layer for _, layer in ranked[:count]]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "command": self.command,
            "truth": list(self.truth_lines),
            "notes": list(self.notes),
            "verdict": {
                "ok": self.verdict.ok,
                "level": self.verdict.level,
                "first_failure": self.verdict.first_failure,
                "defects": list(self.verdict.defects),
                "checks": [{**asdict(check), "ok": check.ok} for check in self.verdict.checks],
            },
            "figures": dict(self.figures),
            "means": {name: asdict(self.mean(of)) for name, of in MEANS.items()},
            "left_unquantized": self.left_unquantized(),
            "cost": _cost_json(self.cost),
            "pairs": [pair.to_json() for pair in self.pairs],
            "one_step": [
                {"component": each.component, "step": each.step, **asdict(each.distance)}
                for each in self.one_step
            ],
            "layers": [layer.to_json() for layer in self.layers],
        }


#: Figures of a pair that are worth a mean with an interval.
MEANS: Mapping[str, Callable[[Pair], float]] = {
    "psnr_db": lambda pair: pair.likeness.psnr_db,
    "ssim": lambda pair: pair.likeness.ssim,
    "mae": lambda pair: pair.likeness.mae,
    "cosine": lambda pair: pair.steps[-1].cosine,
    "relative_l2": lambda pair: pair.steps[-1].relative_l2,
}


#: Figures that are one layer's, the worst.
BEHIND: Mapping[str, Callable[[Layer], float | None]] = {
    "weight": lambda layer: (
        None
        if layer.weight is None or layer.weight.fidelity is None
        else layer.weight.fidelity.relative_error
    ),
    "kernel": lambda layer: layer.kernel,
    "output": lambda layer: layer.output,
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One reference, one or more candidates.

    command     that makes this comparison again; empty where Python asked
    conditions  of the reference, which every candidate shares
    unmeasured  figures that need what is not here, with the reason
    """

    reference: str
    reference_command: str
    reference_cost: Cost
    reference_truth: tuple[str, ...]
    conditions: Mapping[str, str]
    candidates: tuple[Candidate, ...]
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        return all(candidate.verdict.ok for candidate in self.candidates)

    @cached_property
    def first_failure(self) -> str | None:
        """`name: figure` of the first candidate that fails, in one line."""
        failed = (each for each in self.candidates if not each.verdict.ok)
        return next((f"{each.name}: {each.verdict.first_failure}" for each in failed), None)

    def slowdown(self, candidate: Candidate) -> Mean:
        """Its seconds per step over the reference's, round by round."""
        return slowdown(candidate.cost, self.reference_cost)

    def against_first(self, candidate: Candidate) -> dict[str, Mean]:
        """Figures less those of the first candidate, drawing by drawing: what the choice between the
        two changes, with what all drawings have in common taken out."""
        first = self.candidates[0].pairs
        return {
            name: mean(
                [of(ours) - of(its) for ours, its in zip(candidate.pairs, first, strict=True)]
            )
            for name, of in MEANS.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Strict JSON values: what is infinite or no number is null (`identical` tells one case)."""
        told: dict[str, Any] = _strict(
            {
                "ok": self.ok,
                "first_failure": self.first_failure,
                "command": self.command,
                "conditions": dict(self.conditions),
                "notes": list(self.notes),
                "unmeasured": dict(self.unmeasured),
                "reference": {
                    "name": self.reference,
                    "command": self.reference_command,
                    "truth": list(self.reference_truth),
                    "cost": _cost_json(self.reference_cost),
                },
                "candidates": [self._candidate_json(each) for each in self.candidates],
            }
        )
        return told

    def _candidate_json(self, candidate: Candidate) -> dict[str, Any]:
        against = self.against_first(candidate)
        return {
            **candidate.to_json(),
            "slowdown": asdict(self.slowdown(candidate)),
            "against_first": {name: asdict(each) for name, each in against.items()},
        }

    def to_html(self) -> str:
        """One page that holds everything it shows."""
        from diffquant.compare.report import page

        return page(self)

    def to_markdown(self) -> str:
        """The table a model card wants."""
        head = ("", "verdict", "PSNR", "SSIM", "latent cosine", "relative L2", "size", "s/step")
        reference = self.reference_cost
        rows = [
            head,
            ("---",) + ("---:",) * (len(head) - 1),
            (
                self.reference, "reference", "", "", "", "",
                f"{reference.weight_bytes / 1e6:.1f} MB", f"{reference.step.value:.3f}",
            ),
            *(_markdown_row(candidate) for candidate in self.candidates),
        ]  # fmt: skip
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        count = len(self.candidates[0].pairs)
        made = f" Made by `{self.command}`." if self.command else ""
        drawings = "1 drawing" if count == 1 else f"{count} drawings"
        return f"{table}\n\n{drawings}, same noise on both sides.{made}\n"


def _markdown_row(candidate: Candidate) -> tuple[str, ...]:
    found = {name: candidate.mean(of).value for name, of in MEANS.items()}
    verdict = candidate.verdict
    return (
        candidate.name,
        f"{verdict.level} {'passed' if verdict.ok else 'missed'}",
        f"{found['psnr_db']:.2f} dB",
        f"{found['ssim']:.4f}",
        f"{found['cosine']:.5f}",
        f"{found['relative_l2']:.4f}",
        f"{candidate.cost.weight_bytes / 1e6:.1f} MB",
        f"{candidate.cost.step.value:.3f}",
    )


def _cost_json(cost: Cost) -> dict[str, Any]:
    """Means with intervals and, for whoever wants another statistic, every round."""
    return {
        "load_seconds": {**asdict(cost.load), "rounds": list(cost.load_seconds)},
        "step_seconds": {**asdict(cost.step), "rounds": list(cost.step_seconds)},
        "weight_bytes": cost.weight_bytes,
        "peak_bytes": cost.peak,
    }


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value
