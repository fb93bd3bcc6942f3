"""Prove it: one reference, one or more candidates, three answers with numbers, a verdict.

    1  Is the file faithful?       decoded weights against the base's, no forward
    2  Is the kernel faithful?     every layer's kernel against `reference` on captured inputs
    3  Is the model still good?    same noise: latents per step, one-step errors, pictures

The reference runs first and leaves a capture; it is let go before a candidate is loaded.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isnan
from pathlib import Path
from statistics import fmean

from diffquant import loading
from diffquant.compare.asking import generate_command
from diffquant.compare.comparison import Candidate, Comparison, Mean, Pair
from diffquant.compare.layers import (
    Layer,
    OneStep,
    defects_of,
    layers,
    one_step,
    weights_answer,
)
from diffquant.compare.metrics import likeness, per_step
from diffquant.compare.sides import Loaded, Side, captured, loaded, same_request, unfair
from diffquant.compare.trajectory import Capture, Progress, Trajectory, follow, read, save
from diffquant.compare.verdict import judge, limits
from diffquant.errors import DiffquantError, RunError, UsageError
from diffquant.fidelity import LayerFidelity
from diffquant.loading import DryRun
from diffquant.profiling import profiled
from diffquant.run import Request

__all__ = ["Candidate", "Comparison", "Layer", "Mean", "OneStep", "Pair", "Side", "compare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is compared and how strictly.

    requests        one per prompt and seed; with a saved reference they may be empty
    saved           a reference captured before, used instead of drawing
    save_reference  where to keep the reference's capture
    profile         where each side leaves a trace and a table of layers, from one more drawing
    """

    reference: Side
    candidates: tuple[Side, ...]
    requests: tuple[Request, ...]
    level: str = "smoke"
    thresholds: Mapping[str, float] = field(default_factory=dict)
    saved: Path | None = None
    save_reference: Path | None = None
    profile: Path | None = None
    command: str = ""


def compare(question: Question, on_progress: Progress = lambda what, done, of: None) -> Comparison:
    """Answer it. Raises UsageError or RunError where the comparison would be unfair."""
    limits(question.level, question.thresholds)
    reference = _reference(question, on_progress)
    if question.save_reference is not None:
        save(reference, question.save_reference)
    candidates = tuple(
        _candidate(side, reference, question, on_progress) for side in question.candidates
    )
    return Comparison(
        reference=reference.name,
        reference_command=generate_command(question.reference, reference.requests[0]),
        reference_cost=reference.cost,
        reference_truth=reference.truth_lines,
        conditions=reference.conditions,
        candidates=candidates,
        command=question.command,
        notes=tuple(_of_reference(reference)),
    )


def requests(asked: Request, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Request, ...]:
    """One request per prompt and seed. Raises UsageError where there is no prompt."""
    if not prompts:
        raise UsageError("there is no prompt", hint="--prompt 'red apple'")
    return tuple(
        replace(asked, prompt=prompt, seed=seed, num_images_per_prompt=1)
        for prompt in prompts
        for seed in seeds
    )


def _reference(question: Question, on_progress: Progress) -> Capture:
    if question.saved is not None:
        capture = read(question.saved)
        for drawn, typed in zip(capture.requests, question.requests, strict=False):
            same_request(drawn, typed)
        if question.requests and len(question.requests) != len(capture.requests):
            raise UsageError(
                f"the saved reference holds {len(capture.requests)} drawings, "
                f"{len(question.requests)} are asked for",
                hint="leave --prompt and --seeds out: they are those of the saved reference",
            )
        return capture
    _require_dense(loading.dry_run(question.reference.model, question.reference.run))
    here = loaded(question.reference, on_progress)
    capture = captured(here, question.requests, on_progress)
    _profile(here, capture.requests[0], question.profile)
    return capture


def _candidate(
    side: Side, reference: Capture, question: Question, on_progress: Progress
) -> Candidate:
    here = loaded(side, on_progress)
    capture = captured(here, reference.requests, on_progress)
    notes = list(unfair(reference.conditions, capture.conditions))
    weights = _weights(here, question.reference, notes)
    answers = one_step(here.modules, reference, on_progress)
    judged = layers(here.dry, here.modules, reference, weights)
    _profile(here, reference.requests[0], question.profile)
    pairs = tuple(map(_pair, reference.trajectories, capture.trajectories))
    figures = _figures(pairs, answers, judged)
    defects = [*_flaws(pairs), *defects_of(weights)]
    return Candidate(
        name=side.name,
        command=generate_command(side, reference.requests[0]),
        truth_lines=capture.truth_lines,
        verdict=judge(question.level, question.thresholds, figures, defects),
        figures=figures,
        pairs=pairs,
        one_step=answers,
        layers=judged,
        cost=capture.cost,
        notes=tuple(notes),
    )


def _weights(here: Loaded, reference: Side, notes: list[str]) -> dict[str, LayerFidelity]:
    """Answer 1, or a note saying why there is none."""
    try:
        dry = loading.dry_run(reference.model, reference.run)
        return weights_answer(here.dry, dry, here.modules)
    except DiffquantError as error:
        notes.append(f"weights are not compared: {error.what}")
        return {}


def _profile(here: Loaded, request: Request, directory: Path | None) -> None:
    """Apart from what is measured: a profiler slows what it watches."""
    if directory is not None:
        with profiled(here.modules, directory / here.side.name):
            follow(here.pipeline, request, lambda step: None)


def _pair(reference: Trajectory, candidate: Trajectory) -> Pair:
    return Pair(
        request=reference.request,
        timesteps=reference.timesteps,
        steps=per_step(tuple(reference.latents), tuple(candidate.latents)),
        likeness=likeness(reference.frames, candidate.frames),
        flaws=candidate.flaws,
        reference_flaws=reference.flaws,
        reference_frames=reference.frames,
        candidate_frames=candidate.frames,
    )


def _figures(
    pairs: Sequence[Pair], answers: Sequence[OneStep], judged: Sequence[Layer]
) -> dict[str, float | None]:
    """By the names of `verdict.FIGURES`."""
    weights = [each.weight.fidelity for each in judged if each.weight is not None]
    return {
        "weight": _worst([None if each is None else each.relative_error for each in weights]),
        "kernel": _worst([each.kernel for each in judged]),
        "one_step": _worst([each.distance.relative_l2 for each in answers]),
        "psnr": fmean(pair.likeness.psnr_db for pair in pairs),
        "mae": fmean(pair.likeness.mae for pair in pairs),
        "cosine": fmean(pair.steps[-1].cosine for pair in pairs),
        "relative_l2": fmean(pair.steps[-1].relative_l2 for pair in pairs),
        "ssim": fmean(pair.likeness.ssim for pair in pairs),
        "ms_ssim": _mean_of([pair.likeness.ms_ssim for pair in pairs]),
        "flicker": _mean_of([pair.likeness.flicker for pair in pairs]),
    }


def _worst(values: Sequence[float | None]) -> float | None:
    """The largest; what is no number is worse than any."""
    known = [value for value in values if value is not None]
    return next((value for value in known if isnan(value)), max(known, default=None))


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _flaws(pairs: Sequence[Pair]) -> Iterator[str]:
    for pair in pairs:
        for flaw in pair.flaws:
            yield f"{flaw} ({pair.request.prompt!r}, seed {pair.request.seeds[0]})"


def _of_reference(reference: Capture) -> Iterator[str]:
    for each in reference.trajectories:
        for flaw in each.flaws:
            where = f"{each.request.prompt!r}, seed {each.request.seeds[0]}"
            yield f"the reference itself: {flaw} ({where})"


def _require_dense(dry: DryRun) -> None:
    """A quantized base proves nothing, unless it was named as the reference's own transformer."""
    named = dry.resolution.components
    for component, plan in dry.plans.items():
        if plan.quantized and not named[component].override:
            raise RunError(
                f"the reference's {component} is quantized itself ({plan.format})",
                hint="--reference-model-path, or --reference-transformer-path, names the BF16 one",
            )
