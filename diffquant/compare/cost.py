"""What a side costs: seconds to load and per step, bytes of weights, peak of memory."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

RESET = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
RESET_PEAK = "5"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one side.

    load_seconds  until the pipeline is ready
    step_seconds  median over all steps but the first of each drawing, which holds the text encoders
    weight_bytes  of the transformers, as they lie in memory
    peak_bytes    of the device where there is one, else of the whole process; None where unknown
    """

    load_seconds: float
    step_seconds: float
    weight_bytes: int
    peak_bytes: int | None


class Meter:
    """The peak of memory since it was made, on an accelerator or, for the CPU, of the process."""

    def __init__(self, device: str) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._known = self._cuda or _reset_peak()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self._cuda:
            return int(torch.cuda.max_memory_allocated())
        return _peak_resident() if self._known else None


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
    try:
        RESET.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _peak_resident() -> int | None:
    lines = STATUS.read_text().splitlines()
    found = next((line for line in lines if line.startswith("VmHWM:")), None)
    return None if found is None else int(found.split()[1]) * 1024
