"""Any model nobody described: names are taken as they are, the inventory is read from a header.

The planner derives shapes and linears from the stored tensors themselves, so nothing can be said
about fused layers, siblings or sensitive ones. Whatever calls itself an embedding stays plain: many
embeddings are tables, and the linears among them are those that every list of exceptions names.
"""

from diffquant.families import Family, Naming, told_by_header

FAMILY = Family(
    class_names=(),
    inventory=told_by_header,
    namings={"diffusers": Naming()},
    tables=("**.*embed*.**", "shared", "**.relative_attention_bias"),
)
