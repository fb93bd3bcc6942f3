"""Where the time of a run goes: a trace for a timeline viewer, and a table of layers.

trace.json    Chrome's trace format: chrome://tracing, Perfetto
layers.txt    every linear: calls, milliseconds and share of all linears, the slowest first
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

TRACE, TABLE = "trace.json", "layers.txt"
#: Before the names of ranges that are layers.
MARK = "layer: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One linear over a run; `milliseconds` of the accelerator where there is one."""

    path: str
    calls: int
    milliseconds: float


@contextmanager
def profiled(modules: Mapping[str, nn.Module], directory: Path) -> Iterator[None]:
    """Watch every linear of the modules and write both files when the context ends.

    Seconds measured meanwhile hold the profiler's own work.
    """
    directory.mkdir(parents=True, exist_ok=True)
    accelerated = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if accelerated else [])]
    with _marked(modules), profile(activities=activities) as watched:
        yield
    watched.export_chrome_trace(str(directory / TRACE))
    table = _table(timings(watched, accelerated=accelerated))
    (directory / TABLE).write_text(table, encoding="utf-8")


def timings(watched: Any, *, accelerated: bool) -> list[Timing]:
    """Of every marked layer, the slowest first."""
    found = [
        Timing(
            path=event.key.removeprefix(MARK),
            calls=event.count,
            milliseconds=(event.device_time_total if accelerated else event.cpu_time_total) / 1000,
        )
        for event in watched.key_averages()
        if event.key.startswith(MARK)
    ]
    return sorted(found, key=lambda each: -each.milliseconds)


@contextmanager
def _marked(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """A named range around every linear's forward."""
    with ExitStack() as hooks:
        for component, module in modules.items():
            for path, linear in module.named_modules():
                if isinstance(linear, nn.Linear):
                    _mark(linear, f"{MARK}{component}.{path}", hooks)
        yield


def _mark(linear: nn.Linear, name: str, hooks: ExitStack) -> None:
    entered: list[Any] = []

    def before(*_: Any) -> None:
        entered.append(record_function(name))
        entered[-1].__enter__()

    def after(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    hooks.callback(linear.register_forward_pre_hook(before).remove)
    hooks.callback(linear.register_forward_hook(after).remove)


def _table(found: list[Timing]) -> str:
    total = sum(each.milliseconds for each in found) or 1.0
    rows = (
        f"{each.milliseconds:12.3f} {100 * each.milliseconds / total:6.1f}% {each.calls:6d}  {each.path}"
        for each in found
    )
    return "\n".join([f"{'milliseconds':>12} {'share':>7} {'calls':>6}  layer", *rows]) + "\n"
