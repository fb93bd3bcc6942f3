"""Schemes as data: complete, known to presets, and found by every word people use for them."""

from pathlib import Path

import pytest

from diffquant import aliases, preset
from diffquant.activations import encoding_of
from diffquant.encodings import ENCODINGS
from diffquant.errors import UsageError
from diffquant.formats import FORMATS
from diffquant.plan import Role
from diffquant.resolve import ModelFlags, resolve
from diffquant.schemes import SCHEMES

NAMES = SCHEMES.names()
#: What people type elsewhere, and the scheme it means.
SYNONYMS = {
    "fp8": "fp8",
    "w8a8_fp8": "fp8",
    "w8a8_int8": "int8",
    "blockwise_int8": "int8_block",
    "auto-round-int8": "int8_weight_only",
    "mxfp8": "mxfp8",
    "mxfp4": "mxfp4",
    "quark_mxfp4": "mxfp4",
    "mxfp4_npu": "mxfp4_npu",
    "nvfp4": "nvfp4",
    "int4": "int4",
    "svdq-int4": "svdq_int4",
    "svdq-nvfp4": "svdq_nvfp4",
}
TORCHAO = {
    "int8dq": "int8",
    "int8wo": "int8_weight_only",
    "fp8wo": "fp8_weight_only",
    "fp8dq-per_tensor": "fp8_tensor",
    "fp8dq-per_row": "fp8",
    "int4wo-32": "int4_32",
    "int4wo-64": "int4_64",
    "int4wo-128": "int4",
    "int4wo-256": "int4_256",
}
REFUSED = {
    "nvfp4_online": "experts",
    "quark_int4fp8_moe": "experts",
    "petit_nvfp4": "ROCm kernel",
    "moe_wna16": "experts",
}


def scheme_of(word: str) -> str | None:
    flags = ModelFlags(model_path="emoji_flux", quantization=word)
    online = resolve(flags).components["transformer"].online
    return None if online is None else online.scheme


@pytest.mark.parametrize("name", NAMES)
def test_its_parts_are_a_complete_weight(name: str) -> None:
    scheme = SCHEMES.load(name)
    codec = ENCODINGS.load(scheme.encoding.name)
    assert codec.is_complete(scheme.encoding, scheme.roles)
    assert not codec.is_complete(scheme.encoding, frozenset({Role.CODES}))
    assert codec.encode is not None


@pytest.mark.parametrize("name", NAMES)
def test_its_activations_can_be_emulated(name: str) -> None:
    activation = SCHEMES.load(name).activation
    if activation is not None:
        assert activation.mode == "dynamic"
        assert ENCODINGS.load(encoding_of(activation).name).encode is not None


@pytest.mark.parametrize("name", NAMES)
def test_some_preset_knows_which_layers_it_must_not_touch(name: str) -> None:
    known = {algorithm for each in preset.names() for algorithm in preset.load(each).algorithms}
    assert SCHEMES.load(name).preset in known


@pytest.mark.parametrize("name", NAMES)
def test_what_it_is_saved_as_is_a_format(name: str) -> None:
    assert SCHEMES.load(name).saved_as in (None, *FORMATS.names())


@pytest.mark.parametrize("word", SYNONYMS)
def test_what_people_type_elsewhere_is_understood(word: str) -> None:
    assert scheme_of(word) == SYNONYMS[word]


@pytest.mark.parametrize("config", TORCHAO)
def test_torchao_configurations_are_schemes(config: str) -> None:
    _, word = aliases.translate(["--torchao-config", config]).arguments
    assert scheme_of(word) == TORCHAO[config]


def test_every_synonym_means_a_scheme() -> None:
    meant = {entry.online for entry in aliases.quantizations().values() if entry.online}
    assert meant <= set(NAMES)


def test_no_synonym_hides_a_scheme() -> None:
    assert not set(NAMES) & set(aliases.quantizations())


@pytest.mark.parametrize("word", REFUSED)
def test_what_is_not_for_diffusion_is_refused_with_the_reason(word: str) -> None:
    with pytest.raises(UsageError, match=REFUSED[word]):
        scheme_of(word)


def test_an_unknown_word_is_answered_with_near_ones() -> None:
    with pytest.raises(UsageError, match="no quantization is called 'svdq_int5'") as caught:
        scheme_of("svdq_int5")
    assert "svdq_int4" in str(caught.value.hint)


def test_a_new_file_is_a_new_scheme_without_any_edit(tmp_path: Path) -> None:
    folder = str(tmp_path)
    (tmp_path / "fp8_again.py").write_text("from diffquant.schemes.fp8 import SCHEME as SCHEME\n")
    import diffquant.schemes as room

    room.__path__.append(folder)
    try:
        assert scheme_of("fp8_again") == "fp8_again"
    finally:
        room.__path__.remove(folder)
