"""Plans, device and where weights live -> how much memory each stage of a run takes, from headers.

load     weights are mapped; what has to be made, by quantizing or casting, is made
encode   text encoders read the prompt
denoise  transformers draw
decode   the VAE makes pixels

Host bytes are those resident in this process, the interpreter and its libraries included; mapped
weights count once they were read. Device bytes are what torch allocates there, its own context not
included.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from diffquant.device import Device
from diffquant.forecast._drawing import Canvas, canvas, decoding_bytes, denoising_bytes
from diffquant.forecast._holdings import (
    COMPUTE_BYTES,
    WIDTHS,
    Holding,
    encoded_bytes,
    holdings,
    recoded_bytes,
    stored_bytes,
)
from diffquant.forecast._keeping import Keeping, keeping
from diffquant.heap import WORTH_GIVING_BACK
from diffquant.kernels import Choice
from diffquant.plan import Plan
from diffquant.residence import ON_DEVICE, Mode, Residence
from diffquant.sources import PipelineFolder

__all__ = [
    "WIDTHS",
    "COMPUTE_BYTES",
    "Canvas",
    "Forecast",
    "Stage",
    "canvas",
    "encoded_bytes",
    "forecast",
    "recoded_bytes",
    "stored_bytes",
]

MB = 10**6
#: Python with torch, diffusers and transformers imported, and what of them only drawing reads.
#: Measured with torch's CPU build; one for accelerators takes more.
LIBRARIES, LIBRARIES_AT_WORK = 395 * MB, 35 * MB
#: Triton's compiler, which torch imports with its own wherever it is installed.
TRITON = 73 * MB
#: Buffers in which CPU kernels decode some rows at a time.
CHUNKS = 24 * MB
#: Float32 values that `reference` holds for each value of the layer it decodes.
WHOLE_LAYERS = 3
#: Of the activations on a host, what the C library keeps when they are freed, if that is not enough
#: to be given back before decoding.
KEPT_FREE = 0.75


@dataclass(frozen=True, slots=True)
class Stage:
    """Peaks in bytes while a stage of the run goes on."""

    name: str
    host: int
    device: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Peaks in bytes, over all stages and of each."""

    stages: tuple[Stage, ...]

    @property
    def host_peak_bytes(self) -> int:
        return max(stage.host for stage in self.stages)

    @property
    def device_peak_bytes(self) -> int:
        return max(stage.device for stage in self.stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What every way of living needs to know: components by what they do, and what work takes."""

    readers: Sequence[Holding]
    drawers: Sequence[Holding]
    decoders: Sequence[Holding]
    residence: Residence
    scratch: int
    denoising: int
    decoding: int
    keeping: Mapping[str, Keeping]

    @property
    def timing(self) -> int:
        """What timing products takes, and what of it is not given back until something else uses it."""
        largest = max((each.timing for each in self.keeping.values()), default=0)
        return largest + CHUNKS if largest else 0

    @property
    def kept_reading(self) -> int:
        return sum(each.kept for name, each in self.keeping.items() if not _draws(name))

    @property
    def kept_drawing(self) -> int:
        return sum(each.kept for name, each in self.keeping.items() if _draws(name))

    @property
    def everyone(self) -> Sequence[Holding]:
        return [*self.readers, *self.drawers, *self.decoders]

    @property
    def working(self) -> int:
        return max((held.working for held in self.everyone), default=0)

    @property
    def kept_free(self) -> int:
        return min(int(KEPT_FREE * self.denoising), WORTH_GIVING_BACK)


def forecast(
    plans: Mapping[str, Plan],
    pipeline: PipelineFolder,
    device: Device,
    *,
    choices: Mapping[str, tuple[Choice, ...]] | None = None,
    residence: Residence = ON_DEVICE,
    drawn: Canvas | None = None,
    compute: int = COMPUTE_BYTES,
    budget: int = 0,
) -> Forecast:
    """Peaks of loading and of drawing once.

    choices  of kernels; without them none decodes whole layers, and nothing stays decoded
    drawn    what is drawn; without it activations count nothing
    compute  bytes of one value of the run's dtype
    budget   of a CPU, bytes for weights that stay decoded: see `diffquant.keeping`
    """
    held = holdings(plans, pipeline, compute)
    run = _Run(
        readers=[each for name, each in held.items() if not _draws(name) and name != "vae"],
        drawers=[each for name, each in held.items() if _draws(name)],
        decoders=[each for name, each in held.items() if name == "vae"],
        residence=residence,
        scratch=_scratch(held, choices or {}, device, drawn.tokens * compute if drawn else 0),
        denoising=max(
            (denoising_bytes(drawn, it, compute) for n, it in held.items() if _draws(n)), default=0
        )
        if drawn
        else 0,
        decoding=decoding_bytes(drawn, compute) if drawn and "vae" in held else 0,
        keeping=keeping(choices or {}, budget, compute) if budget else {},
    )
    ways = _ON_CPU if device.kind == "cpu" else _ON_ACCELERATOR
    besides = TRITON if "triton" in device.packages else 0
    return Forecast(
        stages=tuple(
            replace(stage, host=stage.host + besides)
            for stage in ways[residence.on(device).mode](run)
        )
    )


def _draws(component: str) -> bool:
    return component.startswith(("transformer", "unet"))


def _scratch(
    held: Mapping[str, Holding],
    choices: Mapping[str, tuple[Choice, ...]],
    device: Device,
    column: int,
) -> int:
    """What kernels hold beside weights and activations; `column` is one value of every token, and
    those of a CPU keep a copy of their widest input in an order of their own."""
    whole = any("reference" in choice.kernels for each in choices.values() for choice in each)
    if whole:
        return WHOLE_LAYERS * 4 * max(each.decoded for each in held.values())
    encoded = [each for each in held.values() if each.decoded]
    if device.kind != "cpu" or not encoded:
        return 0
    return CHUNKS + column * max(each.widest for each in encoded)


# Ways of living. What was read from a map stays resident until its pages are given back.


def _mapped_on_cpu(run: _Run) -> list[Stage]:
    made = sum(each.made for each in run.everyone)
    at_work = LIBRARIES + LIBRARIES_AT_WORK + made + run.kept_reading
    encode = at_work + sum(each.total - each.looked_up - each.made for each in run.readers)
    drawers = sum(each.total - each.made for each in run.drawers) + run.kept_drawing
    decoders = sum(each.total - each.made for each in run.decoders)
    denoise = encode + drawers + run.scratch
    return [
        Stage("load", LIBRARIES + made + max(run.working, run.timing), 0),
        Stage("encode", encode + run.timing, 0),
        Stage("denoise", denoise + run.denoising, 0),
        Stage("decode", denoise + decoders + max(run.decoding, run.kept_free), 0),
    ]


def _streamed_on_cpu(run: _Run) -> list[Stage]:
    """Transformers leave behind the blocks that stay and those that were prefetched for a step that
    did not come. What is in no block is read where it is mapped, and goes with its call."""
    base = LIBRARIES + LIBRARIES_AT_WORK
    none = Residence(mode="disk", prefetch=run.residence.prefetch)
    reading = max((_at_work(each, none) for each in run.readers), default=0)
    drawing = sum(sum(each.blocks[: run.residence.resident]) for each in run.drawers)
    at_work = max((_at_work(each, run.residence) for each in run.drawers), default=0)
    behind = sum(sum(_moving(each, run.residence)[: none.prefetch]) for each in run.drawers)
    denoise = base + drawing + run.scratch
    decoders = sum(each.total for each in run.decoders)
    passing = max((each.passing for each in run.drawers), default=0)
    return [
        Stage("load", LIBRARIES + max(run.working, _spilled_at_once(run, passing)), 0),
        Stage("encode", base + reading, 0),
        Stage("denoise", denoise + at_work + run.denoising, 0),
        Stage("decode", denoise + behind + decoders + max(run.decoding, run.kept_free), 0),
    ]


def _resident_on_device(run: _Run) -> list[Stage]:
    total = sum(each.total for each in run.everyone)
    # Each passes through the host: a described one layer by layer, any other as a whole.
    passing = max((each.passing for each in run.everyone), default=0)
    after = LIBRARIES + LIBRARIES_AT_WORK
    return [
        Stage("load", LIBRARIES + passing, total + run.working),
        Stage("encode", after, total),
        Stage("denoise", after, total + run.scratch + run.denoising),
        Stage("decode", after, total + run.decoding),
    ]


def _one_model_on_device(run: _Run) -> list[Stage]:
    """diffusers copies a component back when the next one is needed, so that the host comes to hold
    copies of all of them."""
    host = LIBRARIES + LIBRARIES_AT_WORK + sum(each.total for each in run.everyone)
    made = sum(each.made for each in run.everyone)
    return [
        Stage("load", LIBRARIES + made + run.working, run.working),
        Stage("encode", host, _largest(run.readers)),
        Stage("denoise", host, _largest(run.drawers) + run.scratch + run.denoising),
        Stage("decode", host, _largest(run.decoders) + run.decoding),
    ]


def _blocks_on_device(run: _Run) -> list[Stage]:
    """Transformers by blocks; all else by single layers, the next one on its way."""
    host = LIBRARIES + LIBRARIES_AT_WORK + sum(each.total for each in run.everyone)
    made = sum(each.made for each in run.everyone)
    stays = sum(_stays(each, run.residence) for each in run.drawers)
    at_work = max((_window(each, run.residence) for each in run.drawers), default=0)
    leaves = 2 * max((each.largest for each in [*run.readers, *run.decoders]), default=0)
    return [
        Stage("load", LIBRARIES + made + run.working, stays + run.working),
        Stage("encode", host, stays + leaves),
        Stage("denoise", host, stays + at_work + run.scratch + run.denoising),
        Stage("decode", host, stays + leaves + run.decoding),
    ]


def _blocks_from_disk(run: _Run) -> list[Stage]:
    none = Residence(mode="disk", prefetch=run.residence.prefetch)
    stays = sum(_stays(each, run.residence) for each in run.drawers)
    stays += sum(each.rest for each in [*run.readers, *run.decoders])
    windows = {
        "encode": max((_window(each, none) for each in run.readers), default=0),
        "denoise": max((_window(each, run.residence) for each in run.drawers), default=0),
        "decode": max((_window(each, none) for each in run.decoders), default=0),
    }
    beside = {"encode": 0, "denoise": run.scratch + run.denoising, "decode": run.decoding}
    block = max((each.block for each in run.everyone), default=0)
    passing = max((each.passing for each in run.drawers), default=0)
    host = LIBRARIES + LIBRARIES_AT_WORK + block
    loading = Stage("load", LIBRARIES + _spilled_at_once(run, passing), stays + run.working)
    return [
        loading,
        *(Stage(name, host, stays + size + beside[name]) for name, size in windows.items()),
    ]


_Way = Callable[[_Run], list[Stage]]
_ON_CPU: Mapping[Mode, _Way] = {"none": _mapped_on_cpu, "disk": _streamed_on_cpu}
_ON_ACCELERATOR: Mapping[Mode, _Way] = {
    "none": _resident_on_device,
    "model": _one_model_on_device,
    "layerwise": _blocks_on_device,
    "disk": _blocks_from_disk,
}


def _largest(held: Sequence[Holding]) -> int:
    return max((each.total for each in held), default=0)


def _moving(held: Holding, residence: Residence) -> tuple[int, ...]:
    return held.blocks[residence.resident :]


def _stays(held: Holding, residence: Residence) -> int:
    return held.rest + sum(held.blocks[: residence.resident])


def _at_work(held: Holding, residence: Residence) -> int:
    """Of a component on a CPU: its blocks, or what is in none of them where that is more."""
    return max(_window(held, residence), held.rest - held.looked_up)


def _window(held: Holding, residence: Residence) -> int:
    """The most that neighbours weigh which are there at once: one at work, the others on their way."""
    moving, count = _moving(held, residence), residence.prefetch + 1
    return max((sum(moving[first : first + count]) for first in range(len(moving))), default=0)


def _spilled_at_once(run: _Run, passing: int) -> int:
    """What loading makes goes to the disk layer by layer."""
    return passing if any(each.made for each in run.everyone) else 0
