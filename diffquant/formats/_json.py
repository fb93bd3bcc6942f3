"""JSON as writers leave it: in config.json, in header metadata, in files beside the weights."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from diffquant.errors import FormatError
from diffquant.headers import Header
from diffquant.sources import Checkpoint


def json_value(text: str, where: str) -> Any:
    """What the text says. Raises FormatError when it is no JSON; `where` is what it is called."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not valid JSON: {error}") from None


def json_object(text: str, where: str) -> Mapping[str, Any]:
    """The same. Raises FormatError for a list, a number or a word, too."""
    found = json_value(text, where)
    if not isinstance(found, Mapping):
        raise FormatError(f"{where} holds a {type(found).__name__}, an object was needed")
    return found


def blocks(
    checkpoint: Checkpoint, header: Header, key: str
) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """Objects under the key with the place each was found in: config.json, then header metadata."""
    place = f"header metadata {key}"
    text = header.metadata.get(key)
    found = {
        f"config.json {key}": checkpoint.config.get(key),
        place: None if text is None else json_value(text, place),
    }
    return tuple((where, block) for where, block in found.items() if isinstance(block, Mapping))


def said_by(
    found: Iterable[tuple[str, Mapping[str, Any]]], method: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Those of the blocks whose `quant_method` is this one, with their places."""
    yield from ((where, block) for where, block in found if block.get("quant_method") == method)
