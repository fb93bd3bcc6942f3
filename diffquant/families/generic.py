"""Any model nobody described: names are taken as they are, the inventory is read from a header.

The planner derives shapes and linears from the stored tensors themselves, so nothing can be said
about fused layers, siblings or sensitive ones.
"""

from collections.abc import Mapping
from typing import Any

from diffquant.families import Family, Inventory, Naming


def inventory(config: Mapping[str, Any]) -> Inventory:
    """Empty: there is no class to know the parameters of."""
    return Inventory(shapes={}, linears=frozenset())


FAMILY = Family(class_names=(), inventory=inventory, namings={"diffusers": Naming()})
