"""Devices: named, found, measured; without torch."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from diffquant import device
from diffquant.errors import UsageError

GIB = 2**30


def tree(root: Path, files: dict[str, str]) -> Path:
    """A small /proc and /sys."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemAvailable: {48 * 2**20} kB\n"}


def test_probe_finds_a_device_torch_can_drive() -> None:
    found = device.probe()
    assert found.present
    assert found.obstacle is None
    assert found.memory is not None and found.memory > GIB / 4
    assert device.probe_all()[-1].kind == "cpu"


def test_probing_imports_no_torch() -> None:
    code = "import sys; from diffquant import device; device.probe(); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("text", "kind", "sm"),
    [
        ("sm75", "cuda", 75),
        ("SM_89", "cuda", 89),
        ("sm121", "cuda", 121),
        ("gfx90a", "rocm", None),
        ("gfx942", "rocm", None),
        ("gfx950", "rocm", None),
        ("ascend-a2", "ascend", None),
        ("ascend-a5", "ascend", None),
    ],
)
def test_an_architecture_is_a_device_for_a_dry_run(text: str, kind: str, sm: int | None) -> None:
    named = device.parse(text)
    assert (named.kind, named.sm, named.present, named.memory) == (kind, sm, False, None)
    assert named.arch == text.lower().replace("_", "")


@pytest.mark.parametrize(
    ("text", "arch", "gib"),
    [
        ("RTX 4090", "sm89", 24),
        ("nvidia geforce rtx-5090", "sm120", 32),
        ("h100", "sm90", 80),
        ("A100", "sm80", None),
        ("Radeon RX 7900 XTX", "gfx1100", 24),
        ("mi300x", "gfx942", 192),
    ],
)
def test_a_gpu_goes_by_the_name_on_its_box(text: str, arch: str, gib: int | None) -> None:
    named = device.parse(text)
    assert (named.arch, named.name, named.present) == (arch, text, False)
    assert named.memory == (None if gib is None else gib * 2**30)


def test_every_gpu_of_the_table_has_an_architecture_that_is_known() -> None:
    gpus = tomllib.loads(device.GPUS.read_text(encoding="utf-8"))
    names = [name for maker in gpus.values() for name in maker]
    assert len(names) == len(set(names)) > 60
    assert {device.parse(name).arch for name in names} <= set(device.ARCHITECTURES)


def test_cpu_is_always_here() -> None:
    named = device.parse("cpu")
    assert (named.kind, named.present, named.torch_name) == ("cpu", True, "cpu")
    assert named.packages["torch"][0].isdigit()


@pytest.mark.parametrize(
    ("text", "near"), [("sm88", "sm89"), ("cdua", "cuda"), ("cpu:x", "cpu"), ("rtx4091", "4090")]
)
def test_unknown_names_are_answered_with_near_ones(text: str, near: str) -> None:
    with pytest.raises(UsageError, match=re.escape(repr(text))) as caught:
        device.parse(text)
    assert near in str(caught.value.hint)


def test_a_kind_that_is_not_here_says_what_is() -> None:
    with pytest.raises(UsageError, match="there is no device 'cpu:7' here") as caught:
        device.parse("cpu:7")
    assert "--device sm120" in str(caught.value.hint)


def test_rocm_architectures_are_read_from_the_kernel(tmp_path: Path) -> None:
    nodes = "sys/class/kfd/kfd/topology/nodes"
    root = tree(
        tmp_path,
        {
            f"{nodes}/0/properties": "simd_count 0\ngfx_target_version 0\n",
            f"{nodes}/1/properties": "simd_count 440\ngfx_target_version 90010\n",
            f"{nodes}/1/mem_banks/0/properties": f"heap_type 1\nsize_in_bytes {64 * GIB}\n",
            f"{nodes}/2/properties": "simd_count 1216\ngfx_target_version 90402\n",
        },
    )
    first, second = device._rocm_devices(root)
    assert (first.arch, first.memory, first.torch_name) == ("gfx90a", 64 * GIB, "cuda:0")
    assert (second.arch, second.memory) == ("gfx942", None)


def test_without_a_cgroup_limit_memory_is_the_machines(tmp_path: Path) -> None:
    root = tree(tmp_path, {**MEMINFO, "proc/self/cgroup": "0::/\n"})
    assert device.host_memory(root) == device.HostMemory(64 * GIB, 48 * GIB)


def test_a_cgroup_limits_memory_and_droppable_cache_is_not_used(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/box/job\n",
        "sys/fs/cgroup/box/memory.max": str(16 * GIB),
        "sys/fs/cgroup/box/memory.current": str(6 * GIB),
        "sys/fs/cgroup/box/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
        "sys/fs/cgroup/box/job/memory.max": "max",
    }
    assert device.host_memory(tree(tmp_path, MEMINFO | files)) == device.HostMemory(
        16 * GIB, 12 * GIB
    )


def test_the_older_cgroup_tree_is_read_too(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/box\n0::/\n",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": str(8 * GIB),
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": str(GIB),
    }
    assert device.host_memory(tree(tmp_path, MEMINFO | files)) == device.HostMemory(
        8 * GIB, 7 * GIB
    )


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({}, "none"),
        ({"nunchaku/gibbs_sampler.py": "", "nunchaku/__init__.py": ""}, "statistics package"),
        ({"nunchaku/models/linear.py": "", "nunchaku/__init__.py": ""}, "none"),
        (
            {
                "nunchaku/models/linear.py": "",
                "nunchaku/_C.abi3.so": "",
                "nunchaku/__init__.py": "",
            },
            "real",
        ),
    ],
)
def test_the_two_packages_called_nunchaku_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], kind: str
) -> None:
    poison = {
        name: "raise RuntimeError('imported')" for name in files if name.endswith("init__.py")
    }
    monkeypatch.syspath_prepend(tree(tmp_path, files | poison))
    (tmp_path / "nunchaku-0.16.1.dist-info").mkdir()
    assert device.nunchaku_kind() == kind
    assert ("nunchaku" in device.installed_packages()) == (kind == "real")


def test_package_names_are_canonical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Flash_Infer.Python-0.6.1+cu13.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert device.installed_packages()["flash-infer-python"] == "0.6.1+cu13"
