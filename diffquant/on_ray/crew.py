"""Painters as actors of Ray: hired, asked, heard, and dismissed."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from diffquant.on_ray.painter import Commission, Drawing, Opened, Painter, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What came of the last thing a member was asked. One that is `lost` is gone with its process or
    its machine; `error` is what it raised itself."""

    member: int
    answer: Opened | Drawing | None = None
    lost: str | None = None
    error: Exception | None = None


class Crew(Protocol):
    """Those who draw. Each does one thing at a time, and what it was asked is heard once."""

    def hire(self) -> int:
        """One more, by number, who begins to load."""
        ...

    def ask(self, member: int, task: Task) -> None: ...

    def hear(self, patience: float) -> Heard | None:
        """The next answer of anyone; None after `patience` seconds of silence."""
        ...

    def dismiss(self, member: int) -> None: ...


class RayCrew:
    """Actors on any machine of the cluster. None is started again by Ray: who hires decides.

    needs  what each asks of its machine, as Ray's options
    """

    def __init__(self, commission: Commission, needs: Mapping[str, Any]) -> None:
        import ray

        options = {"max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD"}
        self._kind = ray.remote(Painter).options(**options, **needs)
        self._commission = commission
        self._numbers = itertools.count(1)
        self._actors: dict[int, Any] = {}
        self._asked: dict[Any, int] = {}

    def hire(self) -> int:
        member = next(self._numbers)
        self._actors[member] = self._kind.remote(self._commission)
        self._asked[self._actors[member].open.remote()] = member
        return member

    def ask(self, member: int, task: Task) -> None:
        self._asked[self._actors[member].draw.remote(task)] = member

    def hear(self, patience: float) -> Heard | None:
        import ray
        from ray.exceptions import RayError, RayTaskError

        done, _ = ray.wait(list(self._asked), timeout=patience)
        if not done:
            return None
        member = self._asked.pop(done[0])
        try:
            return Heard(member=member, answer=ray.get(done[0]))
        except RayTaskError as raised:
            return Heard(member=member, error=raised.cause)
        except RayError as gone:
            return Heard(member=member, lost=_why(gone))

    def dismiss(self, member: int) -> None:
        import ray

        ray.kill(self._actors.pop(member), no_restart=True)


def _why(gone: Exception) -> str:
    """Ray's own reason: the line that says because, else the first."""
    told = [line.strip() for line in str(gone).splitlines() if line.strip()]
    return next((line for line in told if "because" in line), told[0]).partition(". ")[0]
