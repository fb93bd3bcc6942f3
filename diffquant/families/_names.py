"""Namings as tables: the file's name on the left, the module or modules it holds on the right."""

from collections.abc import Mapping

from diffquant.families import Rule

Names = Mapping[str, str | tuple[str, ...]]

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

#: Norms of queries and keys in Black Forest Labs' files. Their weight is called a scale there;
#: ComfyUI's newer files call it .weight.
BFL_DOUBLE_NORMS: Names = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
BFL_SINGLE_NORMS: Names = {
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}


def rules(names: Names, stored: str = "", path: str = "") -> tuple[Rule, ...]:
    """One rule per entry; `stored` and `path` stand before every name of their side."""
    return tuple(
        Rule(stored + old, tuple(path + row for row in ((new,) if isinstance(new, str) else new)))
        for old, new in names.items()
    )


def slices(names: tuple[str, ...], path: str) -> tuple[Rule, ...]:
    """Stored layers that lie side by side along K of one module, in this order."""
    return tuple(Rule(name, (path,), cols=place) for place, name in enumerate(names))


#: The original's output modulation holds (shift, scale), diffusers' module (scale, shift).
FINAL_MODULATION = Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), chunks=(1, 0))
