"""The nine published checkpoints as sparse files: true names, shapes and markers, no weights.

What each repository leaves in high precision is data here, with its source. Sizes are real, so a
file of 20 GB takes a few hundred kB of disk.

    python tests/published.py tests/golden      writes the golden plans anew
"""

import json
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from diffquant import headers, planner
from diffquant.families import FAMILIES, Family, Inventory, spelled
from diffquant.headers.safetensors import BITS
from diffquant.patterns import matches
from diffquant.plan import LayerPlan, Plan, to_json
from diffquant.sources import Checkpoint

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
SHARD = 10 * 10**9

FLUX_MODULATION = (
    "transformer_blocks.*.norm1.linear",
    "transformer_blocks.*.norm1_context.linear",
    "single_transformer_blocks.*.norm.linear",
)
FLUX_MLP = ("transformer_blocks.*.ff.net.**", "transformer_blocks.*.ff_context.net.**")
FLUX_TOP = ("x_embedder", "context_embedder", "time_text_embed.**", "norm_out.linear", "proj_out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One repository.

    kept      layers in high precision: NVIDIA's example filter and SGLang's fallback list
    scalar    shape of a scalar scale: ModelOpt writes (), SGLang's converter (1,)
    config    what the base's config.json says beyond the family's defaults
    """

    name: str
    repository: str
    base: str
    flag: str
    family: str
    class_name: str
    encoding: str
    kept: tuple[str, ...]
    scalar: tuple[int, ...] = (1,)
    producer: str = "0.47.0"
    config: Mapping[str, Any] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()


FP8_TABLE = (
    Published(
        name="flux1-dev-fp8",
        repository="lmsys/flux1-dev-modelopt-fp8-sglang-transformer",
        base="black-forest-labs/FLUX.1-dev",
        flag="--transformer-path",
        family="flux1",
        class_name="FluxTransformer2DModel",
        encoding="fp8",
        kept=(*FLUX_TOP, *FLUX_MODULATION, *FLUX_MLP),
        config={"guidance_embeds": True},
        ignore=("transformer_blocks.0.ff.proj_in", "transformer_blocks.0.attn.norm_q"),
    ),
    Published(
        name="flux2-dev-fp8",
        repository="lmsys/flux2-dev-modelopt-fp8-sglang-transformer",
        base="black-forest-labs/FLUX.2-dev",
        flag="--transformer-path",
        family="flux2",
        class_name="Flux2Transformer2DModel",
        encoding="fp8",
        kept=(
            "time_guidance_embed.**",
            "*_stream_modulation*.linear",
            "x_embedder",
            "context_embedder",
            "norm_out.linear",
            "proj_out",
        ),
    ),
    Published(
        name="wan22-t2v-a14b-fp8",
        repository="nvidia/Wan2.2-T2V-A14B-Diffusers-FP8",
        base="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        flag="--model-path",
        family="wan",
        class_name="WanTransformer3DModel",
        encoding="fp8",
        kept=("condition_embedder.**", "proj_out", "blocks.[:3].**", "blocks.[-3:].**"),
        scalar=(),
        producer="0.42.0",
    ),
    Published(
        name="hunyuanvideo-fp8",
        repository="lmsys/hunyuanvideo-modelopt-fp8-sglang-transformer",
        base="hunyuanvideo-community/HunyuanVideo",
        flag="--transformer-path",
        family="hunyuan_video",
        class_name="HunyuanVideoTransformer3DModel",
        encoding="fp8",
        kept=(
            "context_embedder.**",
            "time_text_embed.**",
            "norm_out.linear",
            "proj_out",
            *FLUX_MODULATION,
        ),
        ignore=("double_blocks.0.img_mod.linear", "txt_in.input_embedder"),
    ),
    *(
        Published(
            name=name,
            repository=f"lmsys/{name.removesuffix('-fp8')}-modelopt-fp8-sglang-transformer",
            base=base,
            flag="--transformer-path",
            family="qwen_image",
            class_name="QwenImageTransformer2DModel",
            encoding="fp8",
            kept=(
                "img_in",
                "txt_in",
                "time_text_embed.**",
                "norm_out.linear",
                "proj_out",
                "transformer_blocks.*.*_mod.1",
                "transformer_blocks.*.img_mlp.net.2",
                "transformer_blocks.[:2].**",
                "transformer_blocks.[-2:].**",
            ),
            ignore=("transformer_blocks.0.img_mod",),
        )
        for name, base in (
            ("qwen-image-fp8", "Qwen/Qwen-Image"),
            ("qwen-image-edit-fp8", "Qwen/Qwen-Image-Edit-2511"),
        )
    ),
)
NVFP4_TABLE = (
    Published(
        name="flux1-dev-nvfp4",
        repository="lmsys/flux1-dev-modelopt-nvfp4-sglang-transformer",
        base="black-forest-labs/FLUX.1-dev",
        flag="--transformer-path",
        family="flux1",
        class_name="FluxTransformer2DModel",
        encoding="nvfp4",
        kept=(
            *FLUX_TOP,
            *FLUX_MODULATION,
            *FLUX_MLP,
            "single_transformer_blocks.*.proj_mlp",
        ),
        scalar=(),
        config={"guidance_embeds": True},
    ),
    Published(
        name="flux2-dev-nvfp4",
        repository="black-forest-labs/FLUX.2-dev-NVFP4",
        base="black-forest-labs/FLUX.2-dev",
        flag="--transformer-weights-path",
        family="flux2",
        class_name="Flux2Transformer2DModel",
        encoding="nvfp4",
        # formats_and_peers.md, B2: 48 x 2 single and 8 x 6 double linears are nvfp4
        kept=(
            "time_in.**",
            "guidance_in.**",
            "img_in",
            "txt_in",
            "*_modulation*.lin",
            "final_layer.**",
            "double_blocks.*.txt_attn.*",
        ),
        scalar=(),
    ),
    Published(
        name="wan22-t2v-a14b-nvfp4",
        repository="nvidia/Wan2.2-T2V-A14B-Diffusers-NVFP4",
        base="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        flag="--model-path",
        family="wan",
        class_name="WanTransformer3DModel",
        encoding="nvfp4",
        kept=("condition_embedder.**", "proj_out", "blocks.[:3].**", "blocks.[-3:].**"),
        scalar=(),
        producer="0.42.0",
    ),
)
PUBLISHED = (*FP8_TABLE, *NVFP4_TABLE)


def checkpoint(published: Published, folder: Path) -> Checkpoint:
    """The repository's transformer as sparse files in `folder`, and its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    family = FAMILIES.load(published.family)
    config = {"_class_name": published.class_name, **published.config}
    inventory = family.inventory(config)
    if published.name == "flux2-dev-nvfp4":
        return _bfl(published, family, inventory, folder)
    tensors = dict(_quantized(published, _diffusers(inventory), inventory.linears))
    block = _declaration(published)
    metadata = _header(published, block)
    files = tuple(
        sparse(folder / f"diffusion_pytorch_model-{index:05}.safetensors", part, metadata)
        for index, part in enumerate(_shards(tensors), start=1)
    )
    config["quantization_config"] = block
    return Checkpoint(origin=published.repository, root=folder, files=files, config=config)


def module_config(published: Published) -> dict[str, Any]:
    """The base's config, as an override would be planned with."""
    return {"_class_name": published.class_name, **published.config}


def summary(plan: Plan) -> dict[str, Any]:
    """The compact form that is kept: counts, the first and last layer, and the digest of it all."""
    written = to_json(plan)
    return {
        "digest": plan.digest,
        "format": plan.format,
        "family": plan.family,
        "evidence": list(plan.evidence),
        "notes": list(plan.notes),
        "files": written["files"],
        "layers": len(plan.layers),
        "plain": len(plan.plain),
        "unused": len(plan.unused),
        "open": [question.topic for question in plan.open],
        "pieces": _counted(plan),
        "first": _written(written, plan.quantized[0]),
        "last": _written(written, plan.quantized[-1]),
    }


def sparse(path: Path, tensors: Shapes, metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file whose data is a hole: name -> dtype, shape."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, (dtype, shape) in tensors.items():
        stop = start + prod(shape) * BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + start)
    return path


def fused(family: Family, naming: str, inventory: Inventory) -> dict[str, tuple[int, ...]]:
    """The inventory under another naming's stored names, stacked along N where it fuses modules."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in inventory.shapes.items():
        (stored, *_) = spelled(family.namings[naming], name)
        rows = shapes[stored][0] if stored in shapes else 0
        shapes[stored] = (rows + shape[0], *shape[1:])
    return shapes


def _diffusers(inventory: Inventory) -> dict[str, tuple[int, ...]]:
    return dict(inventory.shapes)


def _quantized(
    published: Published, shapes: Mapping[str, tuple[int, ...]], linears: frozenset[str]
) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    for name, shape in shapes.items():
        stem = name.removesuffix(".weight")
        if (
            not name.endswith(".weight")
            or stem not in linears
            or _is_kept(published, stem, linears)
        ):
            yield name, ("BF16", shape)
            continue
        yield from _layer(published, stem, shape)


def _is_kept(published: Published, stem: str, linears: frozenset[str]) -> bool:
    return any(matches(pattern, stem) for pattern in _spread(published.kept, linears))


def _spread(patterns: tuple[str, ...], linears: frozenset[str]) -> Iterator[str]:
    """`blocks.[:3]` and `blocks.[-3:]` as block numbers."""
    for pattern in patterns:
        head, bracket, tail = pattern.partition("[")
        if not bracket:
            yield pattern
            continue
        start, _, rest = tail.partition(":")
        stop, _, leaf = rest.partition("]")
        numbers = {int(n[len(head) :].split(".")[0]) for n in linears if n.startswith(head)}
        for number in sorted(numbers)[
            slice(int(start) if start else None, int(stop) if stop else None)
        ]:
            yield f"{head}{number}{leaf}"


def _layer(
    published: Published, stem: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    rows, columns = shape
    if published.encoding == "fp8":
        yield f"{stem}.weight", ("F8_E4M3", shape)
        yield f"{stem}.weight_scale", ("F32", published.scalar)
    else:
        yield f"{stem}.weight", ("U8", (rows, columns // 2))
        yield f"{stem}.weight_scale", ("F8_E4M3", (rows, columns // 16))
        yield f"{stem}.weight_scale_2", ("F32", published.scalar)
    yield f"{stem}.input_scale", ("F32", published.scalar)


def _declaration(published: Published) -> dict[str, Any]:
    algorithm = published.encoding.upper()
    block: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": list(published.ignore),
        "producer": {"name": "modelopt", "version": published.producer},
    }
    if published.repository.startswith("lmsys/"):
        block["quant_type"] = algorithm
        if published.encoding == "nvfp4":
            block["swap_weight_nibbles"] = False
    return block


def _header(published: Published, block: Mapping[str, Any]) -> dict[str, str]:
    """SGLang's converters write the configuration twice into every shard; NVIDIA's repos do not."""
    if not published.repository.startswith("lmsys/"):
        return {"format": "pt"}
    text = json.dumps(block)
    return {"format": "pt", "quantization_config": text, "_quantization_metadata": text}


def _shards(tensors: Shapes) -> Iterator[Shapes]:
    shard: dict[str, tuple[str, tuple[int, ...]]] = {}
    size = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = prod(shape) * BITS[dtype] // 8
        if size + nbytes > SHARD:
            yield shard
            shard, size = {}, 0
        shard[name] = (dtype, shape)
        size += nbytes
    yield shard


def _bfl(published: Published, family: Family, inventory: Inventory, folder: Path) -> Checkpoint:
    """One file in BFL's names, layers listed in the header, no config.json."""
    shapes = fused(family, "bfl", inventory)
    matrices = frozenset(
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    )
    tensors = dict(_quantized(published, shapes, matrices))
    named = [name.removesuffix(".weight") for name, (dtype, _) in tensors.items() if dtype == "U8"]
    said = {"format_version": "1.0", "layers": {name: {"format": "nvfp4"} for name in named}}
    path = sparse(
        folder / "flux2-dev-nvfp4.safetensors",
        tensors,
        {"_quantization_metadata": json.dumps(said)},
    )
    return Checkpoint(origin=published.repository, root=folder, files=(path,))


def _counted(plan: Plan) -> dict[str, int]:
    """How many pieces are stored how, with which activation."""
    spelled_out = (
        f"{piece.encoding} {piece.activation or 'weight-only'}"
        for layer in plan.layers
        for piece in layer.pieces
    )
    return dict(sorted(Counter(spelled_out).items()))


def _written(written: Mapping[str, Any], layer: LayerPlan) -> Any:
    return next(item for item in written["layers"] if item["path"] == layer.path)


def main(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for published in PUBLISHED:
            source = checkpoint(published, Path(folder) / published.name)
            header = headers.read(source.files)
            made = planner.plan(source, header, config=module_config(published))
            text = json.dumps(summary(made), indent=1) + "\n"
            (target / f"{published.name}.plan.json").write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
