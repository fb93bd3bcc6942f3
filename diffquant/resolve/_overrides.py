"""Rules 2 and 3: components that a person takes from elsewhere, whole or their weights alone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from diffquant.errors import UsageError
from diffquant.resolve._flags import ModelFlags, flag_for
from diffquant.resolve._rules import Log

WEIGHTS_SUFFIXES = frozenset({".safetensors", ".sft", ".gguf", ".bin", ".pt", ".pth", ".ckpt"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """A component from elsewhere: `path` has a config of its own, `weights` has none."""

    component: str
    path: str | None = None
    weights: str | None = None
    path_flag: str = ""
    weights_flag: str = ""

    @property
    def flag(self) -> str:
        return self.weights_flag or self.path_flag


def rule_2_components(flags: ModelFlags) -> dict[str, Override]:
    """Gather every path flag by the component it names."""
    paths = _one_each("path", flags.transformer_path, flags.component_paths)
    weights = _one_each(
        "weights-path", flags.transformer_weights_path, flags.component_weights_paths
    )
    return {
        name: Override(
            component=name,
            path=paths.get(name),
            weights=weights.get(name),
            path_flag=flag_for(name, "path") if name in paths else "",
            weights_flag=flag_for(name, "weights-path") if name in weights else "",
        )
        for name in {**paths, **weights}
    }


def _one_each(kind: str, transformer: str | None, others: Mapping[str, str]) -> dict[str, str]:
    """Sources by component; the same component named twice with two sources is a contradiction."""
    gathered = {name.replace("-", "_"): source for name, source in others.items()}
    if transformer is None:
        return gathered
    if gathered.get("transformer", transformer) != transformer:
        flag = flag_for("transformer", kind)
        raise UsageError(
            f"{flag} names both {transformer!r} and {gathered['transformer']!r}",
            hint=f"keep one {flag}",
        )
    return {**gathered, "transformer": transformer}


def rule_3_weights(overrides: dict[str, Override], log: Log) -> dict[str, Override]:
    """A component path that names a weights file is a weights path; weights win over a path."""
    return {name: _as_weights(override, log) for name, override in overrides.items()}


def _as_weights(override: Override, log: Log) -> Override:
    name, path, weights = override.component, override.path, override.weights
    if path is not None and names_weights_file(path):
        if weights is not None and weights != path:
            raise UsageError(
                f"{override.path_flag} {path} and {override.weights_flag} {weights} both give "
                f"weights to {name!r}",
                hint=f"keep one of them; {override.path_flag} takes a folder with a config.json",
            )
        log.fire("3b", flag=override.path_flag, component=name)
        return replace(
            override, path=None, path_flag="", weights=path, weights_flag=override.path_flag
        )
    return override


def names_weights_file(source: str) -> bool:
    path = Path(source.partition("@")[0])
    is_weights = path.suffix in WEIGHTS_SUFFIXES or path.name.endswith(".index.json")
    return is_weights and not path.is_dir()
