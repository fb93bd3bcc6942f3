"""Every step and, when something went wrong, every layer, held to be finite."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from diffquant.heap import WORTH_GIVING_BACK, give_back
from diffquant.run._calling import draw
from diffquant.run._request import Request

OnStep = Callable[[int, int], None]


class LatentsWentBad(Exception):
    """Latents are not finite after `step`, counted from 0."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


class LayerWentBad(Exception):
    """A layer's output is not finite though its inputs are."""


class Watch:
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
            raise LatentsWentBad(step)
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        if step + 1 == self.steps:
            # The autoencoder is next, and takes other shapes.
            give_back(above=WORTH_GIVING_BACK)
        if self.on_step is not None:
            self.on_step(step + 1, self.steps)
        return values


def blame(pipeline: Any, requests: Sequence[Request]) -> str:
    """The first layer whose output is not finite though its inputs are, found by drawing again."""
    request, *beside = requests
    if beside:
        return f"{len(requests)} requests were drawn together"
    try:
        with _layers_watched(pipeline):
            draw(pipeline, request, Watch(request.num_inference_steps or 0, None))
    except LayerWentBad as bad:
        return f"the first layer to give such values is {str(bad)!r}"
    except LatentsWentBad:
        return "every layer gives finite values, so the scheduler is to blame"
    return "drawn again, every layer gives finite values"


@contextmanager
def _layers_watched(pipeline: Any) -> Iterator[None]:
    """Raise LayerWentBad from the first leaf module of any component that goes bad."""
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
        if not finite(output) and finite(inputs):
            raise LayerWentBad(path)

    return check


def finite(value: Any) -> bool:
    """Whether every tensor in it is, however they are nested."""
    if isinstance(value, tuple | list):
        return all(finite(item) for item in value)
    return not isinstance(value, Tensor) or bool(value.isfinite().all())
