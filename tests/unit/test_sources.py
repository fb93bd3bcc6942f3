"""Sources: what is typed, which files are meant, what is asked of the hub; on real files."""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from diffquant import sources
from diffquant.errors import AmbiguousSourceError, OfflineError, SourceError, UsageError
from diffquant.sources import checkpoint, pipeline, weight_sets
from tests.fake_hub import FakeHub, serving

WEIGHTS = b"\x02\0\0\0\0\0\0\0{}"
SHARDS = tuple(f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2))
INDEX = "diffusion_pytorch_model.safetensors.index.json"
INDEX_TEXT = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}})


def folder(root: Path, *names: str, **texts: str) -> Path:
    """A directory with weights of those names and, by keyword, config and index."""
    named = {"config": "config.json", "index": INDEX, "pipeline": "model_index.json"}
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(WEIGHTS)
    for key, text in texts.items():
        (root / named[key]).write_text(text)
    return root


def names(found: sources.Checkpoint) -> list[str]:
    return [path.name for path in found.files]


# Directories: which set of weights is meant.


@pytest.mark.parametrize(
    ("there", "meant"),
    [
        (["x.safetensors"], ["x.safetensors"]),
        (["x.safetensors", "x.fp16.safetensors"], ["x.safetensors"]),
        (["x.fp16.safetensors"], ["x.fp16.safetensors"]),
        (["x.fp16.safetensors", "x.bf16.safetensors"], ["x.bf16.safetensors"]),
        (["x.safetensors", "backbone.pt", "y.bin"], ["x.safetensors"]),
        (["f-nvfp4.safetensors", "f-nvfp4-mixed.safetensors"], ["f-nvfp4-mixed.safetensors"]),
        (
            ["unquantized_layers.safetensors", "transformer_blocks.safetensors"],
            ["transformer_blocks.safetensors", "unquantized_layers.safetensors"],
        ),
        (
            ["quant_model_weight_w8a8-2.safetensors", "quant_model_weight_w8a8-1.safetensors"],
            ["quant_model_weight_w8a8-1.safetensors", "quant_model_weight_w8a8-2.safetensors"],
        ),
        (
            ["m-00002-of-00002.gguf", "m-00001-of-00002.gguf"],
            ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"],
        ),
    ],
)
def test_one_set_of_weights_is_meant(tmp_path: Path, there: list[str], meant: list[str]) -> None:
    assert names(checkpoint(str(folder(tmp_path, *there)))) == meant


def test_an_index_decides_and_its_shards_are_the_set(tmp_path: Path) -> None:
    folder(tmp_path, *SHARDS, "consolidated.safetensors", index=INDEX_TEXT, config='{"a": 1}')
    found = checkpoint(str(tmp_path))
    assert names(found) == list(SHARDS)
    assert found.config == {"a": 1}
    assert set(found.sidecars) == {"config.json", INDEX}
    assert checkpoint(str(tmp_path / INDEX)).files == found.files


def test_several_sets_are_an_error_that_lists_all(tmp_path: Path) -> None:
    folder(tmp_path, "a.safetensors", "b-mixed.safetensors", "c-mixed.safetensors")
    with pytest.raises(AmbiguousSourceError, match="holds 3 sets of weights") as caught:
        checkpoint(str(tmp_path))
    assert all(f"{letter}" in caught.value.what for letter in ("a.saf", "b-mixed", "c-mixed"))
    assert str(tmp_path / "a.safetensors") in str(caught.value.hint)
    assert [len(one) for one in weight_sets(tmp_path)] == [1, 1, 1]


def test_candidates_are_available_as_paths(tmp_path: Path) -> None:
    folder(tmp_path, *SHARDS, "svdq-int4_r32-x.safetensors", "x.pt", index=INDEX_TEXT)
    sharded, single = weight_sets(tmp_path)
    assert sharded == tuple(tmp_path / name for name in SHARDS)
    assert single == (tmp_path / "svdq-int4_r32-x.safetensors",)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder(tmp_path, SHARDS[0], index=INDEX_TEXT)
    with pytest.raises(SourceError, match=f"1 of 2 shards are missing, first '{SHARDS[1]}'"):
        checkpoint(str(tmp_path))
    (tmp_path / INDEX).unlink()
    with pytest.raises(SourceError, match=f"first '{SHARDS[1]}'"):
        checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("index", "word"),
    [
        ({"weight_map": {}}, "lists no tensors"),
        ({}, "lists no tensors"),
        ({"weight_map": {"a": "x.bin"}}, "the shard 'x.bin'"),
        ({"weight_map": {"a": "../x.safetensors"}}, "the shard '../x.safetensors'"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(
    tmp_path: Path, index: dict[str, object], word: str
) -> None:
    folder(tmp_path, "x.safetensors", index=json.dumps(index))
    with pytest.raises(SourceError, match=word):
        checkpoint(str(tmp_path))


def test_a_config_alone_is_a_checkpoint_without_files(tmp_path: Path) -> None:
    found = checkpoint(str(folder(tmp_path, config='{"_class_name": "X"}')))
    assert (found.files, found.config) == ((), {"_class_name": "X"})


def test_an_unreadable_config_is_told_with_line_and_column(tmp_path: Path) -> None:
    folder(tmp_path, "x.safetensors", config='{"a": 1,\n "b": }')
    with pytest.raises(SourceError, match=r"config\.json' is not valid JSON at line 2, column 7"):
        checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(SourceError, match="holds a JSON list"):
        checkpoint(str(tmp_path))


def test_pickles_are_refused_and_their_hint_says_why(tmp_path: Path) -> None:
    folder(tmp_path, "model.bin")
    for source in (tmp_path, tmp_path / "model.bin"):
        with pytest.raises(SourceError) as caught:
            checkpoint(str(source))
        assert "save the weights again as safetensors" in str(caught.value.hint)


def test_a_true_export_is_read_with_its_config(data: Path) -> None:
    found = checkpoint(str(data / "modelopt" / "flux" / "fp8"))
    assert names(found) == ["diffusion_pytorch_model.safetensors"]
    assert found.config["quantization_config"]["quant_method"] == "modelopt"


# What is typed.


def test_a_file_is_taken_as_it_is_and_its_config_counts(tmp_path: Path) -> None:
    folder(tmp_path, "a.safetensors", "b.safetensors", config='{"a": 1}')
    found = checkpoint(str(tmp_path / "b.safetensors"))
    assert (names(found), found.config, found.revision) == (["b.safetensors"], {"a": 1}, None)
    assert found.root == tmp_path


def test_a_pipeline_gives_its_component(tmp_path: Path) -> None:
    folder(tmp_path, "transformer/a.safetensors", "transformer_2/b.safetensors", pipeline="{}")
    assert names(checkpoint(str(tmp_path))) == ["a.safetensors"]
    assert names(checkpoint(str(tmp_path), subfolder="transformer_2")) == ["b.safetensors"]
    with pytest.raises(SourceError, match="no folder 'transformer_3'"):
        checkpoint(str(tmp_path), subfolder="transformer_3")


def test_a_component_folder_is_itself_whatever_the_subfolder(tmp_path: Path) -> None:
    folder(tmp_path, "a.safetensors")
    assert names(checkpoint(str(tmp_path), subfolder="transformer_2")) == ["a.safetensors"]


def test_home_and_selectors_work_on_paths(tmp_path: Path, isolated_home: Path) -> None:
    folder(isolated_home / "ggufs", "m-Q4_K.gguf", "m-Q4_K_M.gguf")
    assert names(checkpoint("~/ggufs:Q4_K")) == ["m-Q4_K.gguf"]
    assert names(checkpoint("~/ggufs:q4_k_m")) == ["m-Q4_K_M.gguf"]
    with pytest.raises(SourceError, match="no GGUF file for 'Q8_0'"):
        checkpoint("~/ggufs:Q8_0")


def test_bundled_models_go_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources._reference, "MODELS", tmp_path)
    folder(tmp_path / "emoji_flux", "transformer/a.safetensors", pipeline="{}")
    assert sources.bundled_names() == ("emoji_flux",)
    assert names(checkpoint("emoji_flux/transformer")) == ["a.safetensors"]
    assert pipeline("emoji_flux").root == tmp_path / "emoji_flux"
    with pytest.raises(SourceError, match="did you mean 'emoji_flux'"):
        checkpoint("emoji_fluks")


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("./nowhere", "no file or directory 'nowhere'"),
        ("nothing.safetensors", "no file or directory here"),
        ("folder/nothing.safetensors", "no file or directory here"),
        ("", "is no source"),
        ("https://example.org/org/repo", "is no page of a model"),
        ("https://huggingface.co/datasets/org/repo", "is no page of a model"),
        (".@main", "has no revisions"),
    ],
)
def test_what_is_no_source_is_refused(source: str, word: str) -> None:
    with pytest.raises(SourceError, match=word):
        checkpoint(source)


def test_a_misspelled_path_is_answered_with_the_near_one(tmp_path: Path) -> None:
    folder(tmp_path, "flux-nvfp4.safetensors")
    with pytest.raises(SourceError) as caught:
        checkpoint(str(tmp_path / "flux-nvfp4.safetensor"))
    assert str(tmp_path / "flux-nvfp4.safetensors") in str(caught.value.hint)


# The hub.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub whose main branch moves whenever somebody looks at it, and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving(tmp_path / "hub", moving=True, gated=frozenset({"org/gated"})) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


@pytest.fixture
def base(hub: FakeHub) -> FakeHub:
    """The hub with org/base, a pipeline with everything people upload."""
    index = {
        "_class_name": "FluxPipeline",
        "boundary_ratio": 0.5,
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "image_encoder": [None, None],
    }
    root = folder(hub.root / "org" / "base", "whole.safetensors", pipeline=json.dumps(index))
    folder(root / "transformer", *SHARDS, config="{}", index=INDEX_TEXT)
    encoder = ("model.safetensors", "model.fp16.safetensors", "model.bin", "flax_model.msgpack")
    folder(root / "text_encoder", *encoder, "onnx/model.onnx", config="{}")
    folder(root / "tokenizer", "merges.txt", "tokenizer_config.json")
    return hub


def test_a_pipeline_is_downloaded_without_what_nobody_needs(base: FakeHub) -> None:
    found = pipeline("org/base")
    here = {str(path.relative_to(found.root)) for path in found.root.rglob("*") if path.is_file()}
    assert here == {
        "model_index.json",
        "transformer/config.json",
        f"transformer/{INDEX}",
        *(f"transformer/{name}" for name in SHARDS),
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
    }
    assert found.components == ("transformer", "text_encoder", "tokenizer")


def test_shards_that_an_override_replaces_are_never_requested(base: FakeHub) -> None:
    pipeline("org/base", without_weights_of=frozenset({"transformer"}))
    asked = {path.rpartition("/")[2] for _, path in base.requests}
    assert "config.json" in asked
    assert not asked & set(SHARDS)


def test_one_commit_serves_everything_although_main_moves(base: FakeHub) -> None:
    first = pipeline("org/base")
    second = checkpoint("org/base", revision=first.revision)
    assert base.revisions == {first.revision} == {second.revision}
    checkpoint("org/base")
    assert len(base.revisions) == 2, "negative control: without the revision main is a new commit"


def test_weights_are_chosen_by_name_before_any_is_downloaded(hub: FakeHub) -> None:
    folder(hub.root / "org/nvfp4", "f.safetensors", "f-mixed.safetensors", "x.bin", config="{}")
    found = checkpoint("org/nvfp4")
    assert names(found) == ["f-mixed.safetensors"]
    assert hub.downloaded == ["org/nvfp4/config.json", "org/nvfp4/f-mixed.safetensors"]


@pytest.mark.parametrize(
    "spelled",
    [
        "org/repo/sub/f.safetensors",
        "org/repo/sub",
        "org/repo/sub/@main",
        "{url}/org/repo/blob/main/sub/f.safetensors",
        "{url}/org/repo/resolve/main/sub/f.safetensors?download=true",
        "{url}/org/repo/tree/main/sub",
    ],
)
def test_every_spelling_of_a_place_on_the_hub(hub: FakeHub, spelled: str) -> None:
    folder(hub.root / "org/repo", "sub/f.safetensors", "other.safetensors")
    found = checkpoint(spelled.format(url=hub.url))
    assert names(found) == ["f.safetensors"]
    assert hub.downloaded == ["org/repo/sub/f.safetensors"]


def test_a_gguf_is_selected_by_its_quantization(hub: FakeHub) -> None:
    folder(hub.root / "org/ggufs", "m-Q4_K_S.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf")
    assert names(checkpoint("org/ggufs:Q4_K_M")) == ["m-Q4_K_M.gguf"]
    with pytest.raises(AmbiguousSourceError, match="3 sets"):
        checkpoint("org/ggufs")
    assert hub.downloaded == ["org/ggufs/m-Q4_K_M.gguf"]


def test_a_repository_of_weights_is_no_pipeline_yet_welcome(hub: FakeHub) -> None:
    folder(hub.root / "org/weights", "f.safetensors", config="{}")
    found = pipeline("org/weights")
    assert found.is_weights_only and found.components == ()
    assert hub.downloaded == []


def test_what_was_downloaded_is_found_offline(
    base: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = pipeline("org/base", without_weights_of=frozenset({"text_encoder"}))
    asked = len(base.requests)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    offline = checkpoint("org/base")
    assert (names(offline), offline.revision) == (list(SHARDS), online.revision)
    with pytest.raises(OfflineError, match="the weights of org/base/text_encoder") as caught:
        pipeline("org/base")
    assert "hf download org/base" in str(caught.value.hint)
    assert len(base.requests) == asked


def test_an_unreachable_hub_is_told_with_what_to_do(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OfflineError, match="cannot be reached for 'org/repo'") as caught:
        checkpoint("org/repo")
    assert "name the path of a copy" in str(caught.value.hint)
    with pytest.raises(OfflineError, match="org/repo is not on this machine"):
        checkpoint("org/repo", local_files_only=True)


@pytest.mark.parametrize(
    ("source", "word", "hint"),
    [
        ("org/none", "no repository on", "hf auth login"),
        ("org/gated", "is gated", "accept its terms"),
        ("org/repo@v9", "has no revision 'v9'", "branches"),
        ("org/repo/g.safetensors", "no file or folder 'g.safetensors'", "f.safetensors"),
    ],
)
def test_each_refusal_of_the_hub_has_a_hint(
    hub: FakeHub, source: str, word: str, hint: str
) -> None:
    folder(hub.root / "org/repo", "f.safetensors")
    folder(hub.root / "org/gated", "f.safetensors")
    with pytest.raises(SourceError, match=word) as caught:
        checkpoint(source)
    assert hint in str(caught.value.hint)


def test_two_revisions_that_differ_are_an_error(hub: FakeHub) -> None:
    with pytest.raises(UsageError, match="asks for revision 'main'"):
        checkpoint("org/repo@main", revision="v2")
