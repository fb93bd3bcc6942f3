"""Where a model is to run: kind, architecture, memory, installed packages.

What is here is learned from drivers and the file system, never from torch: that keeps `plan` and
`doctor` light, and tells "no GPU" from "a torch that cannot drive the GPU". A device may also be
named by its architecture (`sm120`) or as on its box (`rtx4090`) to ask what would happen there.
"""

import ctypes
import importlib.util
import os
import platform
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from diffquant.errors import UsageError, meant

Kind = Literal["cpu", "cuda", "rocm", "mps", "ascend", "xpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device.

    arch      sm89, gfx942, ascend-a2 …; the machine's (x86_64, arm64) for cpu and mps
    sm        CUDA compute capability as major * 10 + minor, None elsewhere
    index     which of its kind
    memory    bytes in all, as far as this process may use them; None: unknown
    packages  installed distributions, canonical name -> version
    present   False: only named, for a dry run
    obstacle  why a device that is here cannot be used, None when it can
    """

    kind: Kind
    arch: str
    name: str
    sm: int | None = None
    index: int = 0
    memory: int | None = None
    packages: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False)
    present: bool = True
    obstacle: str | None = None

    @property
    def torch_name(self) -> str:
        """What torch calls it: cpu, mps, cuda:0 (ROCm too), xpu:0, npu:0."""
        word = {"rocm": "cuda", "ascend": "npu"}.get(self.kind, self.kind)
        return word if self.kind in ("cpu", "mps") else f"{word}:{self.index}"


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes this process may use: the smaller of the machine's and its cgroup's."""

    total: int
    available: int


#: CUDA compute capabilities a person may name.
CAPABILITIES = (70, 72, 75, 80, 86, 87, 89, 90, 100, 101, 103, 110, 120, 121)

#: Architectures `--device` takes for a dry run -> kind and compute capability.
ARCHITECTURES: dict[str, tuple[Kind, int | None]] = {
    **{f"sm{sm}": ("cuda", sm) for sm in CAPABILITIES},
    "gfx90a": ("rocm", None),
    "gfx942": ("rocm", None),
    "gfx950": ("rocm", None),
    "gfx1100": ("rocm", None),
    "gfx1201": ("rocm", None),
    "ascend-a2": ("ascend", None),
    "ascend-a3": ("ascend", None),
    "ascend-a5": ("ascend", None),
}

GPUS = Path(__file__).with_name("gpus.toml")
#: What makers write before a name that `gpus.toml` has.
_MAKERS = re.compile(r"^(nvidia|tesla|geforce|quadro|jetson|amd|instinct|radeon|rtx|rx)")
_ROOT = Path("/")


def probe() -> Device:
    """The best device here that the installed torch can drive; the CPU when there is no other."""
    return next(device for device in probe_all() if device.obstacle is None)


def probe_all() -> tuple[Device, ...]:
    """Every device here, best kind first and the CPU last, also those with an obstacle."""
    return tuple(device for look in _PROBES for device in look())


def parse(text: str) -> Device:
    """What `--device` names: a kind, a kind with an index, or for a dry run an architecture or a GPU.

    Raises UsageError when the name is unknown, or a kind has no usable device here.
    """
    word = text.strip().lower().replace("sm_", "sm")
    if word in ARCHITECTURES:
        return _absent(word, name=word)
    gpus = _gpus()
    if (gpu := gpus.get(_unbranded(word))) is not None:
        return _absent(gpu["arch"], name=text.strip(), memory=gpu.get("memory", 0) * 2**30)
    asked, _, number = word.partition(":")
    if asked not in _KINDS or not re.fullmatch(r"(:\d+)?", word[len(asked) :]):
        # A list of every GPU would hide the rest, so they are named only where one is near.
        known = (*_KINDS, *ARCHITECTURES, *(gpus if re.search(r"\d", word) else ()))
        raise UsageError(f"no device is called {text!r}", hint=meant(_unbranded(word), known))
    return _present(asked, int(number or 0))


def installed_packages() -> dict[str, str]:
    """Installed distributions: canonical name (lower case, dashes) -> version; imports nothing.

    Reads the names of metadata directories only, which costs one listing per entry of `sys.path`.
    A package called nunchaku counts only when it is the real one.
    """
    found: dict[str, str] = {}
    for folder in map(Path, sys.path):
        if folder.is_dir():
            for entry in folder.glob("*.dist-info"):
                name, _, version = entry.stem.partition("-")
                found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)
    if nunchaku_kind() != "real":
        found.pop("nunchaku", None)
    return found


def nunchaku_kind() -> Literal["none", "statistics package", "real"]:
    """Which package called nunchaku is installed, told from its files, without importing it.

    The one on PyPI is about piece-wise linear statistics. A checkout of the real one whose
    extension was not compiled counts as none: it cannot run.
    """
    spec = importlib.util.find_spec("nunchaku")
    if spec is None or not spec.submodule_search_locations:
        return "none"
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / "models" / "linear.py").is_file():
        return "statistics package"
    compiled = any(path.suffix in (".so", ".pyd") for path in folder.glob("_C*"))
    return "real" if compiled else "none"


def host_memory(root: Path = _ROOT) -> HostMemory:
    """Bytes of host memory this process may use, in all and now. `root` holds /proc and /sys."""
    meminfo = _meminfo(root)
    total, available = meminfo["MemTotal"], meminfo["MemAvailable"]
    for limit, used in _cgroup_limits(root):
        total = min(total, limit)
        available = min(available, max(limit - used, 0))
    return HostMemory(total, available)


# Looking for devices, one function per kind.


def _cuda_devices() -> tuple[Device, ...]:
    driver = _library("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    count = ctypes.c_int()
    if driver is None or driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_cuda_device(driver, index) for index in range(count.value))


def _cuda_device(driver: ctypes.CDLL, index: int) -> Device:
    handle, memory = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(handle), index)
    driver.cuDeviceGetName(name, len(name), handle)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    # 75 and 76 are CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    major, minor = (_cuda_attribute(driver, handle, attribute) for attribute in (75, 76))
    sm = 10 * major + minor
    return Device(
        kind="cuda",
        arch=f"sm{sm}",
        name=name.value.decode(errors="replace"),
        sm=sm,
        index=index,
        memory=memory.value,
        packages=installed_packages(),
        obstacle=_torch_obstacle("cuda"),
    )


def _cuda_attribute(driver: ctypes.CDLL, handle: ctypes.c_int, attribute: int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
    return value.value


def _rocm_devices(root: Path = _ROOT) -> tuple[Device, ...]:
    """From the kernel driver's topology: GPUs are the nodes that have SIMD units."""
    nodes = sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("*"), key=lambda p: p.name)
    gpus = [node for node in nodes if _properties(node).get("simd_count")]
    return tuple(_rocm_device(node, index) for index, node in enumerate(gpus))


def _rocm_device(node: Path, index: int) -> Device:
    # 90402 is gfx942 and 90010 gfx90a: decimal pairs of which the last two are hexadecimal digits
    version = _properties(node).get("gfx_target_version", 0)
    arch = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
    banks = (_properties(bank) for bank in (node / "mem_banks").glob("*"))
    return Device(
        kind="rocm",
        arch=arch,
        name=_text(node / "name").strip() or arch,
        index=index,
        memory=sum(bank.get("size_in_bytes", 0) for bank in banks) or None,
        packages=installed_packages(),
        obstacle=_torch_obstacle("hip"),
    )


def _ascend_devices(root: Path = _ROOT) -> tuple[Device, ...]:
    count = len(list((root / "dev").glob("davinci[0-9]*")))
    if not count:
        return ()
    name, packages = _ascend_name(), installed_packages()
    arch = next((arch for prefix, arch in _ASCEND_NAMES if name.startswith(prefix)), "ascend")
    obstacle = None if "torch-npu" in packages else "torch needs the package torch-npu to drive it"
    return tuple(
        Device(
            kind="ascend",
            arch=arch,
            name=name,
            index=index,
            packages=packages,
            obstacle=obstacle,
        )
        for index in range(count)
    )


_ASCEND_NAMES = (
    ("Ascend910_93", "ascend-a3"),
    ("Ascend910B", "ascend-a2"),
    ("Ascend910_95", "ascend-a5"),
    ("Ascend950", "ascend-a5"),
)


def _ascend_name() -> str:
    library = _library("libascendcl.so")
    if library is None:
        return "Ascend"
    library.aclrtGetSocName.restype = ctypes.c_char_p
    return (library.aclrtGetSocName() or b"Ascend").decode()


def _xpu_devices() -> tuple[Device, ...]:
    """One device when torch was built for Intel GPUs and the Level Zero loader is here.

    Any Intel display adapter would look like one otherwise.
    """
    if _torch_builds().get("xpu") is None or _library("libze_loader.so.1") is None:
        return ()
    return (Device(kind="xpu", arch="xpu", name="Intel GPU", packages=installed_packages()),)


def _mps_devices() -> tuple[Device, ...]:
    if (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        return ()
    return (
        Device(
            kind="mps",
            arch="arm64",
            name="Apple GPU",
            memory=host_memory().total,
            packages=installed_packages(),
        ),
    )


def _cpu_devices() -> tuple[Device, ...]:
    return (
        Device(
            kind="cpu",
            arch=platform.machine().lower(),
            name=_cpu_name(),
            memory=host_memory().total,
            packages=installed_packages(),
        ),
    )


def _cpu_name(root: Path = _ROOT) -> str:
    found = re.search(r"^model name\s*: (.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


_PROBES: tuple[Callable[[], tuple[Device, ...]], ...] = (
    _cuda_devices,
    _rocm_devices,
    _ascend_devices,
    _xpu_devices,
    _mps_devices,
    _cpu_devices,
)
_KINDS = ("cpu", "cuda", "rocm", "mps", "ascend", "xpu")


# Naming a device that is here.


def _present(kind: str, index: int) -> Device:
    devices = probe_all()
    same = [device for device in devices if device.kind == kind]
    if index >= len(same):
        names = ", ".join(f"{device.kind} ({device.name})" for device in devices)
        raise UsageError(
            f"there is no device '{kind}:{index}' here, there is {names}",
            hint="leave `--device` out, or name an architecture for a dry run: `--device sm120`",
        )
    if same[index].obstacle is not None:
        raise UsageError(
            f"{same[index].name!r} is here, but {same[index].obstacle}",
            hint="install the torch build for it, or use `--device cpu`",
        )
    return same[index]


# Naming one that is not.


def _absent(arch: str, *, name: str, memory: int = 0) -> Device:
    kind, sm = ARCHITECTURES[arch]
    return Device(
        kind=kind,
        arch=arch,
        name=name,
        sm=sm,
        memory=memory or None,
        packages=installed_packages(),
        present=False,
    )


@cache
def _gpus() -> dict[str, dict[str, Any]]:
    """Name as `gpus.toml` has it -> architecture, and GiB where they are known."""
    makers = tomllib.loads(GPUS.read_text(encoding="utf-8")).values()
    return {name: gpu for maker in makers for name, gpu in maker.items()}


def _unbranded(word: str) -> str:
    """'nvidia geforce rtx 4090' -> '4090'."""
    bare = re.sub(r"[\s_-]", "", word)
    while (shorter := _MAKERS.sub("", bare)) != bare:
        bare = shorter
    return bare


# What torch was built for.


def _torch_obstacle(toolkit: str) -> str | None:
    """Why the installed torch cannot drive devices of `toolkit` (cuda, hip)."""
    version = installed_packages().get("torch")
    if version is None:
        return "torch is not installed"
    if _torch_builds().get(toolkit) is None:
        return f"the installed torch {version} was built without {toolkit}"
    return None


def _torch_builds() -> dict[str, str]:
    """Toolkit -> version the installed torch was built for, read from its version.py as text."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {}
    text = _text(Path(spec.origin).with_name("version.py"))
    return dict(re.findall(r"^(cuda|hip|xpu)\b[^=\n]*= '([^']+)'", text, re.MULTILINE))


# Small readings.


def _library(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _text(path: Path) -> str:
    """The file's text; "" when it cannot be read: in /proc and /sys both mean "not there"."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _properties(folder: Path) -> dict[str, int]:
    """`key number` lines of a topology node's or memory bank's properties file."""
    pairs = (line.split() for line in _text(folder / "properties").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _meminfo(root: Path) -> dict[str, int]:
    """MemTotal and MemAvailable in bytes; the whole machine's where there is no /proc."""
    lines = re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    found = {key: 1024 * int(value) for key, value in lines}
    if "MemTotal" not in found:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        found["MemTotal"] = pages * size
    found.setdefault("MemAvailable", found["MemTotal"])
    return found


#: Controller in /proc/self/cgroup -> where its tree is mounted, file of the limit, of the usage.
_CGROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}


def _cgroup_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, used) in bytes of this process's cgroup and each above it that sets a limit.

    Page cache that the kernel can drop is not counted as used.
    """
    found = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in {"", "memory"} & set(controllers.split(",")):
            mount, limit_name, used_name = _CGROUPS[controller]
            inside = Path(path.lstrip("/"))
            for folder in (root / mount / part for part in (inside, *inside.parents)):
                limit, used = _text(folder / limit_name).strip(), _text(folder / used_name).strip()
                if limit.isdigit() and used.isdigit():
                    found.append((int(limit), int(used) - _droppable(folder)))
    return found


def _droppable(folder: Path) -> int:
    text = _text(folder / "memory.stat")
    found = re.search(r"^(?:total_)?inactive_file (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0
