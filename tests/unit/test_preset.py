"""Presets are read strictly, found by family, algorithm or model, and never protect nothing."""

import pytest

from diffquant import preset
from diffquant.errors import PresetError, UsageError

RULE = '[[keep]]\npatterns = ["a.*"]\nreason = "why"\nsource = "who"\n'
PATHS = ("a.x", "a.y", "b", "a.x.deep")


def test_a_preset_reads_its_rules_one_pattern_at_a_time() -> None:
    read = preset.parse("p", 'family = "flux1"\nalgorithms = ["fp8"]\n' + RULE)
    assert read.keep == (preset.Keep("a.*", "why", "who"),)
    assert (read.family, read.algorithms, read.defaults) == ("flux1", ("fp8",), {})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('family = "f"\nkeeps = 1', "unknown key 'keeps'"),
        ('family = "f"\n[defaults]\nsteps = 1', "unknown key 'defaults.steps'"),
        ('family = "f"\n' + RULE + 'regex = "x"', "unknown key 'keep.regex'"),
        ('family = "f"\n[defaults]\nheight = "x"', "'height' is 'x', int was needed"),
        ('family = "f"\n[defaults]\nheight = true', "'height' is True"),
        ('family = "f"\n[[keep]]\npatterns = ["a"]', "'reason' is None"),
        ('family = "f"\nmodels = "x"', "a list of strings was needed"),
        ('family = "f"\ncomplete = 1', "'complete' is 1, bool was needed"),
        ("models = []", "'family' is None"),
        ("family =", "is no TOML"),
    ],
)
def test_a_fault_names_the_file_and_the_key(text: str, named: str) -> None:
    with pytest.raises(PresetError, match=r"preset p\.toml") as refused:
        preset.parse("p", text)
    assert named in refused.value.what


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="no preset is called 'flux1-fp9'") as refused:
        preset.load("flux1-fp9")
    assert "flux1-fp8" in str(refused.value.hint)


def test_kept_layers_come_with_their_rule_in_model_order() -> None:
    read = preset.parse("p", 'family = "f"\n' + RULE)
    assert list(preset.kept(read, PATHS)) == ["a.x", "a.y"]
    assert preset.kept(read, PATHS)["a.y"].source == "who"


def test_a_pattern_that_keeps_nothing_is_an_error() -> None:
    read = preset.parse("p", 'family = "f"\n' + RULE.replace("a.*", "a.xx"))
    with pytest.raises(PresetError, match=r"keeps 'a\.xx', which no layer") as refused:
        preset.kept(read, PATHS)
    assert "a.x" in str(refused.value.hint)


@pytest.mark.parametrize(
    "known_as",
    [
        "black-forest-labs/FLUX.1-dev",
        "FLUX.1-dev",
        "/models/flux.1-DEV/",
        "me/FLUX.1-dev@main",
        "/home/x/hub/models--black-forest-labs--FLUX.1-dev/snapshots/0123abc",
    ],
)
def test_a_model_is_found_by_any_of_its_names(known_as: str) -> None:
    found = preset.for_model("nothing-like-it", known_as)
    assert found is not None
    assert found.name == "flux1-dev"


def test_an_unknown_model_has_no_preset_and_a_similar_name_is_not_enough() -> None:
    assert preset.for_model("FLUX.1-dev-finetuned", "transformer") is None


def test_the_bundled_model_asks_for_what_it_was_trained_on() -> None:
    found = preset.for_model("/usr/lib/diffquant/models/emoji_flux")
    assert found is not None
    wanted = {"height": 64, "width": 64, "max_sequence_length": 16}
    assert wanted.items() <= found.defaults.items()


def test_rules_are_found_by_family_and_algorithm() -> None:
    found = preset.for_algorithm("flux1", "modelopt_fp8")
    assert found is not None
    assert found.name == "flux1-fp8"
    assert preset.for_algorithm("wan", "modelopt_fp8") is None


@pytest.mark.parametrize(
    ("family", "algorithm", "name"),
    [
        ("flux1", "svdq", "flux1-svdq"),
        ("flux2", "svdq", "flux2-nvfp4"),
        ("wan", "svdq", "wan-fp8"),
        ("hunyuan_video", "nvfp4", "hunyuan_video-fp8"),
        ("z_image", "int4", "z_image-nvfp4"),
    ],
)
def test_the_nearest_rules_serve_where_a_family_has_none_of_its_own(
    family: str, algorithm: str, name: str
) -> None:
    found = preset.for_algorithm(family, algorithm)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("flux1-int8", "flux1-fp8"),
        ("wan-nvfp4", "wan-fp8"),
        ("flux1-mxfp4", "flux1-nvfp4"),
        ("hunyuan_video-svdq", "hunyuan_video-fp8"),
    ],
)
def test_family_and_algorithm_name_the_rules_that_serve(asked: str, name: str) -> None:
    assert preset.load(asked) is preset.load(name)


@pytest.mark.parametrize("asked", ["flux1-mx", "nothing-fp8", "wan-modelopt_nvfp4", "flux1"])
def test_only_a_family_and_an_algorithm_there_are_name_rules(asked: str) -> None:
    with pytest.raises(UsageError, match=f"no preset is called {asked!r}"):
        preset.load(asked)


@pytest.mark.parametrize(("family", "algorithm"), [("wan", "modelopt_nvfp4"), ("t5", "svdq")])
def test_what_an_exporter_chose_and_unknown_families_have_no_nearest_rules(
    family: str, algorithm: str
) -> None:
    assert preset.for_algorithm(family, algorithm) is None
