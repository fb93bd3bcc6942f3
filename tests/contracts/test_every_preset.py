"""Every preset can be read, speaks of a family there is, and every rule keeps some layer of it."""

import inspect
from typing import Any

import diffusers
import pytest

from diffquant import preset
from diffquant.families import FAMILIES
from diffquant.schemes import SCHEMES

PRESETS = {name: preset.load(name) for name in preset.names()}
TRIED = [name for name, read in PRESETS.items() if read.keep]


def default_config(class_name: str) -> dict[str, Any]:
    """What the diffusers class is built with when nothing is said: the published architecture."""
    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters.values()
    given = {each.name: each.default for each in parameters if each.default is not each.empty}
    return {"_class_name": class_name, **given}


@pytest.mark.parametrize("name", PRESETS)
def test_it_says_something_about_a_known_family(name: str) -> None:
    read = PRESETS[name]
    assert name.startswith(f"{read.family}-")
    assert read.family in FAMILIES.names()
    assert bool(read.keep) == bool(read.algorithms), "rules are for algorithms"
    assert bool(read.defaults) == bool(read.models), "defaults are for models"
    assert read.keep or read.defaults


@pytest.mark.parametrize("name", TRIED)
def test_every_rule_keeps_a_layer_of_its_family_and_leaves_most(name: str) -> None:
    family = FAMILIES.load(PRESETS[name].family)
    linears = sorted(family.inventory(default_config(family.class_names[0])).linears)
    kept = preset.kept(PRESETS[name], linears)
    print(f"{name}: {len(kept)} of {len(linears)} linears stay")
    assert 0 < len(kept) < 0.6 * len(linears)


@pytest.mark.parametrize("family", sorted({PRESETS[name].family for name in TRIED}))
@pytest.mark.parametrize("scheme", SCHEMES.names())
def test_every_family_with_rules_has_some_for_every_scheme(family: str, scheme: str) -> None:
    found = preset.for_algorithm(family, SCHEMES.load(scheme).preset)
    assert found is not None
    assert found.keep


def test_no_rules_are_a_copy_of_the_nearest_ones() -> None:
    """A file that says what another says already is not needed: `preset.NEAREST` finds that one."""
    for read in (PRESETS[name] for name in TRIED):
        for algorithm in read.algorithms:
            near = preset.NEAREST.get(algorithm)
            other = None if near is None else preset.for_algorithm(read.family, near)
            patterns = [keep.pattern for keep in read.keep]
            assert other in (None, read) or patterns != [keep.pattern for keep in other.keep]


def test_no_model_and_no_algorithm_of_a_family_is_claimed_twice() -> None:
    models = [model.casefold() for read in PRESETS.values() for model in read.models]
    rules = [(read.family, each) for read in PRESETS.values() for each in read.algorithms]
    assert len(models) == len(set(models))
    assert len(rules) == len(set(rules))
