"""Namings as tables: the file's name on the left, the module or modules it holds on the right."""

from collections.abc import Mapping

from diffquant.families import Rule

Names = Mapping[str, str | tuple[str, ...]]

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


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
