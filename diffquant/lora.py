"""LoRA beside encoded weights: y = layer(x) + scale * B (A x), through PEFT and never merged.

PEFT wraps a QuantLinear as it wraps any nn.Linear, so adapters come, change weight and go by
diffusers' own methods. What breaks on a weight that does not exist is mended or refused here:
diffusers looks shapes up in `state_dict()`, merging adds to `.weight`, fusing projections copies it,
and DoRA divides by its norm.
"""

import json
import logging
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor, nn

from diffquant.adapters import file_of, parsed
from diffquant.errors import SourceError, UsageError
from diffquant.linear import QuantLinear
from diffquant.visiting import visiting

#: Where the path of a module ends in the name of a tensor, in every spelling diffusers hands on.
ADAPTER_TENSOR = re.compile(r"\.(?:lora_A|lora_B|lora_magnitude_vector|lora\.|lokr_)")
#: How names begin that diffusers' converters understand.
SPOKEN = ("transformer.", "text_encoder", "diffusion_model.", "lora_", "unet.")
ORG_REPO = 2  # parts of what the hub calls a repository
PEFT_PREFIX = "base_model.model."
#: What diffusers and PEFT call the file in a LoRA's folder.
USUAL = ("pytorch_lora_weights", "adapter_model")
PROBES = 16  # rows of noise that measure a change
PROBE_SEED = (
    20261121  # of no training run: a LoRA drawn from the same noise would seem to be larger
)
NOT_MERGED = "weights stay encoded, and a merged one would be rounded away or NaN"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What one LoRA found in the pipeline.

    matched    modules it changes, with the component: "transformer.blocks.0.attn1.to_q"
    unmatched  modules it speaks of that the pipeline does not have
    encoded    how many of the matched ones keep an encoded weight
    change     ||scale B A x|| / ||W x|| on noise x, over all matched linears
    """

    name: str
    source: str
    scale: float
    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    encoded: int
    change: float

    def __str__(self) -> str:
        missed = f", first {self.unmatched[0]!r}" if self.unmatched else ""
        return (
            f"lora {self.name} x {self.scale:g}: {len(self.matched)} matched ({self.encoded} "
            f"encoded), {len(self.unmatched)} not matched{missed}; changes them by "
            f"{self.change:.2%}"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_ADAPTERS: "weakref.WeakKeyDictionary[Any, dict[str, Adapter]]" = weakref.WeakKeyDictionary()


def prepare(pipeline: Any) -> None:
    """Let the pipeline's own LoRA methods work on encoded layers; what cannot is refused with why."""
    encoded = {name: model for name, model in _models(pipeline).items() if _is_encoded(model)}
    for name, model in encoded.items():
        _refuse_merging(name, model)
    if encoded and hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights = _Loader(pipeline)


def load(pipeline: Any, typed: Sequence[str], *, local_files_only: bool = False) -> None:
    """Load every `[COMPONENT=]SOURCE[:scale]` and activate all of them together.

    Raises SourceError for what cannot be found, and UsageError where nothing matches.
    """
    typed = (typed,) if isinstance(typed, str) else typed
    if typed and not hasattr(pipeline, "load_lora_weights"):
        raise UsageError(f"a {type(pipeline).__name__} takes no LoRA")
    scales: dict[str, float] = {}
    for text in typed:
        asked = parsed(text)
        file = file_of(asked.source, local_files_only=local_files_only)
        name = _unused(_called(file), scales)
        second: dict[str, Any] = (
            {"load_into_transformer_2": True} if asked.component == "transformer_2" else {}
        )
        respelled = _respelled(pipeline, file)
        where: dict[str, Any] = (
            {"weight_name": file.name} if respelled is None else {"told": asked.source}
        )
        _Loader(pipeline)(
            str(file.parent) if respelled is None else respelled,
            adapter_name=name,
            scale=asked.scale,
            **where,
            **second,
        )
        scales[name] = asked.scale
    if scales:
        pipeline.set_adapters(list(scales), list(scales.values()))


def adapters(pipeline: Any) -> tuple[Adapter, ...]:
    """Every adapter that was loaded into the pipeline and not unloaded since."""
    present = {name for names in pipeline.get_list_adapters().values() for name in names}
    return tuple(item for name, item in _ADAPTERS.get(pipeline, {}).items() if name in present)


class _Loader:
    """`load_lora_weights` of one pipeline, with a count of what matched."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = weakref.ref(pipeline)

    def __call__(
        self,
        source: Any,
        adapter_name: str | None = None,
        *,
        scale: float = 1.0,
        told: str | None = None,
        **options: Any,
    ) -> None:
        """As diffusers' own; `scale` and `told`, the source's name, are for the report only."""
        pipeline: Any = self._pipeline()
        told = told or ("tensors" if isinstance(source, Mapping) else str(source))
        if file := options.get("weight_name"):
            told = f"{told}/{file}"
        target = "transformer_2" if options.get("load_into_transformer_2") else "transformer"
        tensors = _converted(pipeline, source, options)
        wanted = _modules_of(tensors, target)
        matched = _matched(pipeline, wanted)
        unmatched = tuple(path for path in wanted if path not in matched)
        _require_a_match(pipeline, told, matched, unmatched)
        for path, module in matched.items():
            if isinstance(module, QuantLinear):
                _require_fit(path, module, wanted[path], tensors)
        name = adapter_name or f"default_{_count(pipeline, target)}"
        with _weights_in_state_dicts(_models(pipeline).values()), _misfits_told(pipeline, told):
            type(pipeline).load_lora_weights(pipeline, source, adapter_name=name, **options)
        _ADAPTERS.setdefault(pipeline, {})[name] = Adapter(
            name=name,
            source=told,
            scale=scale,
            matched=tuple(matched),
            unmatched=unmatched,
            encoded=sum(isinstance(module, QuantLinear) for module in matched.values()),
            change=scale
            * _change(
                [_layer(pipeline, path) for path in matched], name, pipeline._execution_device
            ),
        )


# ---------------------------------------------------------------------------------------- matching


def _converted(pipeline: Any, source: Any, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The file's tensors under diffusers' names, by diffusers' own converters of this pipeline."""
    copied = dict(source) if isinstance(source, Mapping) else source
    _require_there(source)
    wanted = {key: value for key, value in options.items() if key in _FETCHING}
    try:
        converted: dict[str, Tensor] = pipeline.lora_state_dict(copied, **wanted)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"diffusers' converter for a {type(pipeline).__name__} does not understand the names in "
            f"the LoRA: {type(error).__name__} {error}",
            hint="see `diffquant inspect BASE --lora FILE` for what they are",
        ) from error
    return converted


def _require_there(source: Any) -> None:
    """Raises SourceError for a path that leads nowhere, which diffusers would ask the hub for."""
    if not isinstance(source, str | Path):
        return
    path = Path(source)
    is_path = path.is_absolute() or path.suffix == ".safetensors" or len(path.parts) > ORG_REPO
    if is_path and not path.exists():
        raise SourceError(
            f"there is no LoRA {str(source)!r}", hint="a .safetensors file, a folder, or org/repo"
        )


_FETCHING = frozenset(
    {"weight_name", "subfolder", "revision", "cache_dir", "local_files_only", "token", "proxies"}
    | {"use_safetensors", "force_download"}
)


def _modules_of(tensors: Mapping[str, Tensor], target: str) -> dict[str, str]:
    """Modules the tensors are for, with the component they go to -> how the tensors call them."""
    stored = dict.fromkeys(
        ADAPTER_TENSOR.split(name)[0] for name in tensors if ADAPTER_TENSOR.search(name)
    )
    return {re.sub(r"^transformer\.", f"{target}.", path): path for path in stored}


def _matched(pipeline: Any, wanted: Iterable[str]) -> dict[str, nn.Module]:
    """Those modules the pipeline has, without the wrappers of earlier adapters."""
    found = {path: _layer(pipeline, path) for path in wanted}
    return {
        path: getattr(module, "base_layer", module)
        for path, module in found.items()
        if module is not None
    }


def _layer(pipeline: Any, path: str) -> nn.Module | None:
    component, _, inside = path.partition(".")
    model = _models(pipeline).get(component)
    if model is None:
        return None
    named = dict(model.named_modules())
    return named.get(inside, named.get(inside.removeprefix("text_model.")))


def _require_a_match(
    pipeline: Any, source: str, matched: Mapping[str, nn.Module], unmatched: Sequence[str]
) -> None:
    if matched:
        return
    spoken = f"it speaks of {unmatched[0]!r}" if unmatched else "it holds no LoRA tensors"
    raise UsageError(
        f"nothing in the LoRA {source!r} matches a layer of the {type(pipeline).__name__}: {spoken}",
        hint="is it a LoRA of another model? see `diffquant inspect BASE --lora FILE`",
    )


def _require_fit(path: str, layer: QuantLinear, stored: str, tensors: Mapping[str, Tensor]) -> None:
    """diffusers pads a LoRA that reads fewer columns, and lets a layer grow for one that reads more;
    an encoded layer cannot grow."""
    if f"{stored}.lora_magnitude_vector" in tensors:
        raise UsageError(
            f"the LoRA is a DoRA: it divides by the norm of {path!r}, whose weight is encoded",
            hint="load it on the base without quantization, or take a plain LoRA",
        )
    down, up = (tensors.get(f"{stored}.lora_{side}.weight") for side in "AB")
    if down is None or up is None:
        return
    if down.shape[1] > layer.in_features or up.shape[0] != layer.out_features:
        raise UsageError(
            f"the LoRA is for {path!r} of {up.shape[0]}x{down.shape[1]}, and it is "
            f"{layer.out_features}x{layer.in_features} here; an encoded layer cannot grow",
            hint="is it of another model? a control LoRA needs that layer left dense",
        )


def _count(pipeline: Any, component: str) -> int:
    return len(getattr(getattr(pipeline, component, None), "peft_config", None) or {})


def _called(file: Path) -> str:
    """The file's name, or its folder's where every tool writes that file name."""
    return file.parent.name if file.stem in USUAL else file.stem


def _unused(stem: str, taken: Mapping[str, float]) -> str:
    """A name PEFT accepts as the name of a module, not given yet."""
    plain = re.sub(r"\W+", "_", stem) or "lora"
    return next(
        name
        for name in (plain, *(f"{plain}_{number}" for number in range(2, len(taken) + 3)))
        if name not in taken
    )


def _respelled(pipeline: Any, file: Path) -> dict[str, Tensor] | None:
    """Tensors of a file whose names carry no component: PEFT's own files, diffusers' and original
    module names alone. None for names that diffusers' converters know."""
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
        if all(name.startswith(SPOKEN) for name in names):
            return None
        modules = {path for path, _ in pipeline.transformer.named_modules()}
        stems = {ADAPTER_TENSOR.split(name.removeprefix(PEFT_PREFIX))[0] for name in names}
        if not stems & modules:
            bare = not any(name.startswith((*SPOKEN, PEFT_PREFIX)) for name in names)
            prefix = "diffusion_model."
            return {prefix + name: opened.get_tensor(name) for name in names} if bare else None
        scale = _peft_scale(file)
        return {
            f"transformer.{name.removeprefix(PEFT_PREFIX)}": opened.get_tensor(name)
            * (scale if ".lora_B" in name else 1)
            for name in names
        }


def _peft_scale(file: Path) -> float:
    """lora_alpha / r of the adapter_config.json beside the file, which PEFT does not fold in."""
    config = file.with_name("adapter_config.json")
    if not config.is_file():
        return 1.0
    told = json.loads(config.read_text(encoding="utf-8"))
    rank = float(told["r"]) ** (0.5 if told.get("use_rslora") else 1)
    return float(told["lora_alpha"]) / rank


# ------------------------------------------------------------------------------------------- change


def _change(layers: Sequence[nn.Module | None], adapter: str, device: torch.device) -> float:
    """||B A x|| / ||W x|| over all linears, PEFT's own scaling included, on the same noise x each."""
    changed = whole = 0.0
    for layer in layers:
        lora_a = getattr(layer, "lora_A", None)
        if (
            layer is None
            or lora_a is None
            or adapter not in lora_a
            or not isinstance(lora_a[adapter], nn.Linear)
        ):
            continue
        # Weights may wait elsewhere, and kernels were chosen for the device.
        with visiting(layer, device):
            ours, theirs = _norms(layer, adapter)
        changed, whole = changed + ours, whole + theirs
    return (changed / whole) ** 0.5 if whole else 0.0


@torch.inference_mode()
def _norms(layer: Any, adapter: str) -> tuple[float, float]:
    base, down, up = layer.get_base_layer(), layer.lora_A[adapter], layer.lora_B[adapter]
    noise = torch.randn(
        PROBES, base.in_features, generator=torch.Generator().manual_seed(PROBE_SEED)
    )
    # Offloaded to nowhere: accelerate's hooks bring the weights, and the noise to them.
    device = "cpu" if base.weight.is_meta else base.weight.device
    x_MK = noise.to(device, base.weight.dtype)
    whole = base(x_MK).float() - base(torch.zeros_like(x_MK[:1])).float()
    change = layer.scaling[adapter] * up(down(x_MK.to(down.weight.dtype))).float()
    return float(change.square().sum()), float(whole.square().sum())


# ------------------------------------------------------------------------------------- encoded models


def _models(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def _is_encoded(model: nn.Module) -> bool:
    return any(isinstance(module, QuantLinear) for module in model.modules())


@contextmanager
def _misfits_told(pipeline: Any, told: str) -> Iterator[None]:
    """Dense layers are fitted by diffusers alone, which may widen them. Of those it cannot, its log
    and torch's error list every one; here the first of them is said once."""
    log = logging.getLogger("diffusers.loaders.peft")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except RuntimeError as error:
        misfits = [line.strip() for line in str(error).splitlines() if "size" in line]
        if not misfits or type(error) is not RuntimeError:  # a subclass: no memory left
            raise
        more = f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else ""
        raise UsageError(
            f"the LoRA {told!r} does not fit the {type(pipeline).__name__}: {misfits[0]}{more}",
            hint="is it a LoRA of another model? see `diffquant inspect BASE --lora FILE`",
        ) from error
    finally:
        log.setLevel(level)


@contextmanager
def _weights_in_state_dicts(models: Iterable[nn.Module]) -> Iterator[None]:
    """diffusers looks the shape of every base weight up in `state_dict()`, where encoded ones are
    not; only for that look do they appear, so that nothing can save them."""
    with ExitStack() as stack:
        for model in models:
            for layer in model.modules():
                if isinstance(layer, QuantLinear):
                    shown = layer.register_state_dict_post_hook(_show_weight)  # type: ignore[no-untyped-call]
                    stack.callback(shown.remove)
        yield


def _show_weight(layer: QuantLinear, state: dict[str, Any], prefix: str, _: Any) -> None:
    state[f"{prefix}weight"] = layer.weight


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A method that is refused; a module that holds one can be copied and pickled."""

    what: str
    instead: str

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise UsageError(f"{self.what}: {NOT_MERGED}", hint=self.instead)


def _refuse_merging(component: str, model: Any) -> None:
    refusals = {
        "fuse_lora": _Refusal(
            f"a LoRA cannot be fused into {component!r}",
            "leave fuse_lora() out; the adapter works as it is, set_adapters() weighs it",
        ),
        "fuse_qkv_projections": _Refusal(
            f"projections of {component!r} cannot be fused",
            "leave fuse_qkv_projections() out; it changes speed only",
        ),
    }
    for name, refusal in refusals.items():
        if hasattr(model, name):
            setattr(model, name, refusal)
