"""What was typed about running: device, compute dtype, numerics, kernels, memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from diffquant import ranks, resolve
from diffquant.errors import UsageError
from diffquant.kernels import Numerics
from diffquant.residence import BUDGET, MODES, Mode, Residence, bytes_of

DTYPES = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "float32": "float32",
    "fp32": "float32",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFlags:
    """What was typed about running: device, compute dtype, numerics and kernels.

    pinned  component -> layer -> kernel, from a picture's metadata: run exactly these
    lora    each `[COMPONENT=]SOURCE[:scale]`, all active together
    save_quantized  a folder to write what is quantized while loading to; it must not exist
    offload         where weights live while drawing, with how many blocks ahead and to stay: see
                    `residence`
    compile         the repeated blocks of transformers
    memory_budget   such as 8GiB, for weights that stay decoded where that is faster: see `keeping`
    ulysses_degree  processes that draw one picture together, each on its own device: see `ulysses`
    """

    device: str | None = None
    dtype: str = "bfloat16"
    numerics: Numerics = "auto"
    kernel: str | None = None
    strict: bool = False
    lora: tuple[str, ...] = ()
    save_quantized: str | None = None
    offload: Mode = "none"
    offload_prefetch: int | None = None
    resident_layers: int | None = None
    compile: bool = False
    memory_budget: str | None = None
    ulysses_degree: int | None = None
    pinned: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        resolve.require_choice("numerics", self.numerics, get_args(Numerics))
        resolve.require_choice("dtype", self.dtype, tuple(DTYPES))
        resolve.require_choice("offload", self.offload, MODES)
        Residence.wished(self.offload, self.offload_prefetch, self.resident_layers)
        clashing = {
            "--offload": self.offload != "none",
            "--compile": self.compile,
            "--save-quantized": self.save_quantized is not None,
        }
        ranks.require_sense(self.processes, clashing)
        if self.memory_budget is not None:
            self._require_room(self.memory_budget)

    def _require_room(self, budget: str) -> None:
        """Raises UsageError for a budget that is no size, or beside what leaves it nothing to keep."""
        bytes_of(BUDGET, budget)
        others = {"--compile": self.compile, f"--offload {self.offload}": self.offload != "none"}
        for flag, typed in others.items():
            if typed:
                raise UsageError(
                    f"{BUDGET} keeps weights decoded in memory, and {flag} does not let it",
                    hint=f"leave out {BUDGET} or {flag}",
                )

    @property
    def processes(self) -> int:
        """How many draw one picture."""
        return 1 if self.ulysses_degree is None else self.ulysses_degree

    @property
    def residence(self) -> Residence:
        """Where weights are to live, on whatever device."""
        return Residence.wished(self.offload, self.offload_prefetch, self.resident_layers)
