"""One of several servers behind an address: what another could not answer is refused, never lost."""

from collections.abc import Iterator
from typing import Any

import pytest

from diffquant import loading
from tests.serving import Served, serving

SHORT = {"prompt": "red apple", "num_inference_steps": 1}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return loading.load(run=loading.RunFlags(device="cpu"))


@pytest.fixture(scope="module")
def one_of_three(pipeline: Any) -> Iterator[Served]:
    with serving(lambda: pipeline, shared_by=3, api_key="long enough") as running:
        running.http.headers["Authorization"] = "Bearer long enough"
        yield running


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/jobs/mine", None),
        ("DELETE", "/v1/jobs/mine", None),
        ("POST", "/v1/videos", SHORT),
        ("GET", "/v1/videos", None),
        ("GET", "/v1/videos/mine", None),
        ("DELETE", "/v1/videos/mine", None),
        ("GET", "/v1/videos/mine/content", None),
        ("POST", "/v1/images/generations", {**SHORT, "response_format": "url"}),
        ("GET", "/v1/images/mine/content", None),
        ("POST", "/v1/admin/model", {"quantization": "int8"}),
        ("GET", "/metrics", None),
    ],
)
def test_what_only_one_of_them_knows_is_refused_with_the_way_round(
    one_of_three: Served, method: str, path: str, body: Any
) -> None:
    answer = one_of_three.http.request(method, path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (501, "several_replicas")
    assert "another of 3 replicas: " in error["message"]


def test_pictures_and_truth_come_from_any_of_them(one_of_three: Served) -> None:
    assert one_of_three.pixels(**SHORT)
    assert one_of_three.http.get("/server_info").json()["replicas"] == 3
    for path in ("/health", "/ready", "/v1/plan", "/v1/models"):
        assert one_of_three.http.get(path).status_code == 200


def test_a_server_alone_answers_for_what_it_knows(pipeline: Any) -> None:
    with serving(lambda: pipeline) as alone:
        job = alone.draw(**SHORT, response_format="url").json()["id"]
        assert alone.job(job)["state"] == "completed"
        assert alone.http.get(f"/v1/images/{job}/content").status_code == 200
        assert alone.http.get("/v1/videos").json()["data"] == []
        assert alone.http.get("/metrics").status_code == 200
