"""Prove it: one reference, one or more candidates, three answers with numbers, a verdict.

    1  Is the file faithful?       decoded weights against the base's, no forward
    2  Is the kernel faithful?     every layer's kernel against `reference` on captured inputs
    3  Is the model still good?    same noise: latents per step, one-step errors, pictures

The reference runs first and leaves a capture; it is let go before a candidate is loaded. Time and
memory are measured meanwhile, and in further rounds in which the sides take turns.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isnan
from pathlib import Path
from statistics import fmean

from diffquant import loading
from diffquant.compare.asking import generate_command
from diffquant.compare.comparison import Candidate, Comparison, Pair
from diffquant.compare.cost import Cost, joined
from diffquant.compare.judges import Bench
from diffquant.compare.layers import (
    Layer,
    OneStep,
    defects_of,
    layers,
    one_step,
    weights_answer,
)
from diffquant.compare.means import Mean
from diffquant.compare.metrics import likeness, per_step
from diffquant.compare.rounds import further
from diffquant.compare.saved import require_same_base, reused
from diffquant.compare.sides import Loaded, Side, captured, loaded, require_fair, unfair
from diffquant.compare.trajectory import Capture, Progress, Trajectory, follow, save
from diffquant.compare.verdict import judge, limits
from diffquant.errors import DiffquantError, RunError, UsageError
from diffquant.fidelity import LayerFidelity
from diffquant.loading import DryRun
from diffquant.profiling import profiled
from diffquant.run import DEFAULT_SEED, Request

__all__ = ["Candidate", "Comparison", "Layer", "Mean", "OneStep", "Pair", "Side", "compare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is compared and how strictly.

    requests        one per prompt and seed; with a saved reference they may be empty
    settings        what was typed for all of them, held against a saved reference
    seeds           typed ones, held against a saved reference
    saved           a reference captured before, used instead of drawing
    save_reference  where to keep the reference's capture
    profile         where each side leaves a trace and a table of layers, from one more drawing
    repeat          rounds in which time and memory are measured, see `cost`
    """

    reference: Side
    candidates: tuple[Side, ...]
    requests: tuple[Request, ...]
    settings: Request = Request()
    seeds: tuple[int, ...] = ()
    level: str = "smoke"
    thresholds: Mapping[str, float] = field(default_factory=dict)
    saved: Path | None = None
    save_reference: Path | None = None
    profile: Path | None = None
    repeat: int = 1
    command: str = ""

    def __post_init__(self) -> None:
        limits(self.level, self.thresholds)
        if self.repeat < 1:
            raise UsageError(f"--repeat {self.repeat} measures nothing", hint="--repeat 3")
        if self.saved is not None and self.save_reference is not None:
            raise UsageError(
                "a saved reference is not saved again", hint="--reference or --save-reference"
            )


def compare(question: Question, on_progress: Progress = lambda what, done, of: None) -> Comparison:
    """Answer it. Raises UsageError or RunError where the comparison would be unfair."""
    bench = Bench()
    bench.require(question.thresholds)
    reference = _reference(question, on_progress)
    if question.save_reference is not None:
        save(reference, question.save_reference)
    candidates = [
        _candidate(side, reference, question, bench, on_progress) for side in question.candidates
    ]
    costs = _costs(question, reference, candidates, on_progress)
    return Comparison(
        reference=reference.name,
        reference_command=generate_command(question.reference, _shown(question, reference)),
        reference_cost=costs[0],
        reference_truth=reference.truth_lines,
        conditions=reference.conditions,
        candidates=tuple(
            replace(each, cost=cost) for each, cost in zip(candidates, costs[1:], strict=True)
        ),
        unmeasured=bench.unmeasured,
        command=question.command,
        notes=tuple(_notes(question, reference)),
    )


def requests(asked: Request, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Request, ...]:
    """One request per prompt and seed, DEFAULT_SEED where none is named. Raises UsageError where there
    is no prompt."""
    if not prompts:
        raise UsageError("there is no prompt", hint="--prompt 'red apple'")
    return tuple(
        replace(asked, prompt=prompt, seed=seed, num_images_per_prompt=1)
        for prompt in prompts
        for seed in seeds or (DEFAULT_SEED,)
    )


def _reference(question: Question, on_progress: Progress) -> Capture:
    if question.saved is not None:
        return reused(question.saved, question.requests, question.settings, question.seeds)
    _require_dense(loading.dry_run(question.reference.model, question.reference.run))
    here = loaded(question.reference, on_progress)
    capture = captured(here, question.requests, on_progress)
    _profile(here, capture.requests[0], question.profile)
    return capture


def _costs(
    question: Question,
    reference: Capture,
    candidates: Sequence[Candidate],
    on_progress: Progress,
) -> list[Cost]:
    """Of the reference, then of every candidate, all over the same rounds."""
    captured_with = [reference.cost, *(each.cost for each in candidates)]
    if question.repeat == 1:
        return captured_with
    everyone = [question.reference, *question.candidates]
    more = further(everyone, reference.requests[0], question.repeat - 1, on_progress)
    if question.saved is not None:
        # Captured some other day: no round that the others took part in.
        return [joined(later) for later in more]
    return [joined([first, *later]) for first, later in zip(captured_with, more, strict=True)]


def _shown(question: Question, reference: Capture) -> Request:
    """The first drawing as it was typed, so that commands hold no more than that."""
    return question.requests[0] if question.requests else reference.requests[0]


def _candidate(
    side: Side, reference: Capture, question: Question, bench: Bench, on_progress: Progress
) -> Candidate:
    here = loaded(side, on_progress)
    require_fair(reference.conditions, here)
    capture = captured(here, reference.requests, on_progress)
    notes = list(unfair(reference.conditions, capture.conditions))
    weights = _weights(here, reference, question.reference, notes)
    answers = one_step(here.modules, reference, on_progress)
    judged = layers(here.dry, here.modules, reference, weights)
    _profile(here, reference.requests[0], question.profile)
    pairs = tuple(
        _pair(bench, *both)
        for both in zip(reference.trajectories, capture.trajectories, strict=True)
    )
    figures = _figures(pairs, answers, judged)
    defects = [*_flaws(pairs), *defects_of(weights)]
    return Candidate(
        name=side.name,
        command=generate_command(side, _shown(question, reference)),
        truth_lines=capture.truth_lines,
        verdict=judge(question.level, question.thresholds, figures, defects),
        figures=figures,
        pairs=pairs,
        one_step=answers,
        layers=judged,
        cost=capture.cost,
        notes=tuple(notes),
    )


def _weights(
    here: Loaded, captured_with: Capture, reference: Side, notes: list[str]
) -> dict[str, LayerFidelity]:
    """Answer 1, or a note saying why there is none."""
    try:
        dry = loading.dry_run(reference.model, reference.run)
    except DiffquantError as error:
        notes.append(f"weights are not compared: {error.what}")
        return {}
    require_same_base(captured_with, dry)
    try:
        return weights_answer(here.dry, dry, here.modules)
    except DiffquantError as error:
        notes.append(f"weights are not compared: {error.what}")
        return {}


def _profile(here: Loaded, request: Request, directory: Path | None) -> None:
    """Apart from what is measured: a profiler slows what it watches."""
    if directory is not None:
        with profiled(here.modules, directory / here.side.name):
            follow(here.pipeline, request, lambda step: None)


def _pair(bench: Bench, reference: Trajectory, candidate: Trajectory) -> Pair:
    prompt = reference.request.prompt or ""
    return Pair(
        request=reference.request,
        timesteps=reference.timesteps,
        steps=per_step(tuple(reference.latents), tuple(candidate.latents)),
        likeness=likeness(reference.frames, candidate.frames),
        learned=bench.figures(prompt, reference.frames, candidate.frames),
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
        "lpips": _mean_of([pair.learned.get("lpips") for pair in pairs]),
        "image_reward": _mean_of([pair.learned.get("image_reward") for pair in pairs]),
    }


def _worst(values: Sequence[float | None]) -> float | None:
    """The largest; what is no number is worse than any."""
    known = [value for value in values if value is not None]
    return next((value for value in known if isnan(value)), max(known, default=None))


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _flaws(pairs: Sequence[Pair]) -> Iterator[str]:
    """What is wrong with a picture by itself, on either side: two black ones are equal, and worthless."""
    for pair in pairs:
        where = f"({pair.request.prompt!r}, seed {pair.request.seeds[0]})"
        for flaw in pair.reference_flaws:
            yield f"the reference proves nothing: {flaw} {where}"
        for flaw in pair.flaws:
            yield f"{flaw} {where}"


def _notes(question: Question, reference: Capture) -> Iterator[str]:
    if question.saved is not None and question.repeat == 1:
        yield (
            "time and memory of the reference are those of its capture; with --repeat 2 or more "
            "both sides are measured in turns"
        )
    if question.saved is not None and question.profile is not None:
        yield "a saved reference leaves no profile"


def _require_dense(dry: DryRun) -> None:
    """A quantized base proves nothing, unless it was named as the reference's own transformer. Other
    components that a base stores quantized are the same on both sides."""
    for component, source in dry.transformers.items():
        plan = dry.plans[component]
        if plan.quantized and not source.override:
            raise RunError(
                f"the reference's {component} is quantized itself ({plan.format})",
                hint="--reference-model-path, or --reference-transformer-path, names the BF16 one",
            )
