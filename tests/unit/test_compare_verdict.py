"""Levels, thresholds and the first figure that misses."""

import pytest

from diffquant.compare.verdict import FIGURES, LEVELS, Check, judge, limits
from diffquant.errors import UsageError

GOOD = {"psnr": 30.0, "mae": 2.0, "cosine": 0.999, "relative_l2": 0.05, "kernel": 0.001}


def test_the_levels_are_those_of_the_specification() -> None:
    judged = ("psnr", "mae", "cosine", "relative_l2")
    assert [LEVELS["smoke"][name] for name in judged] == [20, 12, 0.98, 0.20]
    assert [LEVELS["strict"][name] for name in judged] == [25, 6, 0.995, 0.08]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("figure", ["psnr", "mae", "cosine", "relative_l2", "kernel"])
def test_a_figure_at_its_limit_passes_and_one_beyond_it_fails(level: str, figure: str) -> None:
    limit = LEVELS[level][figure]
    beyond = limit * (0.99 if FIGURES[figure].higher else 1.01)
    assert judge(level, {}, {**GOOD, figure: limit}).ok
    assert not judge(level, {}, {**GOOD, figure: beyond}).ok


def test_the_first_failing_figure_is_one_line() -> None:
    missed = judge("smoke", {}, {**GOOD, "mae": 20.0, "psnr": 18.2})
    assert missed.first_failure == "PSNR 18.20 dB < 20.00 dB"
    assert judge("smoke", {}, GOOD).first_failure is None


def test_a_threshold_takes_the_place_of_the_levels() -> None:
    assert judge("strict", {"psnr": 40.0}, GOOD).first_failure == "PSNR 30.00 dB < 40.00 dB"
    assert judge("strict", {"psnr": 10.0}, {**GOOD, "psnr": 11.0}).ok


def test_a_defect_outweighs_every_figure() -> None:
    verdict = judge("smoke", {}, GOOD, ["the picture is white"])
    assert not verdict.ok
    assert verdict.first_failure == "the picture is white"


def test_what_is_no_number_never_passes() -> None:
    assert not judge("smoke", {}, {**GOOD, "cosine": float("nan")}).ok
    assert judge("smoke", {}, {**GOOD, "psnr": float("inf")}).ok


def test_a_figure_that_could_not_be_measured_fails_only_when_it_was_asked_for() -> None:
    assert judge("smoke", {}, {**GOOD, "kernel": None}).ok
    asked = judge("smoke", {"ms_ssim": 0.9}, {**GOOD, "ms_ssim": None})
    assert asked.first_failure == "MS-SSIM: not measured"


def test_unknown_levels_and_figures_are_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="one of: smoke, strict"):
        limits("harsh", {})
    with pytest.raises(UsageError, match="one of: weight, kernel, one_step, psnr"):
        limits("smoke", {"pnsr": 1.0})


def test_a_check_says_which_way_it_went() -> None:
    assert str(Check(figure="psnr", value=21.0, limit=20.0)) == "PSNR 21.00 dB ≥ 20.00 dB"
    assert str(Check(figure="mae", value=21.0, limit=20.0)) == "picture MAE 21.00/255 > 20.00/255"
