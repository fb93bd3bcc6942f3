"""`python -m benchmarks.gpu`, rehearsed on a CPU as it would run on a machine without diffusers."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: What the machine with the GPU need not have.
ABSENT = ("diffusers", "transformers", "accelerate", "peft", "huggingface_hub", "click", "rich")
PROGRAM = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What it wrote beside a section that was there."""
    output = tmp_path_factory.mktemp("gpu") / "RESULTS.md"
    output.write_text("<!-- 10 linear -->\n## Linear layers\n", encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, "--rehearse", "--output", str(output)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    return output.read_text("utf-8")


def test_every_method_took_a_step_without_diffusers(section: str) -> None:
    steps = section.partition("| one step |")[2]
    for method in ("bf16", "fp8", "svdq-int4", "nvfp4, weight-only"):
        assert f"\n| {method} |" in steps
    assert "failed" not in steps and "refused" not in section


def test_the_section_says_when_and_on_what_and_leaves_others_alone(section: str) -> None:
    assert section.index("## Linear layers") < section.index("## On a GPU")
    assert " UTC; commit " in section and "64 + 16 tokens" in section


def test_four_bits_lose_more_than_eight_and_plain_weights_nothing(section: str) -> None:
    steps = section.partition("| one step |")[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in steps.splitlines()[2:]]
    lost = {row[0]: float(row[-1]) for row in rows if row}
    assert lost["bf16"] == 0 < lost["fp8"] < lost["nvfp4, weight-only"]
