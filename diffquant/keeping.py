"""`--memory-budget`: which weights stay decoded in memory, where that is faster.

Each distinct product of a model is timed both ways when the model is loaded, with TOKENS rows of
input: decoding at the call, and multiplying what stays decoded. Both are equal bit by bit, so that no
picture depends on a clock. Layers are then kept, those first that gain most per byte, until the budget
is spent. The times of a device, shape and version are remembered in the user's cache directory.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from diffquant.device import Device
from diffquant.kernels import KERNELS, Choice, Spec
from diffquant.kernels._keeping import Kept
from diffquant.linear import Multiply, QuantLinear
from diffquant.plan import Role

Clock = Callable[[], float]

TOKENS, ROUNDS = 1024, 5


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one product: decoded at the call, and kept decoded."""

    decoding: float
    kept: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was kept of a model: of its layers that could be, and bytes of the budget."""

    kept: int
    layers: int
    bytes: int
    budget: int

    def __str__(self) -> str:
        used, budget = (f"{size / 2**20:.0f}" for size in (self.bytes, self.budget))
        return (
            f"{self.kept} of {self.layers} encoded linears kept decoded in {used} of {budget} MiB, "
            f"{self.layers - self.kept} decoded at each call"
        )


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One layer that could be kept: a kernel that keeps for each of its pieces."""

    linear: QuantLinear
    kernels: tuple[str, ...]
    specs: tuple[Spec, ...]

    @property
    def key(self) -> str:
        """What its time depends on, besides the machine."""
        pieces = zip(self.kernels, self.specs, strict=True)
        told = (f"{name} {spec.encoding} {list(spec.shape_NK)}" for name, spec in pieces)
        return f"{' + '.join(told)} {self.linear.weight.dtype}"

    @property
    def bytes(self) -> int:
        cells = sum(spec.shape_NK[0] * spec.shape_NK[1] for spec in self.specs)
        wide = self.linear.weight.dtype == torch.bfloat16
        return cells * (2 if wide else 4)

    def products(self) -> list[Kept]:
        """New ones, which have kept nothing yet."""
        return [
            Kept(KERNELS.load(name).build(spec))
            for name, spec in zip(self.kernels, self.specs, strict=True)
        ]


def keep(
    model: nn.Module,
    choices: Sequence[Choice],
    *,
    budget: int,
    device: Device,
    cache: Path | None = None,
    clock: Clock = perf_counter,
) -> Outcome:
    """Let the layers stay decoded that gain by it, as far as `budget` bytes go.

    cache  the file of remembered times; the user's own unless given
    clock  seconds, for tests
    """
    found = list(_candidates(model, choices))
    times = _timed(found, device, cache or remembered_at(), clock)
    gains = {key: each.decoding - each.kept for key, each in times.items()}
    worth = [each for each in found if gains[each.key] > 0]
    worth.sort(key=lambda each: gains[each.key] / each.bytes, reverse=True)
    kept = spent = 0
    for each in worth:
        if spent + each.bytes <= budget:
            _keep(each)
            kept, spent = kept + 1, spent + each.bytes
    return Outcome(kept=kept, layers=len(found), bytes=spent, budget=budget)


def remembered_at(environ: Mapping[str, str] = os.environ) -> Path:
    """The file of remembered times in the user's cache directory."""
    root = environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "diffquant" / "kernel-times.json"


def _candidates(model: nn.Module, choices: Sequence[Choice]) -> list[_Candidate]:
    linears = {path: each for path, each in model.named_modules() if isinstance(each, QuantLinear)}
    return [
        _Candidate(linears[choice.path], choice.kernels, choice.specs)
        for choice in choices
        if choice.path in linears and all(KERNELS.load(name).keeps for name in choice.kernels)
    ]


def _keep(candidate: _Candidate) -> None:
    linear = candidate.linear
    linear.terms = tuple(
        replace(term, multiply=product)
        for term, product in zip(linear.terms, candidate.products(), strict=True)
    )


def _timed(
    found: Sequence[_Candidate], device: Device, cache: Path, clock: Clock
) -> dict[str, Times]:
    """The times of every distinct layer, remembered or measured now."""
    known = _read(cache)
    machine = f"{device.name} x{torch.get_num_threads()} torch {torch.__version__} diffquant {version('diffquant')}"
    held = known.setdefault(machine, {})
    missing = {each.key: each for each in found if each.key not in held}
    for key, each in missing.items():
        measured = _measured(each, clock)
        held[key] = [measured.decoding, measured.kept]
    if missing:
        _write(known, cache)
    return {each.key: Times(*held[each.key]) for each in found}


def _measured(candidate: _Candidate, clock: Clock) -> Times:
    """The least of interleaved rounds; the first call of each, which decodes, is not counted."""
    linear = candidate.linear
    x_MK = torch.zeros(TOKENS, linear.in_features, dtype=linear.weight.dtype)
    decoding: list[Multiply] = [product.multiply for product in candidate.products()]
    kept: list[Multiply] = [*candidate.products()]
    seconds: list[list[float]] = [[], []]
    with torch.inference_mode():
        for _ in range(ROUNDS + 1):
            for way, taken in zip((decoding, kept), seconds, strict=True):
                start = clock()
                for index, (multiply, spec) in enumerate(zip(way, candidate.specs, strict=True)):
                    multiply(x_MK[:, : spec.shape_NK[1]], _parts(linear, index, spec))
                taken.append(clock() - start)
    return Times(*(min(taken[1:]) for taken in seconds))


def _parts(linear: QuantLinear, index: int, spec: Spec) -> dict[Role, Tensor]:
    return {role: part for role, part in linear.parts(index).items() if role in spec.roles}


def _read(cache: Path) -> dict[str, dict[str, list[float]]]:
    """What is remembered; nothing where there is no such file, or one that cannot be read."""
    with suppress(OSError, ValueError):
        held = json.loads(cache.read_text())
        if isinstance(held, dict):
            return held
    return {}


def _write(known: Mapping[str, Mapping[str, list[float]]], cache: Path) -> None:
    """Whole or not at all; where the directory cannot be written, times are measured again."""
    with suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cache.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(known, indent=1, sort_keys=True))
        unfinished.replace(cache)
