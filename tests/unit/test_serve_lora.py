"""LoRAs a request chooses by name, and the switch that only the owner of the key may throw."""

import base64
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from diffquant import loading, run
from diffquant.cli.serve import _origin, _switched
from diffquant.preset import for_model
from diffquant.resolve import ModelFlags
from tests.serving import Served, serving

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves

INK = "emoji_flux_blue_ink"
SHORT = {"prompt": "red apple", "num_inference_steps": 2}
KEY = "a-key-of-many-letters"
MODEL, RUN = ModelFlags(), loading.RunFlags(device="cpu")
WITH_INK = replace(RUN, lora=(f"{INK}:0.5",))


@pytest.fixture(scope="module")
def inked() -> Any:
    return loading.load(MODEL, WITH_INK)


@pytest.fixture(scope="module")
def served(inked: Any) -> Iterator[Served]:
    with serving(lambda: inked, flags={"lora": list(WITH_INK.lora)}) as running:
        yield running


def truth(pipeline: Any) -> bytes:
    preset = for_model("emoji_flux")
    assert preset is not None
    asked = run.Request(prompt="red apple", num_inference_steps=2)
    return run.generate(pipeline, run.fill(asked, pipeline, preset.defaults)).images[0].tobytes()


@pytest.fixture(scope="module")
def plain() -> bytes:
    return truth(loading.load(MODEL, RUN))


def test_a_request_wears_what_it_names_and_the_next_one_what_was_typed(
    served: Served, plain: bytes
) -> None:
    usual = served.pixels(**SHORT)
    without = served.pixels(**SHORT, lora=[])
    whole = served.pixels(**SHORT, lora={INK: 1.0})
    assert without == plain
    assert len({usual, without, whole}) == 3
    assert served.pixels(**SHORT) == usual
    assert served.pixels(**SHORT, lora=f"{INK}:1") == whole
    assert served.pixels(**SHORT, lora=[INK]) == usual


def test_the_record_draws_with_what_was_worn(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "apple.png"
    for wish, flags in (({INK: 1.0}, [f"{INK}:1"]), ([], None)):
        answer = served.draw(**SHORT, lora=wish).json()
        path.write_bytes(base64.b64decode(answer["data"][0]["b64_json"]))
        record = run.read_metadata(path)
        assert record["flags"].get("lora") == flags
        assert [worn["scale"] for worn in record["report"]["lora"]] == ([1.0] if wish else [])


@pytest.mark.parametrize("wish", [["../secret"], "nobody:0.5", {INK: 1e9}, "x:y", {INK: "1"}])
def test_what_is_not_loaded_is_refused_by_name(served: Served, wish: Any) -> None:
    answer = served.draw(**SHORT, lora=wish)
    assert answer.status_code == 400
    assert "lora" in str(answer.json()["error"]["param"])


def test_names_of_loras_are_told(served: Served) -> None:
    assert served.http.get("/server_info").json()["lora"] == {INK: 0.5}


# the switch


@pytest.fixture(scope="module")
def owned() -> Iterator[Served]:
    """Started as the command starts it, with FP8, which is what nothing typed means."""

    def resolve(changes: Mapping[str, Any]) -> Any:
        return _switched(MODEL, RUN, False, changes)

    origin = _origin(MODEL, loading.dry_run(MODEL, RUN))
    with serving(origin.load, resolve=resolve, api_key=KEY) as running:
        running.http.headers["Authorization"] = f"Bearer {KEY}"
        yield running


def switched(owned: Served, **fields: Any) -> httpx.Response:
    return owned.http.post("/v1/admin/model", json=fields)


def test_the_owner_switches_loras_and_back(owned: Served, plain: bytes) -> None:
    assert owned.pixels(**SHORT) == plain
    told = switched(owned, lora=[f"{INK}:0.5"])
    assert told.status_code == 200, told.text
    assert told.json()["lora"] == {INK: 0.5}
    assert owned.pixels(**SHORT) != plain
    assert switched(owned, lora=None).json()["lora"] == {}
    assert owned.pixels(**SHORT) == plain


def test_the_owner_switches_the_override(owned: Served) -> None:
    told = switched(owned, quantization="int8", transformer_path="emoji_flux/transformer")
    assert told.status_code == 200, told.text
    assert "int8" in told.json()["truth"][0]
    switched(owned, quantization=None, transformer_path=None)
    assert "fp8" in owned.http.get("/server_info").json()["truth"][0]


@pytest.mark.parametrize(
    "fields",
    [{}, {"transformer_path": "nowhere/at-all.safetensors"}, {"lora": ["x/y/z"]}, {"seed": 3}],
)
def test_what_cannot_be_switched_to_leaves_the_model_as_it_was(
    owned: Served, plain: bytes, fields: dict[str, Any]
) -> None:
    assert switched(owned, **fields).status_code == 400
    assert owned.pixels(**SHORT) == plain


def test_without_a_key_nobody_is_the_owner(served: Served) -> None:
    answer = served.http.post("/v1/admin/model", json={"lora": None})
    assert answer.status_code == 403
    assert "--api-key" in answer.json()["error"]["message"]


def test_a_wrong_key_switches_nothing(owned: Served) -> None:
    wrong = {"Authorization": "Bearer another-key-of-letters"}
    answer = owned.http.post("/v1/admin/model", json={"lora": None}, headers=wrong)
    assert answer.status_code == 401
