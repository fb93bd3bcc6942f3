"""Layer by layer: is the file faithful, is the kernel faithful, and where does the error come from.

    weight   the decoded weight against the base's, without a forward (`diffquant.fidelity`)
    kernel   the layer as it runs against the `reference` kernel on the same captured inputs: the
             same parts, the same quantization of activations, so only the kernel differs
    output   what the layer gives against what the reference's gave, inside one forward of the
             whole transformer on the reference's own inputs: errors of the layers before are in it

All three are relative: ‖difference‖ / ‖reference‖.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffquant.compare.metrics import Distance, distance
from diffquant.compare.trajectory import Call, Capture, Progress, ask, sampled
from diffquant.fidelity import BIAS, LEFT, LayerFidelity, compare_plans, layer_fidelity, ranked
from diffquant.kernels import KERNELS, spec_of
from diffquant.kernels._operator import multiplier
from diffquant.linear import QuantLinear
from diffquant.loading import DryRun
from diffquant.pieces import decoded, dense
from diffquant.plan import Plan, Role
from diffquant.rotation import rotated
from diffquant.settle import of_checkpoint, settle
from diffquant.tensors import Weights

REFERENCE = "reference"
#: Rows of an input that a kernel is judged on.
ROWS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One linear of a candidate; figures are None where they do not apply.

    path    with its component in front: transformer.blocks.0.attn.to_q
    choice  the kernel, and how activations are quantized
    """

    path: str
    encoding: str
    choice: str
    weight: LayerFidelity | None = None
    kernel: float | None = None
    output: float | None = None

    def to_json(self) -> dict[str, Any]:
        told = asdict(self)
        return {**told, "weight": None if self.weight is None else self.weight.to_json()}


@dataclass(frozen=True, slots=True, kw_only=True)
class OneStep:
    """A transformer's answer to one of the reference's own questions; errors do not compound."""

    component: str
    step: int
    distance: Distance


def outputs(
    modules: Mapping[str, nn.Module], calls: Sequence[Call], blobs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A sample of what every linear gives in one forward, by component and path."""
    found: dict[str, Tensor] = {}

    def keep(path: str, module: nn.Module, rows: Tensor, output: Tensor) -> None:
        found.setdefault(path, sampled(output))

    for call in calls:
        with _linears_watched(call.component, modules[call.component], keep):
            _ = ask(modules[call.component], call, blobs, _device(modules[call.component]))
    return found


def one_step(
    modules: Mapping[str, nn.Module], reference: Capture, on_progress: Progress
) -> tuple[OneStep, ...]:
    """Every kept call of the reference, asked again."""
    answers = []
    calls = [call for call in reference.calls if call.component in modules]
    for index, call in enumerate(calls, start=1):
        module = modules[call.component]
        given = ask(module, call, reference.blobs, _device(module))
        answers.append(
            OneStep(
                component=call.component,
                step=call.step,
                distance=distance(reference.blobs[call.output], given),
            )
        )
        on_progress("asking the reference's questions", index, len(calls))
    return tuple(answers)


def layers(
    dry: DryRun,
    modules: Mapping[str, nn.Module],
    reference: Capture,
    weights: Mapping[str, LayerFidelity],
) -> tuple[Layer, ...]:
    """Every linear of the candidate in the order of the plan, with its three figures."""
    kernels: dict[str, float] = {}
    given: dict[str, float] = {}

    def judge(path: str, module: nn.Module, rows: Tensor, output: Tensor) -> None:
        if path in given:
            return
        there = reference.layers.get(path)
        ours = sampled(output)
        if there is not None and there.shape == ours.shape:
            given[path] = distance(there, ours).relative_l2
        if isinstance(module, QuantLinear):
            kernels[path] = kernel_error(module, dry, path, rows)

    for call in reference.middle_calls(modules):
        with _linears_watched(call.component, modules[call.component], judge):
            _ = ask(
                modules[call.component], call, reference.blobs, _device(modules[call.component])
            )
    return tuple(
        Layer(
            path=path,
            encoding=encoding,
            choice=choice,
            weight=weights.get(path),
            kernel=kernels.get(path),
            output=given.get(path),
        )
        for path, encoding, choice in _planned(dry)
    )


def kernel_error(module: QuantLinear, dry: DryRun, path: str, rows: Tensor) -> float:
    """The layer's chosen kernel against `reference`, on at most ROWS rows of a captured input."""
    component, _, inside = path.partition(".")
    choice = next(each for each in dry.choices[component] if each.path == inside)
    if set(choice.kernels) == {REFERENCE}:
        return 0.0
    flat = rows.reshape(-1, module.in_features)
    few = flat[:: max(1, -(-flat.shape[0] // ROWS))]
    with torch.inference_mode():
        truth, ours = (
            _by_reference(module, [spec.activation for spec in choice.specs])(few),
            module.forward(few),
        )
    return distance(truth, ours).relative_l2


def weights_answer(
    candidate: DryRun, reference: DryRun, modules: Mapping[str, nn.Module]
) -> dict[str, LayerFidelity]:
    """Decoded weights of every component that differs from the base's, by component and path; one
    that the base's pipeline loads by itself, such as a VAE, has no plan to be held against.

    Weights quantized while loading lie in no file: they are decoded from the `modules`.
    """
    found: dict[str, LayerFidelity] = {}
    for component, plan in candidate.plans.items():
        if component not in reference.plans:
            continue
        base = _settled(reference, component, reference.plans[component])
        if _is_recoded(plan):
            measured = tuple(ranked(list(_online_weights(modules[component], base))))
        elif base.files == plan.files:
            continue
        else:
            measured = compare_plans(_settled(candidate, component, plan), base)
        found |= {f"{component}.{each.path}": each for each in measured}
    return found


def defects_of(weights: Mapping[str, LayerFidelity]) -> Iterator[str]:
    """Sentences about layers that were not quantized badly but read or written wrongly."""
    for path, each in weights.items():
        if each.suspicion == LEFT or not each.is_outlier():
            continue
        lost = _lost(each)
        said = f" ({each.suspicion})" if each.suspicion else f", {each.factor:.1f} times its like"
        yield f"{path}{lost}{said}"


def _lost(each: LayerFidelity) -> str:
    if each.fidelity is None:
        return ""
    if each.bias_error > BIAS:
        return f": bias error {each.bias_error:.3g}"
    return f": weight error {each.fidelity.relative_error:.3g}"


def _is_recoded(plan: Plan) -> bool:
    return any(piece.recode for layer in plan.layers for piece in layer.pieces)


def _online_weights(module: nn.Module, base: Plan) -> Iterator[LayerFidelity]:
    """Every layer that was quantized while loading, decoded, against the base's file."""
    weights = Weights([Path(file.path) for file in base.files])
    by_path = {layer.path: layer for layer in base.layers}
    for name, linear in module.named_modules():
        if isinstance(linear, QuantLinear):
            path = _own(name)
            truth_NK = dense(by_path[path], weights)[0]
            yield LayerFidelity(
                path=path,
                encoding="+".join(linear.layer.encodings),
                fidelity=layer_fidelity(truth_NK, _decoded(linear)),
            )


def _decoded(linear: QuantLinear) -> Tensor:
    """W [N, K] of a recoded layer: its codes decoded, plus its low-rank branch."""
    weight_NK = torch.zeros(linear.out_features, linear.in_features)
    for index, piece in enumerate(linear.layer.pieces):
        parts = {role: part.cpu() for role, part in linear.parts(index).items()}
        found = decoded(replace(piece, encoding=piece.runs_as), parts)
        if piece.lowrank_input is not None:
            found += parts[Role.LOWRANK_UP].float() @ parts[Role.LOWRANK_DOWN].float()
        weight_NK[piece.out.as_slice(), piece.cols.as_slice()] += rotated(found, piece.rotation)
    return weight_NK


def _by_reference(module: QuantLinear, activations: Sequence[Any]) -> QuantLinear:
    """The same layer through the reference kernel; nothing is copied."""
    products = [
        multiplier(REFERENCE, spec_of(piece, activation))
        for piece, activation in zip(module.layer.pieces, activations, strict=True)
    ]
    return QuantLinear(
        module.layer,
        [module.parts(index) for index in range(len(products))],
        products,
        bias=module.bias,
        dtype=module.weight.dtype,
        float32=KERNELS.load(REFERENCE).float32,
    )


def _planned(dry: DryRun) -> Iterator[tuple[str, str, str]]:
    """Path, encoding and choice of every linear."""
    for component, plan in dry.plans.items():
        choices = {choice.path: choice for choice in dry.choices[component]}
        for layer in plan.layers:
            choice = choices[layer.path]
            activations = [str(each.activation) for each in choice.specs if each.activation]
            said = " on ".join([choice.kernel, *dict.fromkeys(activations)])
            yield f"{component}.{layer.path}", "+".join(layer.encodings), said


def _settled(dry: DryRun, component: str, plan: Plan) -> Plan:
    source = dry.resolution.components[component]
    return settle(plan, of_checkpoint(source.base, source.config) if plan.open else None)


@contextmanager
def _linears_watched(
    component: str, model: nn.Module, tell: Callable[[str, nn.Module, Tensor, Tensor], None]
) -> Iterator[None]:
    """`tell(path, module, input, output)` for every linear that runs."""

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                tell(path, module, args[0], output)

        return after

    handles = [
        module.register_forward_hook(hook(f"{component}.{_own(path)}"))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _own(path: str) -> str:
    """PEFT puts a layer that carries a LoRA one name deeper."""
    return path.removesuffix(".base_layer")


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
