"""What one side of a comparison did: latents after every step, pictures, and every call of its
transformers, so that the other side can be asked the same questions later.

The two sides are never in memory together: a capture holds no module, and can be a file. Calls are
kept of the first run only; tensors that several calls share are kept once.

    capture.json        (metadata) everything that is no tensor
    run0.latents        [S, ...] after each of S steps
    run0.frames         [F, 3, H, W] uint8
    blob0, blob1 …      what the transformers were given and what they answered
    layer.PATH          a sample of what the layer gave in the middle of the first run
"""

import hashlib
import inspect
import json
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffquant.compare.cost import Cost
from diffquant.compare.metrics import as_frames, flaw
from diffquant.errors import RunError, UsageError
from diffquant.run import Request, draw

METADATA_KEY = "diffquant.capture"
VERSION = "2"
STEP_ENDED = "callback_on_step_end"
#: Values of each layer's output that a capture keeps.
SAMPLE = 4096

#: what is being done, done, of
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One drawing: a prompt and a seed.

    timesteps     as the scheduler counts them, one per step
    latents       [S, ...] in the pipeline's dtype
    frames        [F, 3, H, W] uint8; F = 1 for pictures
    flaws         what is wrong with it by itself
    step_seconds  the first holds the text encoders' time too
    """

    request: Request
    timesteps: tuple[float, ...]
    latents: Tensor
    frames: Tensor
    flaws: tuple[str, ...]
    seconds: float
    step_seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One question to a transformer: arguments as JSON whose tensors are names in `blobs`."""

    component: str
    step: int
    arguments: Any
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """One side, without its modules.

    conditions  what has to be equal for a comparison to be fair, by name
    base        digest of each component's plan, to know the model again
    """

    name: str
    truth_lines: tuple[str, ...]
    conditions: Mapping[str, str]
    cost: Cost
    trajectories: tuple[Trajectory, ...]
    base: Mapping[str, str] = field(default_factory=dict)
    calls: tuple[Call, ...] = ()
    blobs: Mapping[str, Tensor] = field(default_factory=dict)
    layers: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def requests(self) -> tuple[Request, ...]:
        return tuple(each.request for each in self.trajectories)

    def middle_calls(self, components: Container[str]) -> tuple[Call, ...]:
        """One call of each of the components, from the middle of those it got."""
        by_component: dict[str, list[Call]] = {}
        for call in self.calls:
            if call.component in components:
                by_component.setdefault(call.component, []).append(call)
        return tuple(calls[len(calls) // 2] for calls in by_component.values())


def follow(
    pipeline: Any,
    request: Request,
    on_step: Callable[[int], None],
    aside: Callable[[], float] = lambda: 0.0,
) -> Trajectory:
    """Run the pipeline for one seed and keep what it passed through.

    aside  seconds spent so far on watching, which are not the pipeline's

    Raises UsageError for a pipeline that does not tell when a step ends.
    """
    if STEP_ENDED not in inspect.signature(type(pipeline).__call__).parameters:
        raise UsageError(
            f"a {type(pipeline).__name__} does not tell when a step ends ({STEP_ENDED})"
        )
    watch = _Watch(on_step, aside)
    started = time.perf_counter()
    pixels = draw(pipeline, request, watch)
    seconds = time.perf_counter() - started
    frames = as_frames(pixels)
    return Trajectory(
        request=request,
        timesteps=tuple(watch.timesteps),
        latents=torch.stack(watch.latents),
        frames=frames,
        flaws=tuple(_flaws(watch.latents, pixels, frames)),
        seconds=seconds,
        step_seconds=tuple(watch.seconds),
    )


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator["Recorder"]:
    """Every call of the modules while the context lasts, by component name."""
    recorder = Recorder()
    handles = [
        module.register_forward_hook(recorder.hook(component), with_kwargs=True)
        for component, module in modules.items()
    ]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


class Recorder:
    """Calls, and the distinct tensors in them, on the CPU; `seconds` is what keeping them took."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.blobs: dict[str, Tensor] = {}
        self.step = 0
        self.seconds = 0.0
        self._names: dict[tuple[Any, ...], str] = {}

    def hook(self, component: str) -> Callable[..., None]:
        def record(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            _finished()
            started = time.perf_counter()
            self.calls.append(
                Call(
                    component=component,
                    step=self.step,
                    arguments=self._packed([list(args), kwargs]),
                    output=self._kept(answer(output)),
                )
            )
            self.seconds += time.perf_counter() - started

        return record

    def _packed(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"tensor": self._kept(value), "device": value.device.type != "cpu"}
        if isinstance(value, Mapping):
            return {"map": {str(key): self._packed(item) for key, item in value.items()}}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [self._packed(item) for item in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        raise RunError(
            f"a transformer is called with a {type(value).__name__}, which no capture can keep"
        )

    def _kept(self, tensor: Tensor) -> str:
        """The name of the tensor's copy; equal tensors share one."""
        # `contiguous` leaves a stride of zero where it makes no difference, and bytes need one of one.
        copy = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        key = (fingerprint(copy), copy.dtype, copy.shape)
        if key not in self._names:
            self._names[key] = f"blob{len(self._names)}"
            self.blobs[self._names[key]] = copy
        return self._names[key]


def ask(module: nn.Module, call: Call, blobs: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """What the module answers to a kept call."""
    args, kwargs = _unpacked(call.arguments, blobs, device)
    with torch.inference_mode():
        return answer(module(*args, **kwargs))


def answer(output: Any) -> Tensor:
    """The one tensor a transformer gives, however it wraps it."""
    if isinstance(output, Tensor):
        return output
    first = output[0]
    return torch.stack(list(first)) if isinstance(first, list | tuple) else first


def fingerprint(tensor: Tensor) -> str:
    """SHA-256 of a contiguous CPU tensor's bytes."""
    return hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def sampled(tensor: Tensor) -> Tensor:
    """At most SAMPLE values, evenly spread and always the same, as float32 on the CPU."""
    flat = tensor.detach().flatten()
    step = max(1, -(-flat.numel() // SAMPLE))
    return flat[::step].to("cpu", torch.float32)


# ------------------------------------------------------------------------------------------ drawing


class _Watch:
    """Called by the pipeline after every step."""

    def __init__(self, on_step: Callable[[int], None], aside: Callable[[], float]) -> None:
        self.on_step = on_step
        self.aside = aside
        self.latents: list[Tensor] = []
        self.timesteps: list[float] = []
        self.seconds: list[float] = []
        self._last = time.perf_counter() - aside()

    def __call__(
        self, pipeline: Any, step: int, timestep: Any, values: dict[str, Any]
    ) -> dict[str, Any]:
        self.latents.append(values["latents"].detach().to("cpu", copy=True))
        self.timesteps.append(float(timestep))
        now = time.perf_counter() - self.aside()
        self.seconds.append(now - self._last)
        self._last = now
        self.on_step(step)
        return values


def _flaws(latents: Sequence[Tensor], pixels: Tensor, frames: Tensor) -> Iterator[str]:
    """What is wrong with one drawing by itself, the earliest cause first."""
    bad = next((i for i, each in enumerate(latents, 1) if not each.isfinite().all()), None)
    if bad is not None:
        yield f"latents are not finite from step {bad} of {len(latents)}"
    elif not pixels.isfinite().all():
        yield "pixels are not finite"
    else:
        found = Counter(each for each in map(flaw, frames) if each is not None)
        # Videos may begin in black: what most frames show is what the video is.
        for each, count in found.items():
            if 2 * count > len(frames):
                yield f"{_shown(count, len(frames))} {each}"


def _shown(count: int, of: int) -> str:
    if of == 1:
        return "the picture is"
    return "every frame is" if count == of else f"{count} of {of} frames are"


def _finished() -> None:
    """Wait for the accelerator, whose work would count as ours."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _unpacked(packed: Any, blobs: Mapping[str, Tensor], device: torch.device) -> Any:
    ((kind, value),) = ((key, item) for key, item in packed.items() if key != "device")
    if kind == "tensor":
        return blobs[value].to(device) if packed["device"] else blobs[value].clone()
    if kind == "map":
        return {key: _unpacked(item, blobs, device) for key, item in value.items()}
    if kind in ("list", "tuple"):
        items = [_unpacked(item, blobs, device) for item in value]
        return items if kind == "list" else tuple(items)
    return value


# -------------------------------------------------------------------------------------------- files


def save(capture: Capture, path: Path) -> None:
    """Write a capture as one safetensors file."""
    from safetensors.torch import save_file

    tensors = dict(capture.blobs)
    for index, each in enumerate(capture.trajectories):
        tensors[f"run{index}.latents"] = each.latents.contiguous()
        tensors[f"run{index}.frames"] = each.frames.contiguous()
    tensors |= {f"layer.{name}": value.clone() for name, value in capture.layers.items()}
    told = {
        "version": VERSION,
        "name": capture.name,
        "truth_lines": capture.truth_lines,
        "conditions": dict(capture.conditions),
        "cost": asdict(capture.cost),
        "base": dict(capture.base),
        "trajectories": [_told(each) for each in capture.trajectories],
        "calls": [asdict(call) for call in capture.calls],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        save_file(tensors, partial, metadata={METADATA_KEY: json.dumps(told)})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> Capture:
    """A capture that `save` wrote. Raises UsageError for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()} if text else {}
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {str(path)!r}") from error
    except SafetensorError as error:
        raise UsageError(f"{str(path)!r} is not a safetensors file: {error}") from error
    if text is None:
        raise UsageError(
            f"{str(path)!r} holds no captured reference",
            hint="diffquant compare --save-reference FILE writes one",
        )
    told = json.loads(text)
    if told["version"] != VERSION:
        raise UsageError(
            f"{str(path)!r} was captured by another version of diffquant "
            f"(form {told['version']}, this one reads {VERSION})",
            hint="diffquant compare --save-reference FILE captures it again",
        )
    return Capture(
        name=told["name"],
        truth_lines=tuple(told["truth_lines"]),
        conditions=told["conditions"],
        cost=Cost(**{name: _as_typed(item) for name, item in told["cost"].items()}),
        base=told["base"],
        trajectories=tuple(
            _trajectory(each, index, tensors) for index, each in enumerate(told["trajectories"])
        ),
        calls=tuple(Call(**call) for call in told["calls"]),
        blobs={name: value for name, value in tensors.items() if name.startswith("blob")},
        layers={
            name.removeprefix("layer."): value
            for name, value in tensors.items()
            if name.startswith("layer.")
        },
    )


def _told(trajectory: Trajectory) -> dict[str, Any]:
    return {
        "request": trajectory.request.typed,
        "timesteps": trajectory.timesteps,
        "flaws": trajectory.flaws,
        "seconds": trajectory.seconds,
        "step_seconds": trajectory.step_seconds,
    }


def _trajectory(told: Mapping[str, Any], index: int, tensors: Mapping[str, Tensor]) -> Trajectory:
    return Trajectory(
        request=Request(**{name: _as_typed(item) for name, item in told["request"].items()}),
        timesteps=tuple(told["timesteps"]),
        latents=tensors[f"run{index}.latents"],
        frames=tensors[f"run{index}.frames"],
        flaws=tuple(told["flaws"]),
        seconds=told["seconds"],
        step_seconds=tuple(told["step_seconds"]),
    )


def _as_typed(value: Any) -> Any:
    """JSON has no tuples."""
    return tuple(value) if isinstance(value, list) else value
