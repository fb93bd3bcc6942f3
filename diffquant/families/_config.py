"""A module's config over its class's defaults, checked: configs are typed by people and downloaded.

Each value must be of the kind of its default, and of a size that a model can have: an inventory
written for a billion blocks would end in the memory's limit and not in an error that names the key.
"""

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

from diffquant.errors import PlanError

#: No published model is near: blocks of one kind, and everything else that is counted.
MOST_BLOCKS, LARGEST = 1 << 10, 1 << 20


def settings(defaults: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults with the config laid over them. Raises PlanError for a value that cannot be meant."""
    for key, default in defaults.items():
        if key in config:
            _require(key, config[key], default)
    return {**defaults, **config}


def _require(key: str, value: Any, default: Any) -> None:
    """None is the class's own word for "as wide as usual" or "there is none"."""
    optional = default is None or isinstance(default, str) or key == "out_channels"
    if value is None and optional:
        return
    kind = int if default is None else type(default)
    needed, fits = KINDS[kind]
    blocks = key.endswith("layers") and kind is int
    if blocks:
        needed, fits = f"a number up to {MOST_BLOCKS}", _is_block_count
    if not fits(value):
        raise PlanError(
            f"the config says {key!r} is {value!r:.60}, {needed} was needed",
            hint="is this the config.json of the module?",
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value <= LARGEST


def _is_block_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST_BLOCKS


def _is_factor(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value) and 0 < value <= MOST_BLOCKS


def _is_row(value: Any) -> bool:
    is_short = isinstance(value, list | tuple) and len(value) <= MOST_BLOCKS
    return is_short and all(type(each) is int and 0 <= each <= MOST_BLOCKS for each in value)


#: Type of a default -> what is needed, and whether a value is that.
KINDS: Mapping[type, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: (f"a number from 1 to {LARGEST}", _is_count),
    float: ("a factor", _is_factor),
    str: ("a name", lambda value: isinstance(value, str)),
    tuple: ("a list of small numbers", _is_row),
}
