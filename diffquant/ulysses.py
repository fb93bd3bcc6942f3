"""One picture over several devices: every process has a part of the sequence (Ulysses).

Linears, norms and rotations work on the process's own tokens; around attention, tokens are exchanged
for heads and back, so that each process attends over the whole sequence with some of the heads. That
is diffusers' context parallelism. Every process holds all weights, encodes the prompt and decodes
the latents; what is split is the work of the transformer.

A linear that quantizes its inputs with one scale for the whole tensor sees a part of it only, so its
scale may be a little other than one process's. Scales of tokens or groups, and stored ones, are not.
"""

import atexit
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional

from diffquant.errors import UsageError
from diffquant.ranks import FLAG, Rank, here, require

#: How processes talk, by the kind of their device. Lengths go through the host wherever tokens do not.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}

#: Classes whose plan in diffusers does not work: tried with 0.42, rotations and masks do not fit parts.
BROKEN = frozenset({"LTX2VideoTransformer3DModel"})

Config = Mapping[str, Any]


def require_split(configs: Mapping[str, Config]) -> None:
    """Raises UsageError for a transformer whose class diffusers has no plan for."""
    import diffusers

    for component, config in configs.items():
        name = str(config.get("_class_name"))
        plan = getattr(getattr(diffusers, name, None), "_cp_plan", None)
        if plan is None or name in BROKEN:
            raise UsageError(
                f"diffusers cannot split the sequence of {component}, a {name}",
                hint=f"leave {FLAG} out",
            )


def join(count: int, device: torch.device) -> None:
    """Meet the other processes, unless the caller's program had them meet before.

    Raises UsageError where they are not `count`, and for a device whose processes cannot talk.
    """
    if device.type not in BACKENDS:
        raise UsageError(
            f"{FLAG} works on {' and '.join(BACKENDS)}, this is {device.type}",
            hint=f"leave {FLAG} out",
        )
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)
    if not dist.is_initialized():
        require(count, here(), sys.argv)
        dist.init_process_group(BACKENDS[device.type])
        atexit.register(_leave)
    require(count, Rank(count=dist.get_world_size()), sys.argv)


def split(transformers: Mapping[str, nn.Module], count: int, device: torch.device) -> None:
    """Let `count` processes share the sequences of every transformer, whatever their lengths."""
    from diffusers import ContextParallelConfig

    mesh = init_device_mesh(device.type, (1, count), mesh_dim_names=("ring", "ulysses"))
    for model in transformers.values():
        parted, gathered = _halves(cast("Mapping[str, Any]", model._cp_plan))
        config = ContextParallelConfig(ulysses_degree=count, ulysses_anything=True, mesh=mesh)
        with _countable(device):
            model.enable_parallelism(config=config, cp_plan=parted)  # type: ignore[operator]
        for path, axis in gathered.items():
            model.get_submodule(path).register_forward_hook(_gather(axis, mesh["ulysses"]))


def _halves(plan: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """What diffusers parts, and the outputs to gather with their axis."""
    outputs = {path: what.gather_dim for path, what in plan.items() if hasattr(what, "gather_dim")}
    return {path: what for path, what in plan.items() if path not in outputs}, outputs


def _gather(axis: int, mesh: DeviceMesh) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A hook that makes the whole of every process's part of an output.

    diffusers' own takes parts of different lengths with NCCL only.
    """

    def whole(module: nn.Module, inputs: Any, part: Tensor) -> Tensor:
        group, count = mesh.get_group(), mesh.size()
        # A program that met with NCCL alone has nothing to send from the host.
        place = "cpu" if "gloo" in dist.get_backend_config(group) else part.device
        length = torch.tensor([part.shape[axis]], device=place)
        lengths = [torch.empty_like(length) for _ in range(count)]
        dist.all_gather(lengths, length, group=group)
        longest = int(max(lengths))
        missing = [0, 0] * (part.dim() - 1 - axis % part.dim()) + [0, longest - part.shape[axis]]
        filled = functional.pad(part, missing).contiguous()
        parts = [torch.empty_like(filled) for _ in range(count)]
        dist.all_gather(parts, filled, group=group)
        kept = zip(parts, lengths, strict=True)
        return torch.cat([each.narrow(axis, 0, int(own)) for each, own in kept], dim=axis)

    return whole


@contextmanager
def _countable(device: torch.device) -> Iterator[None]:
    """diffusers numbers devices modulo their count, and where there is only a CPU that is 0."""
    counted = torch.accelerator.device_count
    if device.type == "cpu":
        torch.accelerator.device_count = lambda: 1
    try:
        yield
    finally:
        torch.accelerator.device_count = counted


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
