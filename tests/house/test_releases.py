"""The oldest releases that pyproject.toml allows and the newest of the index both run diffquant.

Each test makes a virtual environment of its own, so it needs a package index. torch is the same in
both: another build of it pulls gigabytes, and what it changes is tested elsewhere.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
#: With `video`, because Wan's pipelines clean a prompt with ftfy whatever they draw.
DECLARED = [
    need for need in (*PROJECT["dependencies"], *EXTRAS["video"]) if not need.startswith("torch>")
]
TOOLS = ["torch==2.13.0", "setuptools>=77", *(each for each in EXTRAS["test"] if "pytest>" in each)]

#: From a file's names to a drawn picture: what other releases of the libraries can break.
SUBSET = [
    f"tests/unit/test_{name}.py"
    for name in ("run", "materialize", "lora", "cli_generate", "components", "pipelines")
]
LTX2 = "diffusers 0.42 imports Gemma 4 for LTX-2, and transformers 5.0 has none"
#: Test -> what the oldest releases lack for it. Each must fail there, or it belongs in the subset.
LACKING_IN_THE_OLDEST = {
    "tests/unit/test_pipelines.py::"
    "test_every_kind_draws_dense_as_diffusers_does_and_quantized_nearly_so[ltx2]": LTX2,
    "tests/unit/test_pipelines.py::"
    "test_frames_a_second_reach_the_pipeline_that_draws_by_them": LTX2,
    "tests/unit/test_components.py::"
    "test_modules_that_transformers_keeps_in_float32_stay_there_in_float16_only": (
        "transformers 5.0 keeps them in float32 in bfloat16 too, as diffquant then does"
    ),
}


def oldest(requirement: str) -> str:
    """'peft==0.18' of 'peft>=0.18'."""
    return requirement.replace(">=", "==")


class Room:
    """A copy of the checkout, and a virtual environment beside it."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.venv = folder / "tree", folder / "venv"
        leave_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
        shutil.copytree(ROOT, self.tree, ignore=leave_out)
        subprocess.run([sys.executable, "-m", "venv", str(self.venv)], check=True, timeout=300)

    def install(self, requirements: Sequence[str]) -> None:
        """The requirements in one go, so that pip weighs them together, then diffquant alone."""
        for told in (requirements, ("--no-deps", "--no-build-isolation", str(self.tree))):
            ran = self.run("pip", "install", "--quiet", "--no-compile", *told)
            assert ran.returncode == 0, ran.stdout

    def test(self, *told: str) -> subprocess.CompletedProcess[str]:
        return self.run("pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *told)

    def run(self, tool: str, *told: str) -> subprocess.CompletedProcess[str]:
        """A tool of the environment, in the copy; both of its streams are in `stdout`."""
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [str(self.venv / "bin" / tool), *told],
            cwd=self.tree,
            env={**clean, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    """Removed afterwards, because pytest would keep the gigabyte of three runs."""
    yield Room(tmp_path)
    shutil.rmtree(tmp_path)


@pytest.mark.long
def test_the_oldest_declared_releases_run_diffquant(room: Room) -> None:
    room.install([*TOOLS, *map(oldest, DECLARED)])
    left_out = [f"--deselect={test}" for test in LACKING_IN_THE_OLDEST]
    passed = room.test(*SUBSET, *left_out)
    assert passed.returncode == 0, passed.stdout
    lacking = room.test(*LACKING_IN_THE_OLDEST)
    closing = lacking.stdout.splitlines()[-1]
    assert closing.startswith(f"{len(LACKING_IN_THE_OLDEST)} failed in "), lacking.stdout


@pytest.mark.long
def test_the_newest_releases_run_diffquant(room: Room) -> None:
    room.install([*TOOLS, *DECLARED])
    passed = room.test(*SUBSET)
    assert passed.returncode == 0, passed.stdout
