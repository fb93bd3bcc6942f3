"""One side of a comparison: loaded, drawn with, asked, and let go before the next is loaded."""

import gc
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib import import_module
from statistics import median
from typing import Any

import torch
from torch import nn

from diffquant import loading
from diffquant.compare.cost import Cost, Meter, weight_bytes
from diffquant.compare.layers import outputs
from diffquant.compare.trajectory import (
    Capture,
    Progress,
    Recorder,
    Trajectory,
    fingerprint,
    follow,
    recorded,
)
from diffquant.errors import RunError
from diffquant.loading import DryRun, RunFlags
from diffquant.preset import for_model
from diffquant.resolve import ModelFlags
from diffquant.run import Request, fill, versions

#: Conditions that make a comparison worthless where they differ; all others are only told.
PINNED = ("pipeline", "scheduler", "attention", "cache", "lora", "dtype", "size", "noise")

UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What is loaded for one side, and how it is called in figures and tables."""

    name: str
    model: ModelFlags
    run: RunFlags


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A side in memory."""

    side: Side
    dry: DryRun
    pipeline: Any
    modules: Mapping[str, nn.Module]
    seconds: float
    meter: Meter


def loaded(side: Side, on_progress: Progress) -> Loaded:
    """The side's pipeline; whatever was in memory and is used no more is let go first."""
    dry = _settled(loading.dry_run(side.model, side.run))
    _import_classes(dry)
    _let_go()
    meter = Meter(dry.device.torch_name)
    started = time.perf_counter()
    pipeline = loading.load(
        side.model,
        side.run,
        on_progress=lambda component, done, of: on_progress(f"loading {component}", done, of),
    )
    return Loaded(
        side=side,
        dry=dry,
        pipeline=pipeline,
        modules={name: getattr(pipeline, name) for name in dry.plans},
        seconds=time.perf_counter() - started,
        meter=meter,
    )


def _settled(dry: DryRun) -> DryRun:
    """Plans and choices as they are loaded: questions that only data answers have been answered."""
    plans = {name: loading.settled_plan(dry, name) for name in dry.plans}
    choices = {
        name: dry.choices[name]
        if plan is dry.plans[name]
        else loading.choose_all(plan, dry.device, dry.run, name)
        for name, plan in plans.items()
    }
    return replace(dry, plans=plans, choices=choices)


def _let_go() -> None:
    """Pipelines refer to themselves in circles, so they wait for the collector."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _import_classes(dry: DryRun) -> None:
    """Importing them takes seconds, once per process: it must not count for whoever comes first."""
    index = dry.resolution.pipeline.index or {}
    for library, name in (index[component] for component in dry.resolution.pipeline.components):
        if library in ("diffusers", "transformers"):
            getattr(import_module(library), name, None)
    getattr(import_module("diffusers"), str(index.get("_class_name")), None)


def captured(here: Loaded, requests: Sequence[Request], on_progress: Progress) -> Capture:
    """Draw every request; keep the calls of the first and a sample of every layer's output."""
    filled = [_filled(here, request) for request in requests]
    trajectories: list[Trajectory] = []
    with recorded(_transformers(here)) as recorder:
        trajectories.append(_drawn(here, filled, 0, on_progress, recorder))
    trajectories += [_drawn(here, filled, i, on_progress) for i in range(1, len(filled))]
    capture = Capture(
        name=here.side.name,
        truth_lines=here.dry.truth_lines,
        conditions={},
        cost=_cost(here, trajectories),
        trajectories=tuple(trajectories),
        base=digests(here.dry),
        calls=tuple(recorder.calls),
        blobs=recorder.blobs,
    )
    return replace(
        capture,
        conditions={**standing(here), **_of_drawing(capture)},
        layers=outputs(here.modules, capture.middle_calls(here.modules), capture.blobs),
    )


def _transformers(here: Loaded) -> dict[str, nn.Module]:
    """What is asked the reference's questions: encoders are heard through the drawings alone."""
    sources = here.dry.resolution.components
    return {name: each for name, each in here.modules.items() if sources[name].is_transformer}


def measured(side: Side, request: Request, on_progress: Progress) -> Cost:
    """One more round: loaded, drawn with and let go, watched by nobody."""
    here = loaded(side, on_progress)
    return _cost(here, [_drawn(here, [_filled(here, request)], 0, on_progress)])


def digests(dry: DryRun) -> dict[str, str]:
    """What tells a model from another by headers: the digest of each component's plan."""
    return {name: plan.digest for name, plan in dry.plans.items()}


def standing(here: Loaded) -> dict[str, str]:
    """What both sides must share, or what a reader should know differs, as far as it is known
    before anything is drawn."""
    pipeline, report = here.pipeline, loading.report(here.pipeline)
    scheduler = pipeline.scheduler
    return {
        "pipeline": type(pipeline).__name__,
        "scheduler": f"{type(scheduler).__name__} {_digest(dict(scheduler.config))}",
        "attention": ", ".join(sorted(_attention(here.modules))) or "none",
        "cache": ", ".join(sorted(_caches(here.modules))) or "none",
        "lora": ", ".join(f"{each.name} x {each.scale:g}" for each in report.lora) or "none",
        "dtype": report.dtype,
        "device": report.device,
        **versions(),
    }


def require_fair(reference: Mapping[str, str], here: Loaded) -> None:
    """Raises RunError, before minutes are spent on drawing, where a pinned condition differs."""
    known = standing(here)
    # What is only told is told after drawing, with everything else.
    _ = list(unfair({name: reference.get(name, UNKNOWN) for name in known}, known))


def unfair(reference: Mapping[str, str], candidate: Mapping[str, str]) -> Iterator[str]:
    """Conditions that differ though they should not; raises RunError for one that is pinned."""
    for name in sorted(reference.keys() | candidate.keys()):
        left, right = reference.get(name, UNKNOWN), candidate.get(name, UNKNOWN)
        if left == right:
            continue
        if name in PINNED:
            raise RunError(
                f"the comparison would be unfair: {name} is {left!r} for the reference and "
                f"{right!r} for the candidate",
                hint=HINTS.get(name, "give both sides the same flags"),
            )
        yield f"{name} is {left} for the reference and {right} for the candidate"


HINTS = {
    "lora": "--lora is for both sides",
    "size": "--width, --height and --num-frames are for both sides",
    "attention": "DIFFUSERS_ATTN_BACKEND has to be the same when a reference is captured and used",
    "dtype": "--dtype is for both sides",
    "scheduler": "--reference-component-path scheduler=SOURCE",
    "noise": "the same --seed, --width and --height; a saved reference is of its own device",
    "pipeline": "both sides need the same base pipeline",
}


# ---------------------------------------------------------------------------------------- conditions


def _drawn(
    here: Loaded,
    requests: Sequence[Request],
    index: int,
    on_progress: Progress,
    recorder: Recorder | None = None,
) -> Trajectory:
    request = requests[index]
    steps = request.num_inference_steps or 0
    title = f"drawing with {here.side.name} ({index + 1} of {len(requests)})"
    on_progress(title, 0, steps)

    def on_step(step: int) -> None:
        on_progress(title, step + 1, steps)
        if recorder is not None:
            recorder.step = step + 1

    aside = (lambda: 0.0) if recorder is None else (lambda: recorder.seconds)
    return follow(here.pipeline, request, on_step, aside)


def _filled(here: Loaded, request: Request) -> Request:
    preset = for_model(*here.dry.resolution.model_names)
    return fill(request, here.pipeline, preset.defaults if preset else {})


def _cost(here: Loaded, trajectories: Sequence[Trajectory]) -> Cost:
    later = [seconds for each in trajectories for seconds in each.step_seconds[1:]]
    first = [seconds for each in trajectories for seconds in each.step_seconds]
    return Cost(
        load_seconds=(here.seconds,),
        step_seconds=(median(later or first),),
        weight_bytes=weight_bytes(_transformers(here).values()),
        peak_bytes=here.meter.peak(),
    )


def _attention(modules: Mapping[str, nn.Module]) -> set[str]:
    return {
        f"{type(processor).__name__} {_backend(processor)}"
        for module in modules.values()
        for processor in getattr(module, "attn_processors", {}).values()
    }


def _backend(processor: Any) -> str:
    """The attention backend of the processor's own, else the one diffusers uses for all, which
    DIFFUSERS_ATTN_BACKEND may have named."""
    everywhere = import_module("diffusers.models.attention_dispatch")._AttentionBackendRegistry
    chosen = getattr(processor, "_attention_backend", None) or everywhere._active_backend
    return str(getattr(chosen, "value", chosen))


def _caches(modules: Mapping[str, nn.Module]) -> set[str]:
    return {name for name, module in modules.items() if getattr(module, "is_cache_enabled", False)}


def _of_drawing(capture: Capture) -> dict[str, str]:
    count, _, height, width = capture.trajectories[0].frames.shape
    return {
        "noise": _noise(capture),
        "prompt embeddings": _embeddings(capture),
        "size": f"{width}x{height}" + (f", {count} frames" if count > 1 else ""),
    }


def _noise(capture: Capture) -> str:
    """A digest of the latents the first call was given, and the timesteps."""
    return _digest([_first_inputs(capture, latents=True), capture.trajectories[0].timesteps])


def _embeddings(capture: Capture) -> str:
    return _digest(_first_inputs(capture, latents=False))


def _first_inputs(capture: Capture, *, latents: bool) -> list[str]:
    """Digests of the first call's tensors: the first is the noise, the others speak of the prompt."""
    names = list(_tensors(capture.calls[0].arguments))
    kept = names[:1] if latents else names[1:]
    return [fingerprint(capture.blobs[name]) for name in kept]


def _tensors(packed: Any) -> Iterator[str]:
    """Names of tensors in the order of the arguments."""
    if "tensor" in packed:
        yield packed["tensor"]
    elif "map" in packed:
        for item in packed["map"].values():
            yield from _tensors(item)
    elif "value" not in packed:
        for items in packed.values():
            for item in items:
                yield from _tensors(item)


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
