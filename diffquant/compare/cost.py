"""What a side costs: seconds to load and per step, bytes of weights, peak of memory.

Everything but the bytes of weights is measured once in every round. In a round each side is loaded,
drawn with and let go; every second round goes backwards, so what drifts (clocks, caches, neighbours)
drifts for all alike. The ratio of two sides is taken within a round, then over rounds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

import torch
from torch import nn

from diffquant.compare.means import Mean, mean
from diffquant.heap import give_back

RESET = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
RESET_PEAK = "5"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one side, one value per round; a round is in `peak_bytes` only where the system tells.

    load_seconds  until the pipeline is ready
    step_seconds  median over the steps of a round but the first of each drawing, which holds the
                  text encoders
    peak_bytes    above what lay there before loading: of the device where there is one, else of
                  the whole process
    weight_bytes  of the transformers, as they lie in memory
    """

    load_seconds: tuple[float, ...]
    step_seconds: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    weight_bytes: int

    @property
    def load(self) -> Mean:
        return mean(self.load_seconds)

    @property
    def step(self) -> Mean:
        return mean(self.step_seconds)

    @property
    def peak(self) -> int | None:
        """Of a middling round: the first holds what every process allocates but once."""
        return median_low(self.peak_bytes) if self.peak_bytes else None


def joined(rounds: Sequence[Cost]) -> Cost:
    """One cost of several rounds; weights weigh the same in all of them."""
    return Cost(
        load_seconds=tuple(seconds for each in rounds for seconds in each.load_seconds),
        step_seconds=tuple(seconds for each in rounds for seconds in each.step_seconds),
        peak_bytes=tuple(count for each in rounds for count in each.peak_bytes),
        weight_bytes=rounds[0].weight_bytes,
    )


def slowdown(ours: Cost, theirs: Cost) -> Mean:
    """Seconds per step over those of the other side, round by round: above 1 is slower."""
    pairs = zip(ours.step_seconds, theirs.step_seconds, strict=True)
    return mean([mine / yours for mine, yours in pairs])


class Meter:
    """The peak of memory since it was made, above what lay there then."""

    def __init__(self, device: str) -> None:
        self._cuda = torch.device(device).type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before: int | None = torch.cuda.memory_allocated()
        else:
            self._before = _resident("VmRSS:") if _reset_peak() else None

    def peak(self) -> tuple[int, ...]:
        """Bytes; nothing where the system does not tell."""
        now = torch.cuda.max_memory_allocated() if self._cuda else _resident("VmHWM:")
        return () if self._before is None or now is None else (max(now - self._before, 0),)


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of all parameters and buffers; a storage that several share counts once."""
    storages = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    }
    return sum(storages.values())


def _reset_peak() -> bool:
    """Linux forgets a process's peak when asked; elsewhere there is nothing to ask."""
    if not RESET.exists():
        return False
    # Freed memory goes back first, or the next side would find it there and seem to need none.
    give_back()
    try:
        RESET.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _resident(field: str) -> int | None:
    lines = STATUS.read_text().splitlines()
    found = next((line for line in lines if line.startswith(field)), None)
    return None if found is None else int(found.split()[1]) * 1024
