"""The registry on a package made for the test: a file more is a name more."""

import sys
from pathlib import Path

import pytest

from diffquant.errors import UsageError
from diffquant.plugins import Registry


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[str]:
    package = tmp_path / "shelf_for_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name in ("pear", "apple", "_private"):
        (package / f"{name}.py").write_text(f"FRUIT = {name!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("shelf_for_a_test")]:
        monkeypatch.delitem(sys.modules, name)
    return Registry("shelf_for_a_test", "FRUIT")


def test_names_are_the_public_files_in_order(shelf: Registry[str]) -> None:
    assert shelf.names() == ("apple", "pear")


def test_listing_names_imports_no_plugin(shelf: Registry[str]) -> None:
    shelf.names()
    assert "shelf_for_a_test.apple" not in sys.modules


def test_objects_come_by_name_and_all_together(shelf: Registry[str]) -> None:
    assert shelf.load("pear") == "pear"
    assert shelf.load_all() == {"apple": "apple", "pear": "pear"}


def test_adding_a_file_is_all_there_is_to_adding_a_thing(
    shelf: Registry[str], tmp_path: Path
) -> None:
    (tmp_path / "shelf_for_a_test" / "fig.py").write_text("FRUIT = 'fig'\n")
    assert shelf.load("fig") == "fig"


@pytest.mark.parametrize(("wrong", "near"), [("appel", "apple"), ("paer", "pear")])
def test_an_unknown_name_is_refused_with_the_nearest(
    shelf: Registry[str], wrong: str, near: str
) -> None:
    with pytest.raises(UsageError, match=f"no fruit is called '{wrong}'") as raised:
        shelf.load(wrong)
    assert near in (raised.value.hint or "")


def test_private_files_and_far_names_list_everything(shelf: Registry[str]) -> None:
    with pytest.raises(UsageError) as raised:
        shelf.load("zzzz")
    assert raised.value.hint == "one of: apple, pear"
    with pytest.raises(UsageError):
        shelf.load("_private")
