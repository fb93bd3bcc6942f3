"""`diffquant doctor`: what is installed, what is here, and which kernels can run, with reasons."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from diffquant import aliases, device
from diffquant.cli import _options, _talk
from diffquant.device import Device
from diffquant.kernels import (
    ANY_ACTIVATION,
    KERNELS,
    WEIGHT_ONLY,
    Kernel,
    Needs,
    Spec,
    _backends,
    refusal,
)
from diffquant.plan import DENSE, ROW_MAJOR, Activation, Encoding, Role

PACKAGES = (
    "diffquant",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "huggingface-hub",
    "flashinfer-python",
    "comfy-kitchen",
    "triton",
)
NUNCHAKU = {
    "none": "not installed",
    "real": "the SVDQuant engine",
    "statistics package": "the statistics package of that name on PyPI, not the SVDQuant engine",
}


@click.command(short_help="Say what is installed and what can run here.")
@_options.JSON
def COMMAND(as_json: bool) -> None:
    """Say what is installed, which devices are here, which kernels can run on them and why others
    cannot, and what became of every SGLANG_* variable."""
    found = _found()
    click.echo(json.dumps(found, indent=2) if as_json else _told(found))


def _found() -> dict[str, Any]:
    here = device.probe_all()
    memory = device.host_memory()
    best = device.probe()
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "nunchaku": NUNCHAKU[device.nunchaku_kind()],
        "host_memory": {"total": memory.total, "available": memory.available},
        "devices": [_device(each, best) for each in here],
        "kernels": {
            name: {each.torch_name: _obstacle(kernel, each) for each in here if not each.obstacle}
            for name, kernel in KERNELS.load_all().items()
        },
        "backends": {
            flag: {
                each.torch_name: _backends.told(flag, each) for each in here if not each.obstacle
            }
            for flag in _backends.FLAGS
        },
        "environment": aliases.heard(os.environ),
    }


def _device(each: Device, best: Device) -> dict[str, Any]:
    return {
        "name": each.torch_name,
        "arch": each.arch,
        "called": each.name,
        "memory": each.memory,
        "obstacle": each.obstacle,
        "chosen": each == best,
    }


def _obstacle(kernel: Kernel, place: Device) -> str | None:
    """Why the kernel can run nothing on the device: what it says to the easiest piece there is."""
    needs = kernel.needs
    spelled = (option.partition("=") for option in sorted(needs.requires))
    options = tuple((key, value) for key, _, value in spelled)
    easiest = Spec(
        encoding=Encoding(min(needs.encodings, default=DENSE.name), options),
        shape_NK=(needs.multiple_of_N, needs.multiple_of_K),
        roles=frozenset({Role.CODES}),
        activation=_easiest_activation(needs),
        layout=min(needs.layouts, default=ROW_MAJOR.name),
    )
    return refusal(kernel, easiest, place)


def _easiest_activation(needs: Needs) -> Activation | None:
    if needs.activations & {WEIGHT_ONLY, ANY_ACTIVATION}:
        return None
    number, granularity, mode, *_ = min(needs.activations).split(":")
    grain = granularity.rstrip("0123456789")
    group = granularity.removeprefix(grain)
    return Activation(
        number=number,
        granularity=grain,  # type: ignore[arg-type]  # as kernels spell it
        mode=mode,  # type: ignore[arg-type]
        group=int(group) if group else None,
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _told(found: dict[str, Any]) -> str:
    memory = found["host_memory"]
    versions = [(name, text or "not installed") for name, text in found["versions"].items()]
    sections: dict[str, list[tuple[str, ...]]] = {
        "versions": [*versions, ("nunchaku", found["nunchaku"])],
        "host memory": [
            ("total", _talk.size(memory["total"])),
            ("available", _talk.size(memory["available"])),
        ],
        "devices": [_device_row(each) for each in found["devices"]],
        "kernels": [
            (name, place, "runs" if reason is None else f"cannot: {reason}")
            for name, places in found["kernels"].items()
            for place, reason in places.items()
        ],
        "backends": [
            (flag, place, answer)
            for flag, places in found["backends"].items()
            for place, answer in places.items()
        ],
        "environment": list(found["environment"].items()) or [("no SGLANG_* variable is set",)],
    }
    return "\n\n".join(f"{title}\n{_talk.table(rows)}" for title, rows in sections.items())


def _device_row(each: dict[str, Any]) -> tuple[str, ...]:
    memory = "memory unknown" if each["memory"] is None else _talk.size(each["memory"])
    state = f"cannot be used: {each['obstacle']}" if each["obstacle"] else "usable"
    return each["name"], each["arch"], each["called"], memory, state + ", default" * each["chosen"]
