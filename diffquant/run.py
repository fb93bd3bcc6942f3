"""A request and a pipeline -> pictures that are checked, saved and can be drawn again.

B images of one request, image i drawn with seed + i.
"""

import inspect
import itertools
import json
import os
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor, nn

from diffquant import video
from diffquant.errors import NonFiniteError, RunError, UsageError
from diffquant.sound import sounds
from diffquant.video import Film, Sound

METADATA_KEY = "diffquant"
DEFAULT_SEED = 42
DEFAULT_FPS = 16
VIDEO_AXES = 5  # videos are [B, F, 3, H, W], pictures [B, 3, H, W]
MORE_RANGE = (
    "--dtype float32 has the range; or leave that layer as it is: --quantization-ignored-layers NAME, "
    "or a preset that keeps it (diffquant presets)"
)
LONGEST_STEM = 60  # characters of the prompt in a file name

OnStep = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be drawn. None leaves a value to the next source: see `fill`.

    width, height  pixels
    seed           of the first image; image i of the request uses seed + i
    image          paths of the pictures to edit or to start from
    mask_image     path of a picture that is white where `image` is to be painted over
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    seed: int | None = None
    num_images_per_prompt: int | None = None
    max_sequence_length: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    guidance_scale_2: float | None = None
    image: tuple[str, ...] | None = None
    mask_image: str | None = None

    @property
    def typed(self) -> dict[str, Any]:
        """The values that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed per image."""
        first = DEFAULT_SEED if self.seed is None else self.seed
        return tuple(first + index for index in range(self.num_images_per_prompt or 1))


#: Fields that are not arguments of a pipeline's call under their own name.
_OURS = frozenset({"seed"})
#: What some pipelines call a field: those of videos, one that draws sound in time with its frames,
#: and those that follow the depth or the edges of a picture.
_CALLED = {
    "num_images_per_prompt": "num_videos_per_prompt",
    "fps": "frame_rate",
    "image": "control_image",
}


#: Pipelines that take several pictures for a batch of requests with one each.
_ONE_PICTURE = frozenset(
    {
        "FluxControlPipeline",
        "FluxFillPipeline",
        "FluxKontextPipeline",
        "QwenImageEditPipeline",
        "WanImageToVideoPipeline",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one request gave.

    request       as it ran, every value known
    seconds       from the call to the last pixel
    step_seconds  of each denoising step
    videos        the frames of each video, where the pipeline makes videos; there are no images then
    sounds        one for each video, of a pipeline that lets something be heard
    """

    request: Request
    images: tuple[Image.Image, ...]
    seconds: float
    step_seconds: tuple[float, ...]
    record: Mapping[str, Any] = field(default_factory=dict)
    videos: tuple[tuple[Image.Image, ...], ...] = ()
    sounds: tuple[Sound, ...] = ()

    @property
    def films(self) -> tuple[Film, ...]:
        """The videos as they are written."""
        fps = self.request.fps or DEFAULT_FPS
        heard = self.sounds or (None,) * len(self.videos)
        return tuple(
            Film(frames=frames, fps=fps, sound=sound)
            for frames, sound in zip(self.videos, heard, strict=True)
        )


def fill(request: Request, pipeline: Any, defaults: Mapping[str, Any]) -> Request:
    """The request with every open value taken from the preset's `defaults`, else the pipeline's own.

    Raises UsageError for a typed value that this pipeline cannot take.
    """
    accepted = _accepted(pipeline)
    for name in request.typed:
        if name not in accepted:
            raise UsageError(
                f"{_flag(name)} means nothing to a {type(pipeline).__name__}",
                hint=f"it takes {', '.join(_flag(known) for known in sorted(accepted))}",
            )
    _require_images(request, pipeline)
    values = {
        item.name: _first(
            getattr(request, item.name), defaults.get(item.name), accepted.get(item.name)
        )
        for item in fields(Request)
        if item.name in accepted
    }
    return _with_guidance(replace(request, **values), request)


def generate(pipeline: Any, request: Request, on_step: OnStep | None = None) -> Result:
    """Draw the pictures. `on_step(done, of)` is called after every denoising step.

    Raises NonFiniteError where latents, pixels or sound are not finite, naming the step and the
    first layer that went wrong, and RunError for a picture of one colour.
    """
    return generate_together(pipeline, [request], on_step)[0]


def generate_together(
    pipeline: Any, requests: Sequence[Request], on_step: OnStep | None = None
) -> tuple[Result, ...]:
    """Requests that differ in nothing but words and seeds, drawn as one batch: a result each.

    Raises as `generate` does; a batch that goes bad does not say whose fault it was.
    """
    first = requests[0]
    if not all(request.prompt for request in requests):
        raise UsageError("there is no prompt", hint="--prompt 'red apple'")
    steps = first.num_inference_steps or 0
    watch = _Watch(steps, on_step)
    started = time.perf_counter()
    try:
        drawn = _called(pipeline, first, watch, requests[1:])
    except _LatentsWentBad as bad:
        raise NonFiniteError(
            f"latents are not finite after step {bad.step + 1} of {steps}; "
            f"{_blame(pipeline, requests)}",
            hint=MORE_RANGE,
        ) from None
    seconds = time.perf_counter() - started
    pixels, heard = _pixels(pipeline, drawn), sounds(pipeline, drawn)
    for what, values in {"pixels are": (pixels,), "the sound is": _waves(heard)}.items():
        if not _finite(values):
            raise NonFiniteError(
                f"{what} not finite; {_blame(pipeline, requests)}", hint=MORE_RANGE
            )
    for index, picture in enumerate(pixels):
        _require_picture(picture, index)
    shares = pixels.split([len(request.seeds) for request in requests])
    voices = iter(heard)
    return tuple(
        replace(
            _result(request, share, seconds, watch.seconds),
            sounds=tuple(itertools.islice(voices, len(share))),
        )
        for request, share in zip(requests, shares, strict=True)
    )


def _waves(heard: Sequence[Sound]) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(sound.samples) for sound in heard)


def _result(
    request: Request, pixels: Tensor, seconds: float, step_seconds: Sequence[float]
) -> Result:
    height, width = pixels.shape[-2:]
    is_video = pixels.dim() == VIDEO_AXES
    frames = pixels.shape[1] if is_video else request.num_frames
    return Result(
        request=replace(request, height=height, width=width, num_frames=frames),
        images=() if is_video else tuple(map(_image, pixels)),
        videos=tuple(tuple(map(_image, clip)) for clip in pixels) if is_video else (),
        seconds=seconds,
        step_seconds=tuple(step_seconds),
    )


def recorded(result: Result, *, flags: Mapping[str, Any], report: Mapping[str, Any]) -> Result:
    """The result with everything needed to draw it again.

    flags   what was typed about models and the run, by field name
    report  of the loaded pipeline: plans, digests, the choice per layer
    """
    record = {
        "request": result.request.typed,
        "flags": dict(flags),
        "report": dict(report),
        "versions": versions(),
        "seconds": round(result.seconds, 3),
        **({"sound": result.sounds[0].to_json()} if result.sounds else {}),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return replace(result, record=record)


def save(result: Result, output_path: Path, output_file_name: str | None = None) -> list[Path]:
    """Write each picture as PNG, each video as its name's ending says, the record inside; nothing is
    ever overwritten.

    The name is made of prompt and seed unless given; a taken one becomes name-2.png, name-3.png …
    """
    output_path.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for index, seed in enumerate(result.request.seeds):
        name = output_file_name or f"{slug(result.request.prompt or '')}-{seed}"
        record = {**result.record, "image": index, "image_seed": seed}
        if result.videos:
            paths += _write_video(result.films[index], record, output_path / name)
        else:
            paths.append(_write_png(result.images[index], record, output_path / _as_png(name)))
    return paths


def read_metadata(path: Path) -> dict[str, Any]:
    """What `save` wrote into a file. Raises UsageError for one that holds no such record."""
    try:
        text = _record_text(path)
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {str(path)!r}") from error
    except OSError as error:
        raise UsageError(f"{str(path)!r} is not a picture") from error
    if text is None:
        raise UsageError(
            f"{str(path)!r} holds no record of how it was made",
            hint="pictures written by `diffquant generate` do, unless another program rewrote them",
        )
    record: dict[str, Any] = json.loads(text)
    return record


def _record_text(path: Path) -> str | None:
    if path.suffix.lower() in video.WRITERS:
        if not path.exists():
            raise FileNotFoundError(path)
        return video.read_record(path)
    with Image.open(path) as image:
        text: str | None = getattr(image, "text", {}).get(METADATA_KEY)
    return text


def versions() -> dict[str, str]:
    """Versions of what decides the bits of a picture, and the number of threads."""
    from importlib.metadata import PackageNotFoundError, version

    names = ("diffquant", "torch", "diffusers", "transformers")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return {**found, "threads": str(torch.get_num_threads())}


# ------------------------------------------------------------------------------------------ requests


def _accepted(pipeline: Any) -> dict[str, Any]:
    """Fields of a request the pipeline's call takes, with its own default for each."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    known = {item.name for item in fields(Request)}
    accepted = {
        name: None if parameter.default is inspect.Parameter.empty else parameter.default
        for name, parameter in parameters.items()
        if name in known
    }
    fps = {"fps": DEFAULT_FPS} if "num_frames" in accepted else {}
    called = {
        name: parameters[theirs].default
        for name, theirs in _CALLED.items()
        if theirs in parameters and name not in accepted
    }
    return {**fps, **accepted, **called, "seed": DEFAULT_SEED}


def _require_images(request: Request, pipeline: Any) -> None:
    """A pipeline that cannot start without a picture gets one, and one only where it would take
    several for a batch; who paints over needs to know where, though its signature has a default."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    count = len(request.image or ())
    if count > 1 and type(pipeline).__name__ in _ONE_PICTURE:
        raise UsageError(
            f"a {type(pipeline).__name__} starts from one picture, and there are {count}",
            hint=f"{_flag('image')} picture.png",
        )
    for name, what in (("image", "a picture"), ("mask_image", "a mask")):
        if name not in parameters and _CALLED.get(name) in parameters and not request.image:
            raise UsageError(
                f"a {type(pipeline).__name__} follows a picture, and there is none",
                hint=f"{_flag(name)} depth-or-edges.png",
            )
        open_ends = name in parameters and parameters[name].default is inspect.Parameter.empty
        needed = open_ends or (name in parameters and "mask_image" in parameters)
        if needed and not getattr(request, name):
            raise UsageError(
                f"a {type(pipeline).__name__} starts from {what}, and there is none",
                hint=f"{_flag(name)} picture.png",
            )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _with_guidance(filled: Request, typed: Request) -> Request:
    """A negative prompt needs true guidance, and true guidance a negative prompt, if an empty one."""
    if filled.true_cfg_scale is None:
        return filled
    if filled.true_cfg_scale > 1:
        return replace(filled, negative_prompt=filled.negative_prompt or "")
    if typed.negative_prompt:
        raise UsageError(
            f"--negative-prompt has no effect at --true-cfg-scale {filled.true_cfg_scale:g}",
            hint="--true-cfg-scale 4",
        )
    return filled


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# ------------------------------------------------------------------------------------------- watching


class _LatentsWentBad(Exception):
    """Latents are not finite after `step`, counted from 0."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


class _LayerWentBad(Exception):
    """A layer's output is not finite though its inputs are."""


class _Watch:
    """Called by the pipeline after every step: counts, times, and stops where latents go bad.

    The seconds of the first step hold the text encoders' too.
    """

    def __init__(self, steps: int, on_step: OnStep | None) -> None:
        self.steps = steps
        self.on_step = on_step
        self.seconds: list[float] = []
        self._last = time.perf_counter()

    def __call__(
        self, pipeline: Any, step: int, timestep: Any, values: dict[str, Any]
    ) -> dict[str, Any]:
        if not values["latents"].isfinite().all():
            raise _LatentsWentBad(step)
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        if self.on_step is not None:
            self.on_step(step + 1, self.steps)
        return values


def draw(
    pipeline: Any,
    request: Request,
    watch: Callable[..., dict[str, Any]],
    *,
    beside: Sequence[Request] = (),
) -> Tensor:
    """Pixels [B, 3, H, W], or [B, F, 3, H, W] of videos, between 0 and 1, as they come: unchecked.

    watch   diffusers' `callback_on_step_end`: called with pipeline, step, timestep and the latents
    beside  requests of other words and seeds, drawn in the same batch behind this one
    """
    return _pixels(pipeline, _called(pipeline, request, watch, beside))


def _called(
    pipeline: Any, request: Request, watch: Callable[..., dict[str, Any]], beside: Sequence[Request]
) -> Any:
    """What the pipeline's call gives, with arguments as `draw` takes them."""
    accepted = inspect.signature(type(pipeline).__call__).parameters
    arguments = {
        **{name: value for name, value in request.typed.items() if name not in _OURS},
        # On the CPU, so that a seed means the same noise on every device.
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds],
        "callback_on_step_end": watch,
        "output_type": "pt",
        **_opened(request),
        **(_batched([request, *beside]) if beside else {}),
    }
    if request.width and request.height:
        # Kontext scales what was asked for to this area, a megapixel unless told otherwise.
        arguments["max_area"] = request.width * request.height
    for name, theirs in _CALLED.items():
        if name in arguments and name not in accepted:
            arguments[theirs] = arguments.pop(name)
    try:
        with torch.inference_mode():
            return pipeline(**{name: arguments[name] for name in arguments if name in accepted})
    except ValueError as error:
        if not _from_input_check(error):
            raise
        raise UsageError(f"{type(pipeline).__name__} refuses: {error}") from error


def _pixels(pipeline: Any, drawn: Any) -> Tensor:
    made: Tensor | None = getattr(drawn, "images", getattr(drawn, "frames", None))
    if made is None:
        raise RunError(
            f"{type(pipeline).__name__} makes neither pictures nor videos, and only those are saved"
        )
    return made


def _batched(requests: Sequence[Request]) -> dict[str, Any]:
    """Arguments of a batch: one prompt and one generator per picture."""
    alone = [(request, seed) for request in requests for seed in request.seeds]
    negative = [request.negative_prompt for request, _ in alone]
    return {
        "prompt": [request.prompt for request, _ in alone],
        **({"negative_prompt": negative} if negative[0] is not None else {}),
        "num_images_per_prompt": 1,
        "generator": [torch.Generator("cpu").manual_seed(seed) for _, seed in alone],
    }


def _opened(request: Request) -> dict[str, Any]:
    """The pictures of the request: one alone, several as a list."""
    pictures = [_picture(path, "image") for path in request.image or ()]
    opened: dict[str, Any] = {}
    if pictures:
        opened["image"] = pictures[0] if len(pictures) == 1 else pictures
    if request.mask_image is not None:
        opened["mask_image"] = _picture(request.mask_image, "mask_image")
    return opened


def _picture(path: str, name: str) -> Image.Image:
    """As it is meant to be seen: turned as its EXIF says, without transparency."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise UsageError(f"{_flag(name)} {path!r}: there is no such file") from error
    except OSError as error:
        raise UsageError(f"{_flag(name)} {path!r} is not a picture") from error


def _from_input_check(error: ValueError) -> bool:
    """Whether diffusers raised it while it looked at what was asked for."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.name == "check_inputs" for frame in frames)


def _blame(pipeline: Any, requests: Sequence[Request]) -> str:
    """The first layer whose output is not finite though its inputs are, found by drawing again."""
    request, *beside = requests
    if beside:
        return f"{len(requests)} requests were drawn together"
    try:
        with _layers_watched(pipeline):
            draw(pipeline, request, _Watch(request.num_inference_steps or 0, None))
    except _LayerWentBad as bad:
        return f"the first layer to give such values is {str(bad)!r}"
    except _LatentsWentBad:
        return "every layer gives finite values, so the scheduler is to blame"
    return "drawn again, every layer gives finite values"


@contextmanager
def _layers_watched(pipeline: Any) -> Iterator[None]:
    """Raise _LayerWentBad from the first leaf module of any component that goes bad."""
    handles = [
        leaf.register_forward_hook(_alarm(f"{component}.{path}"))
        for component, module in pipeline.components.items()
        if isinstance(module, nn.Module)
        for path, leaf in module.named_modules()
        if not any(True for _ in leaf.children())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _alarm(path: str) -> Callable[[nn.Module, Any, Any], None]:
    def check(module: nn.Module, inputs: Any, output: Any) -> None:
        if not _finite(output) and _finite(inputs):
            raise _LayerWentBad(path)

    return check


def _finite(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_finite(item) for item in value)
    return not isinstance(value, Tensor) or bool(value.isfinite().all())


# ------------------------------------------------------------------------------------------- pictures


def _require_picture(picture: Tensor, index: int) -> None:
    if picture.max() == picture.min():
        raise RunError(
            f"picture {index + 1} has one colour only ({picture.max().item():.3f}) and is not saved",
            hint="compare with --numerics faithful, or look at the weights: diffquant inspect SOURCE",
        )


def _image(picture: Tensor) -> Image.Image:
    """[3, H, W] between 0 and 1 -> 8 bits, rounded exactly as diffusers does."""
    values = picture.permute(1, 2, 0).float().cpu().numpy()
    return Image.fromarray((values * 255).round().astype("uint8"))


def slug(prompt: str) -> str:
    """'A red apple!' -> 'a-red-apple'; letters of every script stay."""
    words = "-".join(re.findall(r"\w+", prompt.lower()))
    return words[:LONGEST_STEM].strip("-") or "picture"


def _as_png(name: str) -> str:
    suffix = Path(name).suffix.lower()
    if suffix in (".jpg", ".jpeg", ".webp", ".bmp", ".tiff", ".gif"):
        raise UsageError(
            f"pictures are written as PNG, not {suffix!r}", hint=f"{Path(name).stem}.png"
        )
    return name if suffix == ".png" else f"{name}.png"


def _write_png(image: Image.Image, record: Mapping[str, Any], wanted: Path) -> Path:
    """Atomic: the name is reserved first, and shows either nothing or the whole picture."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt(METADATA_KEY, json.dumps(record, ensure_ascii=False))
    return _placed(wanted, lambda stream: image.save(stream, "PNG", pnginfo=text))


def _write_video(film: Film, record: Mapping[str, Any], wanted: Path) -> list[Path]:
    """One file, or for a name that ends in .png one picture per frame."""
    kind = video.ending(wanted.name)
    if film.sound is not None and kind not in video.SOUNDING:
        record = {**record, "sound": f"left out: {kind} holds none"}
    if kind == video.FRAMES:
        return [
            _write_png(
                frame, {**record, "frame": index}, wanted.with_stem(f"{wanted.stem}-{index:04}")
            )
            for index, frame in enumerate(film.frames)
        ]
    text = json.dumps({METADATA_KEY: True, **record})
    write, path = video.WRITERS[kind], wanted.with_name(f"{wanted.name.removesuffix(kind)}{kind}")
    return [_placed(path, lambda stream: write(film, text, stream))]


def _placed(wanted: Path, write: Callable[[Any], None]) -> Path:
    """Write to one side, then take the reserved name."""
    path = _reserve(wanted)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as stream:
        write(stream)
    os.chmod(stream.name, path.stat().st_mode)
    os.replace(stream.name, path)
    return path


def _reserve(wanted: Path) -> Path:
    """Create the first free name of wanted, wanted-2, wanted-3 …"""
    for number in itertools.count(1):
        stem = wanted.stem if number == 1 else f"{wanted.stem}-{number}"
        path = wanted.with_name(stem + wanted.suffix)
        try:
            path.open("x").close()
        except FileExistsError:
            continue
        return path
    raise AssertionError("unreachable")
