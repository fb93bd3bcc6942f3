"""The truth line: how many linears of a component are what, through which kernel."""

from collections import Counter

from diffquant.kernels import Choice, wanted
from diffquant.plan import DENSE, LayerPlan, Plan


def tally(plan: Plan, choices: tuple[Choice, ...]) -> str:
    """`25/34 linears fp8 via cpu_fp8, 9 bf16`: numbers from the plan, kernels from the choices."""
    kernels = {choice.path: choice for choice in choices}
    total = len(plan.layers)
    counted = Counter(_way(layer, kernels[layer.path]) for layer in plan.quantized)
    plain = Counter(_short(layer.dtype) for layer in plan.layers if layer not in plan.quantized)
    quantized = [f"{count}/{total} linears {way}" for way, count in counted.items()]
    rest = [f"{count} {dtype}" for dtype, count in plain.items()]
    return ", ".join([*(quantized or [f"0/{total} linears quantized"]), *rest])


def _way(layer: LayerPlan, choice: Choice) -> str:
    names = "+".join(name for name in layer.encodings if name != DENSE.name)
    if any(piece.recode for piece in layer.pieces):
        names += " (online)"
    return f"{names} via {choice.kernel}{_arithmetic(layer, choice)}"


def _arithmetic(layer: LayerPlan, choice: Choice) -> str:
    """Said only where the file asks for quantized activations: whether it gets them."""
    asked = [wanted(piece) for piece in layer.pieces]
    if not any(asked):
        return ""
    if all(spec.activation is None for spec in choice.specs):
        return " (weight-only)"
    return (
        " (activations emulated)" if "reference" in choice.kernels else " (activations quantized)"
    )


def _short(dtype: str) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(dtype, dtype)
