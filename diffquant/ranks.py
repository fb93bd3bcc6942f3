"""One picture by several processes: how many there are, and which of them this is.

torchrun starts the processes and tells each in its environment who it is. Each has a device of its
own and all weights; what they split is the sequence (ulysses.py).
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffquant import device
from diffquant.device import Device
from diffquant.errors import UsageError

FLAG = "--ulysses-degree"
#: What torchrun sets, and what joining the other processes needs.
RANK, LOCAL_RANK, WORLD_SIZE = "RANK", "LOCAL_RANK", "WORLD_SIZE"
NEEDED = (RANK, LOCAL_RANK, WORLD_SIZE, "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One process of `count`.

    number  among all, from 0; the first alone talks and writes
    local   among those of its machine, which is the number of its device
    """

    number: int = 0
    local: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.number == 0


ALONE = Rank()
#: What a process cannot do for all of them, and why.
CLASHES = {
    "--offload": "moves weights at each process's own pace",
    "--compile": "was not tried with attention that waits for other processes",
    "--save-quantized": "would be written by every process",
    "--input-file": "is drawn faster by one process per device",
    "--device": "names one device, and torchrun gives every process its own",
}


def here(environ: Mapping[str, str] | None = None) -> Rank:
    """This process; alone where nothing like torchrun started it."""
    told = os.environ if environ is None else environ
    if any(name not in told for name in NEEDED):
        return ALONE
    return Rank(number=int(told[RANK]), local=int(told[LOCAL_RANK]), count=int(told[WORLD_SIZE]))


def require_sense(degree: int, typed: Mapping[str, bool]) -> None:
    """Raises UsageError for a degree that is none, and for what does not go with one.

    typed  flags of `CLASHES`, and whether they were
    """
    if degree < 1:
        raise UsageError(f"{FLAG} {degree} is too small", hint=f"{FLAG} 2")
    for flag in (flag for flag, given in typed.items() if given and degree > 1):
        raise UsageError(
            f"{flag} {CLASHES[flag]}, so it does not go with {FLAG} {degree}",
            hint=f"leave {flag} out",
        )


def told(degree: int) -> tuple[str, ...]:
    """`ulysses 2: 2 processes draw one picture`; nothing where it is one."""
    return (f"ulysses {degree}: {degree} processes draw one picture",) if degree > 1 else ()


def launcher(degree: int) -> tuple[str, ...]:
    """What starts a Python program so often, before its name."""
    return ("torchrun", "--nproc-per-node", str(degree))


def require(degree: int, rank: Rank, program: Sequence[str]) -> None:
    """Raises UsageError unless as many processes were started as are to draw one picture.

    program  what they run, as it follows torchrun's own options
    """
    if rank.count == degree:
        return
    if degree == 1:
        raise UsageError(
            f"torchrun started {rank.count} processes, and each would draw the same picture",
            hint=f"{FLAG} {rank.count} lets them draw it together",
        )
    started = "this is one" if rank == ALONE else f"torchrun started {rank.count}"
    raise UsageError(
        f"{FLAG} {degree} needs {degree} processes, {started}",
        hint=shlex.join([*launcher(degree), *program]),
    )


def require_heads(component: str, heads: object, degree: int) -> None:
    """Raises UsageError where attention heads cannot be dealt out evenly.

    heads  what the component's config has for `num_attention_heads`
    """
    if not isinstance(heads, int) or heads % degree == 0:
        return
    fitting = ", ".join(str(other) for other in range(1, heads + 1) if heads % other == 0)
    raise UsageError(
        f"{component} has {heads} attention heads, which {FLAG} {degree} does not divide",
        hint=f"{FLAG} takes one of: {fitting}",
    )


def own_device(named: str | None, rank: Rank) -> Device:
    """The device of this process: of the kind that was named, else of the best kind here.

    Raises UsageError for one that is numbered, and where its machine has fewer devices than processes.
    """
    require_sense(2, {"--device": ":" in (named or "")})
    first = device.probe() if named is None else device.parse(named)
    numbered = first.present and first.torch_name != first.torch_name.partition(":")[0]
    return device.parse(f"{first.kind}:{rank.local}") if numbered else first
