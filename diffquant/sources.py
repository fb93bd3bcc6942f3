"""Source string -> what lies there: files, sidecars, config, revision. The only hub client.

CONTRACT (to be implemented)
"""
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One component's stored weights, and what lies beside them.

    origin     the source as typed
    root       the directory the files lie in
    files      weights files, in shard order; empty for a directory with a config only
    sidecars   JSON files beside the weights, by name
    config     the parsed config.json beside the weights, {} when there is none
    revision   the hub commit everything was taken from; None for a local source
    """

    origin: str
    root: Path
    files: tuple[Path, ...]
    sidecars: Mapping[str, Path] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None
