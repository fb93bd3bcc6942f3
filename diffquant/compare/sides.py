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
    Trajectory,
    fingerprint,
    follow,
    recorded,
)
from diffquant.errors import RunError, UsageError
from diffquant.loading import DryRun, RunFlags
from diffquant.preset import for_model
from diffquant.resolve import ModelFlags
from diffquant.run import Request, fill, versions

#: Conditions that make a comparison worthless where they differ; all others are only told.
PINNED = ("pipeline", "scheduler", "attention", "cache", "dtype", "noise")


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
    dry = loading.dry_run(side.model, side.run)
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
    preset = for_model(*here.dry.resolution.model_names)
    defaults = preset.defaults if preset else {}
    filled = [fill(request, here.pipeline, defaults) for request in requests]
    trajectories: list[Trajectory] = []
    with recorded(here.modules) as recorder:
        trajectories.append(_drawn(here, filled, 0, on_progress, recorder.next_step))
    trajectories += [_drawn(here, filled, i, on_progress) for i in range(1, len(filled))]
    capture = Capture(
        name=here.side.name,
        truth_lines=here.dry.truth_lines,
        conditions={},
        cost=_cost(here, trajectories),
        trajectories=tuple(trajectories),
        calls=tuple(recorder.calls),
        blobs=recorder.blobs,
    )
    return replace(
        capture,
        conditions=conditions(here, capture),
        layers=outputs(here.modules, capture.middle_calls(), capture.blobs),
    )


def conditions(here: Loaded, capture: Capture) -> dict[str, str]:
    """What both sides must share, or what a reader should know differs."""
    pipeline = here.pipeline
    scheduler = pipeline.scheduler
    first = capture.trajectories[0].request
    report = loading.report(pipeline)
    return {
        "pipeline": type(pipeline).__name__,
        "scheduler": f"{type(scheduler).__name__} {_digest(dict(scheduler.config))}",
        "attention": ", ".join(sorted(_attention(here.modules))) or "none",
        "cache": ", ".join(sorted(_caches(here.modules))) or "none",
        "dtype": report.dtype,
        "noise": _noise(capture),
        "prompt embeddings": _embeddings(capture),
        "size": f"{first.width}x{first.height}",
        "device": report.device,
        **versions(),
    }


def unfair(reference: Mapping[str, str], candidate: Mapping[str, str]) -> Iterator[str]:
    """Conditions that differ though they should not; raises RunError for one that is pinned."""
    for name in sorted(reference.keys() | candidate.keys()):
        left, right = reference.get(name, "unknown"), candidate.get(name, "unknown")
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
    "dtype": "--dtype is for both sides",
    "scheduler": "--reference-component-path scheduler=SOURCE",
    "noise": "the same --seed, --width and --height; a saved reference is of its own device",
    "pipeline": "both sides need the same base pipeline",
}


def same_request(captured: Request, typed: Request) -> Request:
    """The captured request, where nothing typed contradicts it. Raises UsageError otherwise."""
    for name, value in typed.typed.items():
        there = getattr(captured, name)
        if there != value:
            raise UsageError(
                f"the saved reference was drawn with {name.replace('_', ' ')} {there!r}, not {value!r}",
                hint="leave it out, or capture the reference again with --save-reference",
            )
    return captured


# ---------------------------------------------------------------------------------------- conditions


def _drawn(
    here: Loaded,
    requests: Sequence[Request],
    index: int,
    on_progress: Progress,
    also: Any = None,
) -> Trajectory:
    request = requests[index]
    steps = request.num_inference_steps or 0
    title = f"drawing with {here.side.name} ({index + 1} of {len(requests)})"
    on_progress(title, 0, steps)

    def on_step(step: int) -> None:
        on_progress(title, step + 1, steps)
        if also is not None:
            also(step)

    return follow(here.pipeline, request, on_step)


def _cost(here: Loaded, trajectories: Sequence[Trajectory]) -> Cost:
    later = [seconds for each in trajectories for seconds in each.step_seconds[1:]]
    first = [seconds for each in trajectories for seconds in each.step_seconds]
    return Cost(
        load_seconds=here.seconds,
        step_seconds=median(later or first),
        weight_bytes=weight_bytes(here.modules.values()),
        peak_bytes=here.meter.peak(),
    )


def _attention(modules: Mapping[str, nn.Module]) -> set[str]:
    return {
        " ".join(filter(None, (type(processor).__name__, _backend(processor))))
        for module in modules.values()
        for processor in getattr(module, "attn_processors", {}).values()
    }


def _backend(processor: Any) -> str | None:
    """The attention backend diffusers was told to use; None for torch's own."""
    chosen = getattr(processor, "_attention_backend", None)
    return None if chosen is None else str(getattr(chosen, "value", chosen))


def _caches(modules: Mapping[str, nn.Module]) -> set[str]:
    return {name for name, module in modules.items() if getattr(module, "is_cache_enabled", False)}


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
