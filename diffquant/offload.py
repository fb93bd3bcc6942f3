"""Weights that come to where they are needed and go again, bit for bit as they were.

A block is one entry of a model's lists of repeated blocks. While it works, the next ones are on
their way, brought by a thread; when it is done, what was brought is let go. Weights are never
copied back: the original stays where it lives, in host memory or in a mapped file.

diffusers' group offloading carries components whose weights are parameters. It is not used for
encoded ones: with a stream, which its prefetching needs, it lets parameters go and keeps buffers,
and codes are buffers; without one it copies every block back to host memory.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch import nn

from diffquant.errors import UsageError
from diffquant.paging import Keep, Mapped, Pages, rehome, tensors_of
from diffquant.residence import Mode, Residence
from diffquant.visiting import STREAMED, OnDevice

#: Of a module that is no block: pages of smaller ones are not worth giving back.
WORTH_GIVING_BACK = 1 << 20


def place(
    pipeline: Any,
    transformers: Mapping[str, nn.Module],
    *,
    device: torch.device,
    residence: Residence,
    keep: Keep | None = None,
) -> Any:
    """The pipeline, ready to draw on `device`, its weights living where `residence` says.

    transformers  the components that `prefetch` and `resident` speak of
    keep          what puts tensors of no file into one, see `paging.Spill`; wanted by `disk`
    """
    return _WAYS[residence.mode](pipeline, transformers, device, residence, keep)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Every entry of the outermost lists of modules, in the order the class names them."""
    found: list[nn.Module] = []
    for child in model.children():
        # Iterated as children, because lists hold None where a model leaves a module out.
        found.extend(child.children() if isinstance(child, nn.ModuleList) else blocks(child))
    return found


def others(model: nn.Module) -> list[nn.Module]:
    """The largest modules that neither are blocks nor hold any: embedders, final layers."""
    found: list[nn.Module] = []
    for child in model.children():
        if not isinstance(child, nn.ModuleList):
            found.extend(others(child) if blocks(child) else [child])
    return found


# ----------------------------------------------------------------------------------------- the modes


def _everything(
    pipeline: Any, _: Mapping[str, nn.Module], device: torch.device, *__: object
) -> Any:
    return pipeline.to(device)


def _model(pipeline: Any, _: Mapping[str, nn.Module], device: torch.device, *__: object) -> Any:
    pipeline.enable_model_cpu_offload(device=device)
    return pipeline


def _layerwise(
    pipeline: Any,
    transformers: Mapping[str, nn.Module],
    device: torch.device,
    residence: Residence,
    _: Keep | None,
) -> Any:
    """Transformers by our streams, which know buffers; all else by diffusers' group offloading."""
    from diffusers.hooks import apply_group_offloading

    for name, model in _models(pipeline).items():
        if name in transformers:
            _stream(model, residence, lambda block: OnDevice(block, device), rest=device)
        else:
            apply_group_offloading(
                model,
                onload_device=device,
                offload_type="leaf_level",
                use_stream=device.type in STREAMED,
                low_cpu_mem_usage=True,
            )
    return pipeline


def _disk(
    pipeline: Any,
    transformers: Mapping[str, nn.Module],
    device: torch.device,
    residence: Residence,
    keep: Keep | None,
) -> Any:
    """Every component by our streams: what no file holds goes to one first."""
    for name, model in _models(pipeline).items():
        stays = residence.resident if name in transformers else 0
        stream_from_disk(model, replace(residence, resident=stays), device, keep)
        _refuse_merging(name, model)
    return pipeline


def stream_from_disk(
    model: nn.Module, residence: Residence, device: torch.device, keep: Keep | None = None
) -> None:
    """One model's blocks from their files, and back to nothing but them. A CPU computes with mapped
    pages, those of all other modules included, an accelerator with copies of them."""

    def movable(block: nn.Module) -> Movable:
        pages = Pages(tensors_of(block))
        return pages if device.type == "cpu" else OnDevice(block, device, pages)

    if keep is not None:
        rehome(model, keep)
    _stream(model, residence, movable, rest=device)
    if device.type == "cpu":
        _give_back_others(model)


_WAYS: Mapping[Mode, Callable[..., Any]] = {
    "none": _everything,
    "model": _model,
    "layerwise": _layerwise,
    "disk": _disk,
}


def _models(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def _refuse_merging(component: str, model: Any) -> None:
    """Merging writes into mapped weights, and what was written goes with their pages."""

    def refused(*_: object, **__: object) -> NoReturn:
        raise UsageError(
            f"weights of {component!r} are streamed from disk, and nothing can be merged into them",
            hint="leave fuse_lora() out, or load without --offload disk",
        )

    for name in ("fuse_lora", "fuse_qkv_projections"):
        if hasattr(model, name):
            setattr(model, name, refused)


# --------------------------------------------------------------------------------------- the streams


class Movable(Protocol):
    """The weights of one block: `bring` may run beside other work, `arrive` and `release` do not."""

    def bring(self) -> None: ...
    def arrive(self) -> None: ...
    def release(self) -> None: ...


class Stream:
    """Moves the blocks of one model in the order they are called in, which it learns.

    The first pass takes the order of the class. A block that was brought and is not next after all
    is let go.
    """

    def __init__(self, moving: Sequence[Movable], prefetch: int) -> None:
        self._moving = moving
        self._prefetch = prefetch
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="diffquant-prefetch")
        self._next = {number: number + 1 for number in range(len(moving) - 1)}
        self._last: int | None = None
        self._coming: dict[int, Future[None]] = {}

    def enter(self, number: int) -> None:
        """Block `number` is about to work: it is here when this returns."""
        if self._last is not None:
            self._next[self._last] = number
        self._last = number
        wanted = self._window(number)
        for other in [other for other in self._coming if other not in wanted]:
            self._let_go(other)
        for other in wanted:
            if other not in self._coming:
                self._coming[other] = self._worker.submit(self._moving[other].bring)
        self._coming[number].result()
        self._moving[number].arrive()

    def leave(self, number: int) -> None:
        """Block `number` is done."""
        self._let_go(number)

    def _let_go(self, number: int) -> None:
        self._coming.pop(number).result()
        self._moving[number].release()

    def _window(self, number: int) -> list[int]:
        """The block at work and those to be brought meanwhile."""
        window = [number]
        while len(window) <= self._prefetch and self._next.get(window[-1], number) not in window:
            window.append(self._next[window[-1]])
        return window


def _stream(
    model: nn.Module,
    residence: Residence,
    movable: Callable[[nn.Module], Movable],
    *,
    rest: torch.device,
) -> None:
    """Streams the blocks after the first `resident` ones; all else goes to `rest` and stays."""
    moving = blocks(model)[residence.resident :]
    streamed = {id(tensor) for block in moving for tensor in tensors_of(block)}
    for tensor in tensors_of(model):
        if id(tensor) not in streamed:
            tensor.data = tensor.data.to(rest)
    stream = Stream([movable(block) for block in moving], residence.prefetch)
    for number, block in enumerate(moving):
        _surround(block, partial(stream.enter, number), partial(stream.leave, number))


def _give_back_others(model: nn.Module) -> None:
    """What is in no block is read where it is mapped; its pages go when its call is done."""
    mapped = Mapped()
    for module in others(model):
        pages = Pages(tensors_of(module), mapped)
        if pages.nbytes >= WORTH_GIVING_BACK:
            _surround(module, pages.arrive, pages.release)


def _surround(module: nn.Module, enter: Callable[[], None], leave: Callable[[], None]) -> None:
    """What calls of the module begin and end with, outside of whatever compiled it: a hook would be
    compiled with the module, once more for each."""
    inner = module._compiled_call_impl or module._call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        enter()
        try:
            return inner(*args, **kwargs)
        finally:
            leave()

    module._compiled_call_impl = call
