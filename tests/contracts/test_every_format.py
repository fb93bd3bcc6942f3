"""What every format promises, and what every fixture of a foreign dialect must tell of its origin.

A new file in `formats/` is tested on arrival, and so is a new checkpoint under `tests/data`.
"""

import ast
import json
import shutil
from functools import cache
from pathlib import Path

import pytest

from diffquant import headers, planner, sources
from diffquant.errors import DiffquantError
from diffquant.formats import FORMATS, NO_HINTS, Reading
from diffquant.headers import Header
from diffquant.sources import Checkpoint

TESTS = Path(__file__).resolve().parents[1]
DATA = TESTS / "data"
PLAIN = DATA / "modelopt" / "flux" / "bf16"
NAMES = FORMATS.names()
STORED = sorted(path for path in DATA.rglob("*") if path.suffix in (".safetensors", ".pt", ".gguf"))
#: Said in a provenance: what was copied, or the script under tests/oracle that ran the owner.
ORIGINS = {"from", "script"}


@cache
def opened(source: Path) -> tuple[Checkpoint, Header]:
    checkpoint = sources.checkpoint(str(source))
    return checkpoint, headers.read(checkpoint.files)


@cache
def format_of(source: Path) -> str | None:
    """The format that reads the checkpoint; None for weights that are no checkpoint."""
    try:
        return planner.identify(*opened(source))[0]
    except DiffquantError:
        return None


@cache
def checkpoints() -> dict[Path, str]:
    """Every checkpoint under tests/data with its format: component folders, else lone files."""
    folders = {path.parent for path in DATA.rglob("config.json")}
    folders = {folder for folder in folders if any(folder.glob("*.safetensors"))}
    files = {path for path in STORED if path.suffix in (".safetensors", ".gguf")}
    lone = {path for path in files if path.parent not in folders}
    found = {source: format_of(source) for source in sorted(folders | lone)}
    return {source: name for source, name in found.items() if name is not None}


def reading(source: Path, name: str) -> Reading:
    return FORMATS.load(name).read(*opened(source), NO_HINTS)


def samples(name: str) -> list[Path]:
    return [source for source, found in checkpoints().items() if found == name]


def refused(source: Path) -> bool:
    """Whether the format names the file and refuses it: an uncompressed native save."""
    return source.name.endswith("_fake")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "diffusers"])
def test_it_does_not_claim_a_plain_checkpoint(name: str) -> None:
    assert FORMATS.load(name).evidence(*opened(PLAIN)) is None


def test_a_plain_checkpoint_is_claimed_by_the_plain_format() -> None:
    assert planner.identify(*opened(PLAIN))[0] == "diffusers"


@pytest.mark.parametrize("name", NAMES)
def test_it_says_where_its_facts_come_from(name: str) -> None:
    module = __import__(f"{FORMATS.package}.{name}", fromlist=["FORMAT"])
    format = FORMATS.load(name)
    assert len((module.__doc__ or "").splitlines()) > 2
    assert format.encodings
    assert format.explains <= set(NAMES)


@pytest.mark.parametrize("name", [n for n in NAMES if FORMATS.load(n).proof != "from description"])
def test_a_format_that_claims_proof_has_a_true_file_here(name: str) -> None:
    assert samples(name)


@pytest.mark.parametrize("name", NAMES)
def test_its_evidence_is_a_sentence_and_its_layers_are_stored(name: str) -> None:
    for source in samples(name):
        checkpoint, header = opened(source)
        proof = FORMATS.load(name).evidence(checkpoint, header)
        assert proof and " " in proof and not proof.endswith(".")
        if refused(source):
            continue
        read = reading(source, name)
        told = {part.tensor for layer in read.layers for part in layer.parts}
        assert told <= header.tensors.keys()
        assert not told & read.unused.keys()
        assert {layer.encoding.name for layer in read.layers} <= {
            "dense",
            *FORMATS.load(name).encodings,
        }
        assert all(layer.why for layer in read.layers)


def test_a_folder_without_its_configuration_is_not_guessed_at(tmp_path: Path) -> None:
    (stored,) = (DATA / "modelopt" / "flux" / "fp8").glob("*.safetensors")
    shutil.copy(stored, tmp_path)
    with pytest.raises(DiffquantError, match="looks quantized and nothing in it says how"):
        planner.identify(*opened(tmp_path))


# provenance --------------------------------------------------------------------------------------


def provenance(path: Path) -> dict[str, str]:
    """What is written of a fixture's origin: in its folder or one above, below tests/data; for a
    file that lies in tests/data itself, under its name."""
    for folder in path.parents:
        if folder == DATA:
            break
        if (folder / "provenance.json").exists():
            return dict(json.loads((folder / "provenance.json").read_text()))
    return dict(json.loads((DATA / "provenance.json").read_text()).get(path.name, {}))


@pytest.mark.parametrize("path", STORED, ids=lambda path: str(path.relative_to(DATA)))
def test_every_fixture_tells_who_wrote_it(path: Path) -> None:
    told = provenance(path)
    assert told.keys() & ORIGINS, f"no provenance.json speaks of {path}"
    assert told.keys() - ORIGINS, "the owner's library and version are missing"


def imports(script: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("script", sorted((TESTS / "oracle").glob("write_*.py")), ids=str)
def test_no_fixture_is_written_by_our_own_encoder(script: Path) -> None:
    assert "diffquant" not in imports(script)


def test_a_script_that_is_named_exists() -> None:
    for path in DATA.rglob("provenance.json"):
        script = json.loads(path.read_text()).get("script")
        assert script is None or (TESTS.parent / script).exists()


def test_an_import_of_ours_would_be_seen() -> None:
    assert "diffquant" in imports(Path(__file__))
