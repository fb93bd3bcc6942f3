"""The LoRAs a server has loaded, and which of them one request wears. Names, never paths."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffquant.adapters import parsed
from diffquant.lora import Adapter
from diffquant.serve.refusals import Refused

#: Name -> scale.
Worn = Mapping[str, float]
LARGEST = 100.0


def of_server(adapters: Sequence[Adapter]) -> dict[str, float]:
    """What a request wears that says nothing: every LoRA, as strong as it was typed."""
    return {adapter.name: adapter.scale for adapter in adapters}


def asked(wish: Mapping[str, float | None] | None, loaded: Worn) -> Worn | None:
    """What a request wears; None where it says nothing. Raises Refused, 400, for unknown names."""
    if wish is None:
        return None
    for name, scale in wish.items():
        if name not in loaded:
            known = ", ".join(loaded) or "none: start it with --lora"
            raise Refused(
                400,
                f"no LoRA is called {name[:80]!r} here; loaded are {known}",
                param="lora",
                code="unknown_lora",
            )
        if scale is not None and not (math.isfinite(scale) and abs(scale) <= LARGEST):
            raise Refused(400, f"lora {name!r}: scale {scale} is no strength", param="lora")
    return {name: loaded[name] if scale is None else scale for name, scale in wish.items()}


def wear(pipeline: Any, worn: Worn) -> None:
    """Make these the pipeline's active adapters. None at all: the model as it is."""
    if not worn:
        pipeline.disable_lora()
        return
    pipeline.enable_lora()
    pipeline.set_adapters(list(worn), list(worn.values()))


def typed(flags: Mapping[str, Any], adapters: Sequence[Adapter], worn: Worn) -> dict[str, Any]:
    """The flags that draw with these again: a record must not tell of LoRAs that were off."""
    spoken = zip(flags.get("lora", ()), adapters, strict=False)
    again = [
        str(replace(parsed(text), scale=worn[adapter.name]))
        for text, adapter in spoken
        if adapter.name in worn
    ]
    return {**flags, "lora": again} if again else {k: v for k, v in flags.items() if k != "lora"}


def told(adapters: Sequence[Adapter], worn: Worn) -> list[dict[str, Any]]:
    """What a report says of them."""
    return [
        replace(adapter, scale=worn[adapter.name]).to_json()
        for adapter in adapters
        if adapter.name in worn
    ]
