"""Every family: its inventory is the diffusers class, and every pattern and name in it is alive."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from diffquant.families import FAMILIES, Family, Inventory, Naming, located, spelled
from diffquant.patterns import matches

KNOWN = [name for name in FAMILIES.names() if FAMILIES.load(name).is_described]
#: Families whose classes nobody described: a header tells their inventory.
TOLD = [name for name in FAMILIES.names() if name not in KNOWN]
NAMINGS = [(name, naming) for name in KNOWN for naming in FAMILIES.load(name).namings]


@pytest.mark.parametrize("name", FAMILIES.names())
def test_every_family_reads_diffusers_names_as_they_are(name: str) -> None:
    family = FAMILIES.load(name)
    assert isinstance(family, Family)
    assert family.namings["diffusers"] == Naming()
    assert next(iter(family.namings)) == "diffusers"


@pytest.mark.parametrize("name", TOLD)
def test_a_family_told_by_headers_names_classes_there_are_and_tables(name: str) -> None:
    import diffusers
    import transformers

    family = FAMILIES.load(name)
    library = diffusers if family.part == "autoencoder" else transformers
    assert [each for each in family.class_names if not hasattr(library, each)] == []
    assert family.tables
    assert family.config_from is None
    assert set(family.reasons) <= set(family.sensitive)


@pytest.mark.parametrize("name", KNOWN)
def test_the_inventory_is_the_class_with_its_defaults(name: str) -> None:
    family = FAMILIES.load(name)
    config = _short(family)
    assert family.inventory(config) == _inventory_of_class(family.class_names[0], config)


@pytest.mark.parametrize("name", KNOWN)
def test_missing_keys_mean_the_defaults_of_the_class(name: str) -> None:
    family = FAMILIES.load(name)
    defaults = inspect.signature(_class(family.class_names[0])).parameters
    stated = {key: item.default for key, item in defaults.items() if item.default is not item.empty}
    assert family.inventory(stated) == family.inventory({})


@pytest.mark.parametrize("name", KNOWN)
def test_a_config_read_from_shapes_gives_the_same_inventory(name: str) -> None:
    family = FAMILIES.load(name)
    inventory = family.inventory(_short(family))
    assert family.config_from is not None
    config = family.config_from(inventory.shapes)
    assert config is not None
    assert config["_class_name"] == family.class_names[0]
    assert family.inventory(config) == inventory


@pytest.mark.parametrize("name", KNOWN)
def test_shapes_of_other_families_give_no_config(name: str) -> None:
    shapes = FAMILIES.load(name).inventory({}).shapes
    others = [FAMILIES.load(other) for other in KNOWN if other != name]
    assert [other.config_from(shapes) for other in others if other.config_from] == [None] * len(
        others
    )


@pytest.mark.parametrize("name", KNOWN)
def test_no_pattern_is_dead(name: str) -> None:
    family = FAMILIES.load(name)
    inventory = _whole(family)
    modules = {path.rpartition(".")[0] for path in inventory.shapes} | set(inventory.shapes)
    given = (*family.sensitive, *family.float32, *family.chunked, *family.mlp, *family.attention)
    fed = [pattern.partition(":")[0] for pattern in family.fed_by]
    dead = [each for each in (*given, *fed) if not any(matches(each, path) for path in modules)]
    assert dead == []


@pytest.mark.parametrize("name", KNOWN)
def test_siblings_and_blocks_exist(name: str) -> None:
    family = FAMILIES.load(name)
    inventory = _whole(family)
    for group in family.siblings:
        for suffix in group:
            assert any(path.endswith(f".{suffix}") for path in inventory.linears)
    for blocks in family.blocks:
        assert any(path.startswith(f"{blocks}.0.") for path in inventory.shapes)


@pytest.mark.parametrize("name", KNOWN)
def test_chunks_divide_their_layers_evenly(name: str) -> None:
    family = FAMILIES.load(name)
    inventory = family.inventory({})
    for pattern, (chunks, scales) in family.chunked.items():
        for path in filter(lambda path: matches(pattern, path), inventory.linears):
            assert inventory.shapes[f"{path}.weight"][0] % chunks == 0
            assert all(scale < chunks for scale in scales)


@pytest.mark.parametrize("name", KNOWN)
def test_float32_is_what_the_class_keeps(name: str) -> None:
    family = FAMILIES.load(name)
    kept = set(getattr(_class(family.class_names[0]), "_keep_in_fp32_modules", None) or ())
    for parameter in _whole(family).shapes:
        owner = parameter.rpartition(".")[0]
        ours = any(matches(each, path) for each in family.float32 for path in (parameter, owner))
        assert ours == bool(kept & set(parameter.split("."))), parameter


@pytest.mark.parametrize(("name", "naming"), NAMINGS)
def test_every_parameter_is_stored_exactly_once(name: str, naming: str) -> None:
    family = FAMILIES.load(name)
    inventory = family.inventory(_short(family))
    names = family.namings[naming]
    reached: list[str] = []
    for stored in dict.fromkeys(each for path in inventory.shapes for each in _stored(names, path)):
        stem, leaf = _split(stored)
        rule = located(names, stem) if leaf else located(names, stored)
        assert rule is not None
        if not rule.cols:  # a module in slices along K is reached through the first of them
            reached += [row + leaf for row in rule.rows]
    assert sorted(reached) == sorted(inventory.shapes)


@pytest.mark.parametrize(("name", "naming"), NAMINGS)
def test_located_undoes_spelled(name: str, naming: str) -> None:
    family = FAMILIES.load(name)
    names = family.namings[naming]
    for path in family.inventory(_short(family)).linears:
        for place, stored in enumerate(spelled(names, path)):
            rule = located(names, stored)
            assert rule is not None
            assert path in rule.rows
            assert rule.cols in (None, place)


@pytest.mark.parametrize(("name", "naming"), NAMINGS)
def test_no_rule_claims_a_name_of_diffusers(name: str, naming: str) -> None:
    """So that counting the names that rules claim tells a naming from the module's own."""
    family = FAMILIES.load(name)
    strict = replace(family.namings[naming], falls_through=False)
    modules = {_split(path)[0] for path in _whole(family).shapes}
    assert [module for module in modules if located(strict, module) is not None] == []


def _short(family: Family) -> dict[str, Any]:
    """The class's defaults with two blocks of each kind, so that building it is quick."""
    parameters = inspect.signature(_class(family.class_names[0])).parameters.values()
    return {
        item.name: 2
        for item in parameters
        if item.name.endswith("layers") and isinstance(item.default, int)
    }


def _whole(family: Family) -> Inventory:
    """All that any config of any class of the family can have, as far as optional widths go."""
    merged: dict[str, tuple[int, ...]] = {}
    linears: frozenset[str] = frozenset()
    for class_name in family.class_names:
        parameters = inspect.signature(_class(class_name)).parameters.values()
        optional = {item.name: 64 for item in parameters if _is_optional_width(item)}
        found = family.inventory({"_class_name": class_name, **optional})
        merged, linears = {**merged, **found.shapes}, linears | found.linears
    return Inventory(merged, linears)


def _is_optional_width(item: inspect.Parameter) -> bool:
    return item.default is None and item.name.endswith(("_dim", "_seq_len"))


def _class(class_name: str) -> Any:
    import diffusers

    return getattr(diffusers, class_name)


def _inventory_of_class(class_name: str, config: Mapping[str, Any]) -> Inventory:
    import torch
    from accelerate import init_empty_weights

    with init_empty_weights():
        module = _class(class_name)(**config)
    return Inventory(
        shapes={name: tuple(tensor.shape) for name, tensor in module.state_dict().items()},
        linears=frozenset(
            name for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)
        ),
    )


def _stored(naming: Naming, parameter: str) -> tuple[str, ...]:
    """Stored names of a parameter; spellings to choose from count once, slices along K do not."""
    names = spelled(naming, parameter)
    rule = located(naming, _split(names[0])[0])
    return names if rule is not None and rule.cols is not None else names[:1]


def _split(name: str) -> tuple[str, str]:
    stem, dot, leaf = name.rpartition(".")
    return (stem, dot + leaf) if leaf in ("weight", "bias") else (name, "")
