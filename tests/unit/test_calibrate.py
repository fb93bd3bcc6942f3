"""One amax from many inputs: the largest, a percentile, or the clip that loses least."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from diffquant.activations import quantized
from diffquant.converters._inputs import amax
from diffquant.converters._options import Calibration
from diffquant.converters.calibrate import (
    LeastError,
    Percentile,
    calibrate,
    main,
    prompts_of,
    save,
)
from diffquant.errors import ConvertError, UsageError
from diffquant.plan import Activation, Role
from diffquant.recode import input_scale

STATIC_INT8 = Activation(number="int8", granularity="tensor", mode="static")


def lost(values: Tensor, clip: float) -> float:
    """Mean squared error of the values themselves as INT8 under that clip."""
    parts = {Role.INPUT_SCALE: input_scale(STATIC_INT8, clip)}
    return float((quantized(values[None], STATIC_INT8, parts)[0] - values).square().mean())


def with_outlier() -> Tensor:
    torch.manual_seed(0)
    return torch.cat([torch.randn(1 << 19), torch.tensor([40.0])])


def seen_by_mse(values: Tensor, number: str = "int8") -> float:
    watcher = LeastError(number)
    for part in values.split(10_000):
        watcher.saw(part.abs())
    return watcher.amax


def test_mse_clips_an_outlier_and_loses_less_than_its_neighbours() -> None:
    values = with_outlier()
    chosen = seen_by_mse(values)
    assert chosen < 40 / 2
    assert lost(values, chosen) < lost(values, 40.0) / 2
    assert all(
        lost(values, chosen) <= lost(values, 40.0 * clip) * 1.01 for clip in LeastError.CLIPS
    )


def test_mse_clips_nothing_of_values_that_fill_their_range() -> None:
    """The negative control: without an outlier the largest value is the right one."""
    values = torch.linspace(-3, 3, 50_001)
    assert seen_by_mse(values) == 3.0


def test_fp8_gains_nothing_by_clipping_what_int8_must_clip() -> None:
    values = with_outlier()
    assert seen_by_mse(values, "fp8") > 2 * seen_by_mse(values, "int8")


def test_a_percentile_ignores_what_is_rare() -> None:
    watcher = Percentile(99.0)
    watcher.saw(torch.arange(1, 201).float())
    assert watcher.amax == 198


def test_an_input_of_zeros_and_one_that_is_broken_keep_what_they_are() -> None:
    assert seen_by_mse(torch.zeros(8)) == 0.0
    assert seen_by_mse(torch.tensor([1.0, float("inf")])) == float("inf")


def test_numbers_with_scales_of_groups_have_no_mse() -> None:
    with pytest.raises(UsageError, match="nvfp4 has scales of groups too") as refused:
        calibrate(_Pipeline(), [], defaults={}, method="mse", number="nvfp4")
    assert "--calibration-method max" in str(refused.value.hint)
    with pytest.raises(UsageError, match="unknown method 'median'"):
        calibrate(_Pipeline(), [], defaults={}, method="median")


class _Pipeline:
    transformer = torch.nn.Linear(2, 2)


def test_the_bundled_model_is_measured_by_the_command(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red apple\n\n")
    assert prompts_of(tmp_path / "prompts.txt") == ["a red apple"]
    typed = ["emoji_flux", str(tmp_path / "c.json"), "--prompts", str(tmp_path / "prompts.txt")]
    ran = CliRunner().invoke(main, [*typed, "--method", "mse"])
    assert ran.exit_code == 0, ran.output
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["proj_out"] > 1
    assert amax(Calibration(calibration=tmp_path / "c.json"), "emoji_flux", list(found)) == found
    again = CliRunner().invoke(main, typed)
    assert again.exit_code == 1 and "--overwrite replaces it" in again.stderr


def test_calibration_options_that_contradict_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    save({"a": 1.0}, file)
    with pytest.raises(UsageError, match="--calibrate measures inputs and --calibration names"):
        amax(Calibration(calibrate=file, calibration=file), "x", ["a"])
    with pytest.raises(UsageError, match="nothing to save"):
        amax(Calibration(save_calibration=file), "x", ["a"])
    with pytest.raises(ConvertError, match="'a', which the model does not have"):
        amax(Calibration(calibration=file), "x", ["b"])


def test_a_transformer_without_its_pipeline_cannot_draw(data: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red apple\n")
    source = str(data / "modelopt" / "flux" / "bf16")
    with pytest.raises(UsageError, match="is a transformer without its pipeline"):
        amax(Calibration(calibrate=tmp_path / "p.txt"), source, ["a"])
    assert amax(Calibration(calibrate=tmp_path / "p.txt"), source, ["a"], dry_run=True) == {
        "a": 1.0
    }
