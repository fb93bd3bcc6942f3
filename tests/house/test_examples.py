"""Every numbered example runs as it stands and stays under forty lines."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("[0-9]*.py"))
ARGUMENTS = {
    "03_bf16_beside_fp8.py": ["sheet.png", "2"],
    "04_lora.py": ["sheet.png", "1"],
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(example), *ARGUMENTS.get(example.name, [])]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_is_short(example: Path) -> None:
    assert len(example.read_text("utf-8").splitlines()) < 40


FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")


@pytest.mark.skipif(not FONT.exists(), reason="apt install fonts-noto-color-emoji")
def test_the_training_runs_from_glyphs_to_a_pipeline(tmp_path: Path) -> None:
    script = EXAMPLES[0].with_name("train_emoji_flux.py")
    command = [sys.executable, str(script), "--smoke", "--output", str(tmp_path / "model")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "model" / "model_index.json").is_file()


def test_the_lora_training_runs_from_drawings_to_a_file(tmp_path: Path) -> None:
    script, file = EXAMPLES[0].with_name("train_emoji_lora.py"), tmp_path / "lora.safetensors"
    command = [sys.executable, str(script), "--smoke", "--output", str(file)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert file.is_file()
