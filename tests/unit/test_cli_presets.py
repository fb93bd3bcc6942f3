"""`diffquant presets` tells what stays, why, and how many bytes that takes."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffquant import preset
from diffquant.cli import run
from diffquant.cli.presets import cost
from diffquant.errors import PresetError, UsageError
from diffquant.families import FAMILIES

TOML = 'family = "flux1"\nalgorithms = ["fp8"]\ncomplete = true\n'
RULE = '[[keep]]\npatterns = ["{}"]\nreason = "why"\nsource = "who"\n'


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(["presets", *words]) == 0
    return capsys.readouterr().out


def made(folder: Path, pattern: str) -> str:
    path = folder / "mine.toml"
    path.write_text(TOML + RULE.format(pattern))
    return str(path)


def test_a_rule_costs_what_bf16_takes_beyond_the_quantized_layer(tmp_path: Path) -> None:
    found = cost(preset.find(made(tmp_path, "proj_out")))
    assert found is not None
    (rule,) = found.rules
    n, k = FAMILIES.load("flux1").inventory({}).shapes["proj_out.weight"]
    assert (rule.layers, rule.kept, rule.quantized) == (1, 2 * n * k, n * k + 4 * n)
    (total,) = found.totals
    assert (total.scheme, total.kept) == ("fp8", 1)
    assert total.size - total.smallest == rule.kept - rule.quantized
    assert total.size < total.plain


def test_layers_the_family_calls_sensitive_are_counted_unless_the_preset_is_complete() -> None:
    found = cost(preset.load("flux1-fp8"))
    assert found is not None
    own = {keep.pattern for keep in preset.load("flux1-fp8").keep}
    added = {rule.pattern for rule in found.rules} - own
    assert "x_embedder" in added
    svdq = cost(preset.load("flux1-svdq"))
    assert svdq is not None
    assert {rule.pattern for rule in svdq.rules} <= {it.pattern for it in svdq_rules()}


def svdq_rules() -> tuple[preset.Keep, ...]:
    return preset.load("flux1-svdq").keep


@pytest.mark.parametrize("name", preset.names())
def test_every_preset_is_told_and_those_with_rules_with_their_cost(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text, read = told(capsys, name), preset.load(name)
    assert all(keep.pattern in text and keep.reason in text for keep in read.keep)
    assert ("linears stay" in text) == bool(read.keep)
    assert all(f"{key}" in text for key in read.defaults)


def test_algorithms_that_fall_back_to_a_preset_are_counted_with_it() -> None:
    found = cost(preset.load("wan-fp8"))
    assert found is not None
    assert {"fp8", "nvfp4", "svdq_int4"} <= {total.scheme for total in found.totals}


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("flux1-int8", "flux1-int8: the rules are meant for int8 too"),
        ("hunyuan_video-nvfp4", "hunyuan_video has no rules of its own for nvfp4"),
    ],
)
def test_rules_that_serve_another_algorithm_say_so(
    asked: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert why in told(capsys, asked)
    assert "asked for" not in told(capsys, preset.load(asked).name)


def test_the_list_says_what_each_serves_for_want_of_better(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = {line.split()[0]: line for line in told(capsys).splitlines()}
    assert "for want of better int4, mxfp4, nvfp4, svdq" in lines["hunyuan_video-fp8"]
    assert "for want of better" not in lines["flux1-nvfp4"]


def test_a_model_of_ones_own_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "flux1-fp8", "--model", "emoji_flux")
    assert "emoji_flux: " in text and " MB in BF16" in text


def test_a_rule_that_keeps_nothing_of_the_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PresetError, match="which no layer of the model is"):
        cost(preset.find(made(tmp_path, "blocks.*.nothing")))


def test_a_model_of_another_family_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the preset is for wan, 'emoji_flux' is a FluxTr"):
        cost(preset.load("wan-fp8"), "emoji_flux")


def test_a_family_nobody_described_has_rules_and_no_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.toml"
    path.write_text('family = "other"\nalgorithms = ["fp8"]\n' + RULE.format("a.*"))
    text = told(capsys, str(path))
    assert "a.*" in text and "nobody described the layers of other" in text


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    read: Any = json.loads(told(capsys, "wan-fp8", "--json"))
    assert read["keep"][0]["source"] and read["cost"]["totals"][0]["scheme"] == "fp8"
    listed = json.loads(told(capsys, "--json"))
    assert {each["name"] for each in listed} == set(preset.names())


def test_a_model_without_a_preset_to_count_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["presets", "--model", "emoji_flux"]) == 2
    assert "--model needs a preset" in capsys.readouterr().err
