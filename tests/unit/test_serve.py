"""A real server on loopback with the bundled pipeline: what clients get, and what it survives."""

import base64
import gc
import io
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
import torch
from PIL import Image

from diffquant import loading, run
from diffquant.preset import for_model
from diffquant.resolve import ModelFlags
from diffquant.serve.engine import Engine, Origin
from diffquant.serve.settings import Limits
from tests.serving import Served, decoded, serving, until

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves

LONG = {"prompt": "red apple", "num_inference_steps": 200}
SHORT = {"prompt": "red apple", "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return loading.load(run=loading.RunFlags(device="cpu"))


@pytest.fixture(scope="module")
def served(pipeline: Any) -> Iterator[Served]:
    with serving(lambda: pipeline) as running:
        yield running


@pytest.fixture(scope="module")
def truth(pipeline: Any) -> bytes:
    """The picture of SHORT without any server."""
    preset = for_model("emoji_flux")
    assert preset is not None
    asked = run.Request(prompt="red apple", num_inference_steps=2)
    result = run.generate(pipeline, run.fill(asked, pipeline, preset.defaults))
    return result.images[0].tobytes()


# what openai's client gets


def test_openais_client_gets_the_picture_the_pipeline_draws(served: Served, truth: bytes) -> None:
    answer = served.openai.images.generate(
        prompt="red apple", model="emoji_flux", n=1, extra_body={"num_inference_steps": 2}
    )
    assert answer.data is not None
    assert decoded(answer.data[0].b64_json or "").tobytes() == truth
    assert (answer.size, answer.output_format) == ("64x64", "png")


def test_a_png_holds_the_record_that_draws_it_again(served: Served, tmp_path: Any) -> None:
    answer = served.draw(**SHORT, seed=5)
    path = tmp_path / "apple.png"
    path.write_bytes(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    record = run.read_metadata(path)
    assert record["request"]["seed"] == 5
    assert record["report"]["truth"] == answer.json()["truth"]


def test_pictures_come_by_address_in_the_format_asked_for(served: Served) -> None:
    answer = served.openai.images.generate(
        prompt="pear", n=2, size="64x32", response_format="url", output_format="webp",
        extra_body={"num_inference_steps": 2},
    )  # fmt: skip
    urls = [each.url or "" for each in answer.data or ()]
    shown = [httpx.get(url) for url in urls]
    assert [each.headers["content-type"] for each in shown] == ["image/webp"] * 2
    assert Image.open(io.BytesIO(shown[0].content)).size == (64, 32)
    assert shown[0].content != shown[1].content
    assert httpx.get(urls[0].replace("variant=0", "variant=7")).status_code == 404


def test_the_models_are_the_one_that_is_served(served: Served) -> None:
    assert [model.id for model in served.openai.models.list()] == ["emoji_flux"]
    assert served.openai.models.retrieve("emoji_flux").owned_by == "diffquant"
    with pytest.raises(openai.NotFoundError, match="is not served here") as caught:
        served.openai.images.generate(prompt="x", model="gpt-image-1")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quality", "hd"),
        ("style", "vivid"),
        ("background", "transparent"),
        ("output_compression", 50),
        ("partial_images", 2),
        ("progress", True),
        ("num_frames", 9),
        ("guidance_scale", 3.5),
        ("nmu_inference_steps", 3),
        ("size", "64"),
        ("size", "4096x4096"),
        ("width", 5000),
        ("num_inference_steps", 10_000),
        ("num_inference_steps", "2"),
        ("n", 11),
        ("seed", -1),
        ("prompt", "x" * 10_000),
        ("response_format", "file"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(served: Served, field: str, value: Any) -> None:
    answer = served.draw(**{**SHORT, field: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"
    assert field in error["message"]


def test_a_long_prompt_is_told_how_long_it_may_be(served: Served) -> None:
    told = served.draw(prompt="x" * 10_000).json()["error"]["message"]
    assert told == "prompt is 10000 characters, at most 8000 is served"


def test_a_size_that_is_rounded_is_told(served: Served) -> None:
    rounded = served.draw(**SHORT, size="70x64").json()
    assert rounded["notes"] == ["70x64 was asked for, the pipeline drew 64x64"]
    assert "notes" not in served.draw(**SHORT, size="64x64").json()


def test_width_that_contradicts_size_is_refused(served: Served) -> None:
    assert "contradicts size" in served.draw(**SHORT, size="64x64", width=32).text


def test_the_server_tells_what_it_runs(served: Served) -> None:
    info = served.http.get("/server_info").json()
    assert info["truth"] == ["transformer: 26/34 linears fp8 via cpu_fp8 (weight-only), 8 bf16"]
    assert "n" in info["fields"]
    assert "guidance_scale" not in info["fields"]
    plan = served.http.get("/v1/plan").json()
    assert len(plan["layers"]["transformer"]) == 34
    assert plan["components"]["transformer"]["digest"]


def test_prometheus_sees_pictures_and_answers(served: Served) -> None:
    served.draw(**SHORT)
    served.draw(prompt="")
    lines = served.http.get("/metrics").text.splitlines()
    told = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(told["diffquant_pictures_total"]) >= 1
    assert float(told['diffquant_answers_total{status="400"}']) >= 1
    assert float(told["diffquant_queue_length"]) == 0


# beside the unquantized model


def test_a_request_may_compare_with_the_unquantized_model(pipeline: Any, truth: bytes) -> None:
    base = loading.load(ModelFlags(model_path="emoji_flux"), loading.RunFlags(device="cpu"))
    preset = for_model("emoji_flux")
    assert preset is not None
    asked = run.fill(run.Request(prompt="red apple", num_inference_steps=2), base, preset.defaults)
    unquantized = run.generate(base, asked).images[0].tobytes()
    with serving(lambda: pipeline, reference=lambda: base) as beside:
        (told,) = beside.draw(**SHORT, reference=True).json()["data"]
        (last,) = (
            event
            for event in streamed(beside, **SHORT, reference=True)
            if "reference_truth" in event
        )
        (plain,) = beside.draw(**SHORT).json()["data"]
    assert decoded(told["b64_json"]).tobytes() == truth
    assert decoded(told["reference_b64_json"]).tobytes() == unquantized != truth
    assert last["reference_b64_json"] and "0/34" in last["reference_truth"][0]
    assert set(plain) == {"b64_json"}


def test_a_reference_nobody_has_is_refused(served: Served) -> None:
    answer = served.draw(**SHORT, reference=True)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "reference")


# step by step


def test_a_stream_shows_the_picture_as_it_comes(served: Served) -> None:
    body = {"num_inference_steps": 12}
    stream = served.openai.images.generate(
        prompt="red apple", stream=True, partial_images=3, extra_body=body
    )
    *partial, last = list(stream)
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 3
    assert last.type == "image_generation.completed"
    final = decoded(last.b64_json)
    assert final.tobytes() == served.pixels(prompt="red apple", num_inference_steps=12)
    apart = [distance(decoded(event.b64_json), final) for event in partial]
    assert apart == sorted(apart, reverse=True)
    assert apart[-1] < 0.5 * apart[0]


def distance(one: Image.Image, other: Image.Image) -> float:
    pairs = zip(one.tobytes(), other.tobytes(), strict=True)
    return sum(abs(a - b) for a, b in pairs) / len(one.tobytes())


def test_a_stream_with_progress_counts_every_step(served: Served) -> None:
    events = streamed(served, **SHORT, progress=True)
    told = [event for event in events if event["type"] == "image_generation.progress"]
    assert [event["step"] for event in told][-1] == 2
    assert events[-1]["type"] == "image_generation.completed"
    assert events[-1]["id"] == told[0]["id"]


def streamed(served: Served, **body: Any) -> list[dict[str, Any]]:
    with served.http.stream("POST", "/v1/images/generations", json={**body, "stream": True}) as got:
        lines = [line for line in got.iter_lines() if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# stopping


def test_delete_stops_a_request_at_its_next_step(served: Served, truth: bytes) -> None:
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(
            served.http.post, "/v1/images/generations", json=LONG, headers={"X-Request-Id": "mine"}
        )
        until(lambda: served.job("mine").get("step", 0) > 0)
        assert served.http.delete("/v1/jobs/mine").json()["stopped"] is True
        assert answer.result().status_code == 499
    assert answer.result().json()["error"]["code"] == "cancelled"
    assert served.pixels(**SHORT) == truth


def test_a_client_that_leaves_stops_its_request(served: Served, truth: bytes) -> None:
    before = served.http.get("/metrics").text.count("cancelled")
    job = leave(served, LONG, after_step=2)
    until(lambda: served.job(job)["state"] == "cancelled")
    assert 2 <= served.job(job)["step"] < 100
    assert served.pixels(**SHORT) == truth
    assert served.http.get("/metrics").text.count("cancelled") >= before


def test_a_client_that_leaves_its_stream_stops_its_request(served: Served) -> None:
    job = leave(served, {**LONG, "stream": True, "partial_images": 40}, after_step=6)
    until(lambda: served.job(job)["state"] == "cancelled")
    assert served.job(job)["step"] < 150


def leave(served: Served, body: dict[str, Any], after_step: int) -> str:
    """Ask, and close the connection after that step; the job's id."""
    text = json.dumps(body).encode()
    head = (
        "POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as door:
        door.sendall(head.encode() + text)
        until(lambda: any(job.step >= after_step for job in served.service.line.live()))
        (job,) = served.service.line.live()
    return job.id


def test_a_request_that_takes_too_long_is_ended(pipeline: Any, truth: bytes) -> None:
    with serving(lambda: pipeline, timeout=0.4) as hasty:
        answer = hasty.draw(**LONG)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "timeout"
        assert answer.headers["x-should-retry"] == "false"
        until(lambda: not hasty.service.line.live())
        assert streamed(hasty, **LONG)[-1]["error"]["code"] == "timeout"
        until(lambda: not hasty.service.line.live())
        assert hasty.pixels(**SHORT) == truth


def test_a_full_queue_says_when_to_come_back(pipeline: Any) -> None:
    with serving(lambda: pipeline, queue_size=1) as small, ThreadPoolExecutor() as pool:
        first = pool.submit(small.draw, **LONG)
        until(lambda: small.service.line.running is not None)
        second = pool.submit(
            small.http.post, "/v1/images/generations", json=LONG, headers={"X-Request-Id": "next"}
        )
        until(lambda: small.service.line.waiting == 1)
        assert small.job("next")["position"] == 1
        assert small.job("next")["seconds_left"] > 0
        third = small.draw(**SHORT)
        assert third.status_code == 429
        assert int(third.headers["retry-after"]) >= 1
        assert third.json()["error"]["type"] == "rate_limit_error"
        for job in small.service.line.live():
            small.http.delete(f"/v1/jobs/{job.id}")
        assert {first.result().status_code, second.result().status_code} == {499}


# what must not poison the next request


def test_a_layer_that_goes_bad_is_named_and_the_next_request_is_right(
    served: Served, pipeline: Any, truth: bytes
) -> None:
    weight = pipeline.transformer.x_embedder.weight
    kept = weight.data.clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    answer = served.draw(**SHORT)
    with torch.no_grad():
        weight.copy_(kept)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "non_finite"
    assert "transformer.x_embedder" in answer.json()["error"]["message"]
    assert served.pixels(**SHORT) == truth


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[1]",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\u0000"}',
        b'{"prompt": "a", "true_cfg_scale": NaN}',
        b'{"prompt": "a", "n": 1e99}',
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"prompt": "' + b"x" * 10_000 + b'"}',
        b'{"prompt": "a", "size": "4096x4096"}',
    ],
    ids=lambda body: body[:24].decode("latin-1"),
)
def test_a_hostile_body_is_a_400_and_the_next_request_is_right(
    served: Served, truth: bytes, body: bytes
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = served.http.post("/v1/images/generations", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    assert served.pixels(**SHORT) == truth


def test_what_is_no_json_and_what_lies_nowhere_is_said_in_plain_words(served: Served) -> None:
    answer = served.http.post(
        "/v1/images/generations", content='{"a":', headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "no JSON: expecting value at character 5"
    nowhere = served.http.get("/v1/pictures")
    assert nowhere.json()["error"]["message"] == "not found"


def test_a_body_that_is_too_large_is_stopped_with_or_without_its_length(served: Served) -> None:
    big = json.dumps({"prompt": "x" * 300_000}).encode()
    assert served.http.post("/v1/images/generations", content=big).status_code == 413
    pieces = (big[start : start + 4096] for start in range(0, len(big), 4096))
    answer = served.http.post(
        "/v1/images/generations", content=pieces, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413


# ready, idle, drained


def test_ready_tells_how_far_each_kernel_is_from_reference(served: Served) -> None:
    (check,) = served.http.get("/ready").json()["checks"]
    assert (check["encoding"], check["kernel"], check["ok"]) == ("fp8", "cpu_fp8", True)
    assert 0 < check["relative_error"] < 1e-2


def test_a_kernel_that_is_wrong_refuses_to_serve(pipeline: Any) -> None:
    path = loading.report(pipeline).choices["transformer"]
    layers = dict(pipeline.transformer.named_modules())
    broken = [layers[choice.path] for choice in path if hasattr(layers[choice.path], "terms")]
    kept = [layer.terms for layer in broken]
    for layer in broken:
        layer.terms = tuple(replace(term, multiply=_doubled(term.multiply)) for term in layer.terms)
    try:
        with serving(lambda: pipeline, ready=False) as wrong:
            until(lambda: wrong.service.line.failure is not None)
            assert "away from reference" in str(wrong.service.line.failure)
            assert wrong.http.get("/ready").status_code == 503
            assert wrong.http.get("/health").status_code == 503
            assert wrong.draw(**SHORT).status_code == 503
    finally:
        for layer, terms in zip(broken, kept, strict=True):
            layer.terms = terms


def _doubled(multiply: Any) -> Any:
    return lambda x, parts: 2 * multiply(x, parts)


def test_an_idle_model_is_let_go_and_comes_back(pipeline: Any, truth: bytes) -> None:
    loads = []

    def load() -> Any:
        loads.append(time.monotonic())
        return pipeline

    with serving(load, idle_unload=0.2) as idle:
        until(lambda: not idle.service.line.is_open)
        assert idle.http.get("/ready").json()["loaded"] is False
        assert idle.pixels(**SHORT) == truth
        assert len(loads) == 2


def test_what_is_loaded_is_spared_the_garbage_collector_until_it_is_let_go(pipeline: Any) -> None:
    engine = Engine(Origin(load=lambda: pipeline, defaults={}, flags={}))
    engine.open()
    assert gc.get_freeze_count() > 0
    engine.close()
    assert gc.get_freeze_count() == 0


def test_a_server_told_to_stop_finishes_what_it_has(pipeline: Any, truth: bytes) -> None:
    with ThreadPoolExecutor() as pool, serving(lambda: pipeline) as leaving:
        answers = [pool.submit(leaving.pixels, **SHORT) for _ in range(3)]
        until(lambda: len(leaving.service.line.live()) == 3)
        leaving.running.should_exit = True  # what uvicorn's handler of SIGTERM does
        assert [answer.result() for answer in answers] == [truth] * 3
        until(lambda: not leaving.service.line.is_alive)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{leaving.url}/health")


def test_who_outlasts_the_drain_is_told_that_the_server_ends(pipeline: Any) -> None:
    with ThreadPoolExecutor() as pool, serving(lambda: pipeline, drain=0.2) as leaving:
        answer = pool.submit(leaving.draw, **LONG)
        until(lambda: leaving.service.line.running is not None)
        leaving.running.should_exit = True
        told = answer.result()
        until(lambda: not leaving.service.line.is_alive)
    assert (told.status_code, told.json()["error"]["message"]) == (503, "the server shuts down")


# who may come in


def test_a_key_is_asked_of_everyone_but_for_health_and_the_page(pipeline: Any) -> None:
    with serving(lambda: pipeline, api_key="a very good secret") as locked:
        assert locked.draw(**SHORT).status_code == 401
        assert locked.http.get("/server_info").json()["error"]["code"] == "invalid_api_key"
        assert [locked.http.get(path).status_code for path in ("/", "/health", "/ready")] == [
            200
        ] * 3
        right = {"Authorization": "Bearer a very good secret"}
        proxied = {**right, "Host": "pictures.example"}
        assert locked.http.get("/server_info", headers=proxied).status_code == 200
        url = locked.http.post(
            "/v1/images/generations", json={**SHORT, "response_format": "url"}, headers=right
        ).json()["data"][0]["url"]
        assert httpx.get(url).status_code == 200


def test_other_names_and_other_peoples_pages_are_kept_out(served: Served) -> None:
    rebound = served.http.get("/server_info", headers={"Host": "evil.example"})
    assert rebound.status_code == 403
    assert served.http.get("/server_info", headers={"Host": "[::1"}).status_code == 403
    foreign = {"Origin": "https://evil.example"}
    answer = served.http.post("/v1/images/generations", json=SHORT, headers=foreign)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    own = {"Origin": served.url}
    assert served.http.post("/v1/images/generations", json=SHORT, headers=own).status_code == 200


def test_a_form_that_needs_no_permission_to_cross_sites_draws_nothing(served: Served) -> None:
    text = json.dumps(SHORT).encode()
    headers = {"Content-Type": "text/plain"}
    answer = served.http.post("/v1/images/generations", content=text, headers=headers)
    assert answer.status_code == 400


def test_paths_and_addresses_of_clients_are_unknown_fields(served: Served) -> None:
    for field in ("output_path", "perf_dump_path", "url", "image_path", "diffusers_kwargs"):
        answer = served.draw(**SHORT, **{field: "/etc/passwd"})
        assert answer.json()["error"]["param"] == field


# the schema


def test_the_server_keeps_what_its_schema_promises(pipeline: Any) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    few = Limits(side=64, pixels=4096, steps=1, pictures=1, prompt=200)
    with serving(lambda: pipeline, limits=few) as small:
        schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
        drawing = schema["/v1/images/generations"]["POST"].as_strategy()

        @given(case=drawing)
        @settings(
            max_examples=50,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: Any) -> None:
            answer = case.call(base_url=small.url)
            assert answer.status_code in (200, 400, 404), answer.text
            if answer.status_code != 200:
                assert answer.json()["error"]["message"]

        ask()
        assert small.http.get("/health").status_code == 200
