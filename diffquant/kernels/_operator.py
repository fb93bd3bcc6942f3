"""Kernels behind one torch operator, so that `torch.compile` sees a call it need not look into.

    diffquant::multiply(x [M, K], parts, text) -> [M, N]

`text` names the kernel and the spec; the built product and the order of its parts are found by it.
"""

from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from diffquant.errors import RunError
from diffquant.kernels import KERNELS, Spec
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor

    from diffquant.kernels import Multiply, Parts

_built: dict[str, tuple["Multiply", tuple[Role, ...], int, bool]] = {}


class _Product:
    """One call of the operator. Copied or sent to another process, it is built anew there."""

    def __init__(self, kernel: str, spec: Spec, roles: tuple[Role, ...], text: str) -> None:
        self._made_of = kernel, spec
        self._roles = roles
        self._text = text
        self._operator = _operator()

    def __call__(self, x_MK: "Tensor", parts: "Parts") -> "Tensor":
        product: Tensor = self._operator(x_MK, [parts[role] for role in self._roles], self._text)
        return product

    def __reduce__(self) -> tuple[Any, ...]:
        return multiplier, self._made_of


def multiplier(kernel: str, spec: Spec) -> "Multiply":
    """The kernel's product for this spec, as a call of the operator."""
    text = _text(kernel, spec)
    if text not in _built:
        roles = tuple(sorted(spec.roles))
        found = KERNELS.load(kernel)
        _built[text] = (found.build(spec), roles, spec.shape_NK[0], found.float32)
    return _Product(kernel, spec, _built[text][1], text)


def _text(kernel: str, spec: Spec) -> str:
    n, k = spec.shape_NK
    roles = ",".join(sorted(spec.roles))
    return f"{kernel}|{spec.encoding}|{spec.activation or 'none'}|{n}x{k}|{roles}"


@cache
def _operator() -> Any:
    """Registers the operator on first use; torch is imported here and not with the package."""
    import torch

    def multiply(x: torch.Tensor, parts: list[torch.Tensor], text: str) -> torch.Tensor:
        product, roles, _, _ = _built[text]
        return product(x, dict(zip(roles, parts, strict=True)))

    def shape_only(x: torch.Tensor, parts: list[torch.Tensor], text: str) -> torch.Tensor:
        _, _, columns, float32 = _built[text]
        return x.new_empty(x.shape[0], columns, dtype=torch.float32 if float32 else x.dtype)

    def backward(context: Any, gradient: torch.Tensor) -> NoReturn:
        raise RunError(
            "gradients do not pass through encoded weights",
            hint="train the LoRA on the dense model; it is loaded here by --lora",
        )

    registered = torch.library.custom_op("diffquant::multiply", multiply, mutates_args=())
    registered.register_fake(shape_only)
    registered.register_autograd(backward)
    return registered
