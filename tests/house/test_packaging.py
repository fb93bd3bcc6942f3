"""The list of packages is the disk, and the wheel holds everything and nothing more."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
MAPPED = {folder: package for package, folder in SETUPTOOLS["package-dir"].items()}


def installed_name(path: Path) -> str:
    """'diffquant.converters' for converters/, 'diffquant.formats' for diffquant/formats/."""
    top, *below = path.relative_to(ROOT).parts
    return ".".join([MAPPED.get(top, top), *below])


def packages_on_disk() -> set[str]:
    tops = [ROOT / top for top in ("diffquant", *MAPPED)]
    folders = {path.parent for top in tops for path in top.rglob("*.py")}
    return {installed_name(folder) for folder in folders}


def test_packages_on_disk_are_the_packages_listed() -> None:
    assert sorted(packages_on_disk()) == SETUPTOOLS["packages"]


def test_every_package_has_an_init_file() -> None:
    tops = [ROOT / top for top in ("diffquant", *MAPPED)]
    folders = {path.parent for top in tops for path in top.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("folder", MAPPED)
def test_a_mapped_package_refuses_its_top_level_name(folder: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 1
    assert f"import diffquant.{folder}, not {folder!r}" in ran.stderr


def test_constraints_pin_torch_and_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    asked = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["test"]
    names = {need.split(">")[0].split("[")[0].lower() for need in asked} - {"diffquant"}
    assert "torch==2.13.0" in lines
    assert names <= pins


@pytest.mark.long
def test_the_wheel_holds_every_module_and_data_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    leave_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "tests")
    shutil.copytree(ROOT, source, ignore=leave_out)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    wanted = {
        "/".join([*installed_name(path.parent).split("."), path.name])
        for top in ("diffquant", *MAPPED)
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == wanted
