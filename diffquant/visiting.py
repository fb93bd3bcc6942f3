"""Weights on a device for as long as they are needed there, as copies; the originals stay as they are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffquant.paging import Pages, spanned, tensors_of

#: Devices that copy on a stream of its own while they compute on another.
STREAMED = ("cuda", "xpu")


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module's weights are on the device, if they are anywhere, until the context ends."""
    if all(tensor.is_meta or tensor.device == device for tensor in tensors_of(module)):
        yield
        return
    visit = OnDevice(module, device)
    visit.bring()
    visit.arrive()
    try:
        yield
    finally:
        visit.release()


class OnDevice:
    """Copies of a block's tensors on a device while the block works; strides are kept.

    pages  of the tensors, which leave host memory once they were copied; None: they stay
    """

    def __init__(
        self, block: nn.Module, device: torch.device, pages: "Pages | None" = None
    ) -> None:
        self._block = block
        self._device = device
        self._pages = pages
        self._side = torch.Stream(device) if device.type in STREAMED else None
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._homes: list[tuple[Tensor, Tensor]] = []

    def bring(self) -> None:
        # Asked for now and not before: a LoRA may have come since.
        found = tensors_of(self._block)
        if self._side is None:
            self._copies = [(tensor, _copied(tensor.data, self._device)) for tensor in found]
        else:
            with self._side:
                self._copies = [(tensor, _copied(tensor.data, self._device)) for tensor in found]
            self._side.synchronize()
        if self._pages is not None:
            self._pages.release()

    def arrive(self) -> None:
        for tensor, copy in self._copies:
            if self._side is not None:
                # The block's work may outlast this call on the device, and so must the memory.
                copy.record_stream(torch.accelerator.current_stream(self._device))
            self._homes.append((tensor, tensor.data))
            tensor.data = copy
        self._copies = []

    def release(self) -> None:
        for tensor, home in self._homes:
            tensor.data = home
        self._homes, self._copies = [], []


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device with its strides, whatever they are: all it spans is copied."""
    moved = spanned(tensor).to(device, non_blocking=device.type in STREAMED, copy=True)
    return moved.as_strided(tensor.shape, tensor.stride())
