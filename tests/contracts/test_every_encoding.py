"""What every encoding promises. A new file in `encodings/` is tested on arrival."""

import pytest
import torch

from diffquant.encodings import ENCODINGS, Codec, Recipe
from diffquant.errors import DiffquantError
from diffquant.plan import Encoding, Role

NAMES = ENCODINGS.names()
WRITABLE = [name for name in NAMES if ENCODINGS.load(name).encode is not None]
SHAPE = (12, 512)


def written(codec: Codec, name: str, values: torch.Tensor) -> dict[Role, torch.Tensor]:
    """The values encoded by tensor where that is a complete set of scales, by group otherwise."""
    assert codec.encode is not None
    simple = frozenset({Role.TENSOR_SCALE}) in codec.scales
    recipe = Recipe(granularity="tensor" if simple else "group", group=codec.group)
    return codec.encode(values, Encoding(name), recipe)


@pytest.mark.parametrize("name", NAMES)
def test_its_docstring_is_a_byte_table(name: str) -> None:
    module = __import__(f"{ENCODINGS.package}.{name}", fromlist=["CODEC"])
    roles = {role for wanted in ENCODINGS.load(name).scales for role in wanted}
    assert all(role in (module.__doc__ or "") for role in {Role.CODES} | roles)


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_is_complete(name: str) -> None:
    codec = ENCODINGS.load(name)
    assert codec.bits > 0
    assert codec.code_dtypes
    assert all(codec.is_complete(Encoding(name), wanted | {Role.CODES}) for wanted in codec.scales)
    if frozenset() not in codec.scales:
        assert not codec.is_complete(Encoding(name), frozenset({Role.CODES}))


@pytest.mark.parametrize("name", NAMES)
def test_waived_scales_are_waived_by_their_option_alone(name: str) -> None:
    codec = ENCODINGS.load(name)
    for option, roles in codec.waived.items():
        key, value = option.split("=")
        rest = max(codec.scales, key=len) - roles
        assert codec.is_complete(Encoding(name, ((key, value),)), rest)
        assert not codec.is_complete(Encoding(name), rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WRITABLE)
def test_what_it_encodes_it_decodes(name: str, dtype: torch.dtype) -> None:
    codec = ENCODINGS.load(name)
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = written(codec, name, values)
    weight = codec.decode(parts, Encoding(name), SHAPE)
    assert weight.dtype == torch.float32
    assert weight.shape == SHAPE
    assert codec.is_complete(Encoding(name), frozenset(parts))
    # By tensor, four bits leave a fifth of the weight; by group or with eight bits far less.
    assert (weight - values.float()).norm() / values.float().norm() < (
        0.25 if codec.bits < 8 else 0.05
    )


@pytest.mark.parametrize("name", WRITABLE)
def test_encoding_again_changes_nothing(name: str) -> None:
    codec = ENCODINGS.load(name)
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    once = codec.decode(written(codec, name, values), Encoding(name), SHAPE)
    twice = codec.decode(written(codec, name, once), Encoding(name), SHAPE)
    assert torch.allclose(once, twice, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", WRITABLE)
def test_zeros_are_zeros(name: str) -> None:
    codec = ENCODINGS.load(name)
    weight = codec.decode(written(codec, name, torch.zeros(SHAPE)), Encoding(name), SHAPE)
    assert torch.equal(weight, torch.zeros(SHAPE))


@pytest.mark.parametrize("name", WRITABLE)
def test_the_weight_is_not_touched_by_encoding(name: str) -> None:
    values = torch.randn(SHAPE)
    before = values.clone()
    written(ENCODINGS.load(name), name, values)
    assert torch.equal(values, before)


@pytest.mark.parametrize("name", [name for name in WRITABLE if name != "dense"])
def test_a_missing_scale_never_decodes(name: str) -> None:
    codec = ENCODINGS.load(name)
    parts = written(codec, name, torch.randn(SHAPE))
    for role in set(parts) - {Role.CODES} - codec.optional:
        without = {kept: part for kept, part in parts.items() if kept is not role}
        with pytest.raises((DiffquantError, KeyError)):
            codec.decode(without, Encoding(name), SHAPE)
