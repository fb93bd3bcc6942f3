"""What a person typed about models, and what follows from the words alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diffquant.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlags:
    """What a person typed about models; nothing here is ever filled in by diffquant.

    component_*   by component name with underscores: "transformer_2"
    """

    model_path: str | None = None
    transformer_path: str | None = None
    transformer_weights_path: str | None = None
    component_paths: Mapping[str, str] = field(default_factory=dict)
    component_weights_paths: Mapping[str, str] = field(default_factory=dict)
    quantization: str | None = None
    quantization_ignored_layers: tuple[str, ...] = ()
    quantization_scope: str | None = None
    quantization_preset: str | None = None
    quantize_all: bool = False
    requantize: bool = False
    component_quantizations: Mapping[str, str] = field(default_factory=dict)
    component_quantization_ignored_layers: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )
    enable_svdquant: bool = False
    quantization_precision: str | None = None
    quantization_rank: int | None = None
    model_id: str | None = None
    revision: str | None = None
    local_files_only: bool = False
    nvfp4_nibbles: str | None = None
    scale_layout: str | None = None
    raw_fp8: bool = False

    def __post_init__(self) -> None:
        """Refuses values nobody knows, whichever way they were typed: an ignored one is a silent one."""
        require_choice("nvfp4_nibbles", self.nvfp4_nibbles, ("low", "high"))
        require_choice("scale_layout", self.scale_layout, ("linear", "tiles"))
        require_choice("quantization_precision", self.quantization_precision, ("int4", "nvfp4"))


def require_choice(flag: str, value: str | None, choices: Sequence[str]) -> None:
    """Raises UsageError when a value was typed that is none of the choices."""
    if value is not None and value not in choices:
        raise UsageError(f"unknown {flag} {value!r}", hint=f"one of: {', '.join(choices)}")


def flag_for(component: str, kind: str) -> str:
    return f"--{component.replace('_', '-')}-{kind}"


def asks_for_quantization(flags: ModelFlags) -> bool:
    return flags.quantization is not None or bool(flags.component_quantizations)


def components_to_quantize(flags: ModelFlags) -> dict[str, object]:
    """Components that words about quantization name."""
    return {**flags.component_quantizations, **flags.component_quantization_ignored_layers}
