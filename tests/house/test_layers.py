"""Imports point down: every file has a level in levels.toml, and uses lower ones only."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOUSE = tomllib.loads(Path(__file__).with_name("levels.toml").read_text(encoding="utf-8"))
LEVELS: dict[str, int] = HOUSE["light"] | HOUSE["torch"]


def modules() -> dict[str, Path]:
    """Every module by its installed name."""
    folders = {"diffquant": "diffquant", "converters": "diffquant.converters"}
    folders["presets"] = "diffquant.presets"
    return {
        ".".join([name, *path.relative_to(ROOT / top).with_suffix("").parts]): path
        for top, name in folders.items()
        for path in sorted((ROOT / top).rglob("*.py"))
    }


MODULES = modules()


def room(module: str) -> str | None:
    """The longest name of a room that holds the module: 'formats' for diffquant.formats.gguf."""
    parts = module.removeprefix("diffquant").removeprefix(".").split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in LEVELS), None)


def imported(tree: ast.AST, module: str) -> Iterator[str]:
    """Absolute names of everything the tree imports, from functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def at_module_level(tree: ast.Module) -> ast.Module:
    """The tree without what runs later or never: functions and `if TYPE_CHECKING`."""

    class Later(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None: ...
        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None: ...
        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            kept = node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else node
            return kept

    pruned: ast.Module = Later().visit(tree)
    return pruned


def climbs(source: str, module: str) -> list[str]:
    """Imports of the source that do not point strictly down."""
    here = room(module)
    assert here is not None, f"{module} has no level; add it to tests/house/levels.toml"
    names = [name for name in imported(ast.parse(source), module) if name.startswith("diffquant")]
    rooms = {name: room(name) or "__init__" for name in names}
    return [
        f"{here} ({LEVELS[here]}) imports {name} ({LEVELS[there]})"
        for name, there in rooms.items()
        if there.split(".")[0] != here.split(".")[0] and LEVELS[there] >= LEVELS[here]
    ]


def weights(source: str, module: str) -> list[str]:
    """What the source imports at module level that a light room must not."""
    names = imported(at_module_level(ast.parse(source)), module)
    return [
        name
        for name in names
        if name.split(".")[0] in HOUSE["heavy"]
        or (name.startswith("diffquant.") and room(name) in HOUSE["torch"])
    ]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_strictly_down(module: str) -> None:
    assert climbs(MODULES[module].read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in HOUSE["light"]])
def test_a_light_room_imports_nothing_heavy_at_module_level(module: str) -> None:
    assert weights(MODULES[module].read_text(encoding="utf-8"), module) == []


def test_an_import_that_climbs_is_seen_even_inside_a_function() -> None:
    source = "def later():\n    from diffquant.planner import plan\n"
    assert climbs(source, "diffquant.plan") == ["plan (3) imports diffquant.planner.plan (6)"]


def test_rooms_of_one_level_do_not_import_each_other_but_files_of_one_folder_may() -> None:
    source = "from diffquant.families import FAMILIES\n"
    assert climbs(source, "diffquant.encodings.fp8")
    assert not climbs(source, "diffquant.families.flux1")


def test_a_heavy_import_is_seen_unless_it_waits_or_is_only_for_types() -> None:
    waits = "def decode():\n    import torch\nif TYPE_CHECKING:\n    from torch import Tensor\n"
    assert weights(waits, "diffquant.encodings.fp8") == []
    assert weights(waits + "import torch.nn\n", "diffquant.encodings.fp8") == ["torch.nn"]
