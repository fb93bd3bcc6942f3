"""Where weights live while a pipeline draws: `--offload` and what becomes of it on a device.

none       on the device, all of them
model      in host memory; one whole component at a time is on the device
layerwise  in host memory; one repeated block at a time is on the device, the next on its way
disk       in their files; a block's pages leave host memory when the block is done
"""

import re
import sys
from dataclasses import dataclass, replace
from typing import Literal, get_args

from diffquant.device import Device
from diffquant.errors import UsageError

Mode = Literal["none", "model", "layerwise", "disk"]
MODES: tuple[Mode, ...] = get_args(Mode)
#: Modes that move one repeated block at a time, so that prefetching and staying mean something.
BLOCKWISE: frozenset[Mode] = frozenset({"layerwise", "disk"})
#: Blocks that are on their way while one works, unless told otherwise.
PREFETCH = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Residence:
    """Where weights live.

    prefetch  blocks brought ahead of the one at work; 0: each is waited for
    resident  blocks of every transformer, the first ones, that are brought once and stay
    """

    mode: Mode = "none"
    prefetch: int = PREFETCH
    resident: int = 0

    @classmethod
    def wished(cls, mode: Mode, prefetch: int | None, resident: int | None) -> "Residence":
        """What was typed. Raises UsageError for counts that are negative or speak of no blocks."""
        for flag, count in (("--offload-prefetch", prefetch), ("--resident-layers", resident)):
            if count is not None and count < 0:
                raise UsageError(f"{flag} {count} is too small", hint=f"{flag} 0")
            if count is not None and mode not in BLOCKWISE:
                raise UsageError(
                    f"{flag} {count} means nothing to --offload {mode}, which moves no single blocks",
                    hint=f"--offload layerwise {flag} {count}",
                )
        ahead = PREFETCH if prefetch is None else prefetch
        return cls(mode=mode, prefetch=ahead, resident=resident or 0)

    def on(self, device: Device, platform: str = sys.platform) -> "Residence":
        """What the wish comes to on the device.

        A CPU computes where weights lie already, so `model` and `layerwise` have nowhere to move them.
        Raises UsageError where `disk` cannot work: it gives memory back in Linux's way.
        """
        if self.mode == "disk" and not platform.startswith("linux"):
            raise UsageError(
                f"--offload disk gives memory back as Linux does, this is {platform}",
                hint="leave it out: weights are mapped, and the system takes back what it needs",
            )
        moves_nothing = device.kind == "cpu" and self.mode in ("model", "layerwise")
        return replace(self, mode="none") if moves_nothing else self

    def note(self, device: Device) -> str | None:
        """What a person should know about what became of the wish; None where it is done."""
        if self.on(device) == self:
            return None
        return (
            f"--offload {self.mode} moves nothing here: it keeps weights in host memory until the "
            "device needs them, and a CPU computes where they lie; --offload disk lets them leave it"
        )


#: Every weight on the device.
ON_DEVICE = Residence()


BUDGET = "--memory-budget"
SIZE = re.compile(r"(\d+(?:\.\d*)?) *([KMGT])(i?)B?", re.IGNORECASE)


def bytes_of(flag: str, text: str) -> int:
    """The bytes that 24GiB, 24GB or 24g say; `i` counts in 1024s. Raises UsageError for no size."""
    found = SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"{flag} {text!r} is no size", hint=f"{flag} 8GiB")
    number, unit, binary = found.groups()
    power = " KMGT".index(unit.upper())
    return int(float(number) * (1024 if binary else 1000) ** power)
