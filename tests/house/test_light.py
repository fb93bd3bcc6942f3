"""The light zone answers without torch: importing it imports nothing heavy."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOUSE = tomllib.loads(Path(__file__).with_name("levels.toml").read_text(encoding="utf-8"))
PROBE = """
import importlib, sys, time
started = time.perf_counter()
for name in {names!r}:
    importlib.import_module(name)
print(f"{{time.perf_counter() - started:.3f}}", *sorted(set(sys.modules) & {heavy!r}))
"""


def files(room: str) -> list[str]:
    """Installed names of the room and of its light files, where it is on disk."""
    found = sorted((ROOT / "diffquant" / room).glob("*.py"))
    inside = [f"diffquant.{room}.{path.stem}" for path in found if path.stem != "__init__"]
    alone = (ROOT / "diffquant" / f"{room}.py").exists() or room == "presets"
    return [f"diffquant.{room}"] + inside if found or alone else []


ROOMS = {room: files(room) for room in HOUSE["light"]} | {
    front: [front] for front in HOUSE["light_fronts"]
}


def heavy_after_importing(names: list[str]) -> list[str]:
    probe = PROBE.format(names=names, heavy=set(HOUSE["heavy"]))
    ran = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    seconds, *heavy = ran.stdout.split()
    print(f"{names[0]} and {len(names) - 1} more: {seconds} s")
    return heavy


@pytest.mark.parametrize("room", [room for room, names in ROOMS.items() if names])
def test_importing_a_light_room_and_all_its_files_imports_nothing_heavy(room: str) -> None:
    assert heavy_after_importing(ROOMS[room]) == []


def test_the_probe_sees_a_heavy_import() -> None:
    assert heavy_after_importing(["numpy"]) == ["numpy"]
