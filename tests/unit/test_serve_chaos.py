"""Everything at once, in an order that a seed decides: the server ends healthy and its pictures right."""

import gc
import random
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from diffquant import loading
from diffquant.serve.settings import Limits
from tests.serving import Served, serving, until

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves

SHORT = {"prompt": "red apple", "num_inference_steps": 2}
LONG = {"prompt": "red apple", "num_inference_steps": 200}
BAD: tuple[dict[str, Any], ...] = (
    {},
    {"prompt": ""},
    {"prompt": "x" * 10_000},
    {"prompt": "\u0000"},
    {**SHORT, "size": "9999999x1"},
    {**SHORT, "n": 10**9},
    {**SHORT, "seed": "7"},
    {**SHORT, "quality": "hd"},
    {**SHORT, "image": "/etc/passwd"},
    {**SHORT, "lora": ["../../etc/passwd"]},
)


class Storm:
    """Requests of every kind against one server; each tells what came of it."""

    def __init__(self, served: Served, seed: int, truth: bytes) -> None:
        self.served = served
        self.truth = truth
        self.dice = random.Random(seed)
        self.lock = threading.Lock()
        self.ended: Counter[str] = Counter()

    def chance(self, most: float) -> float:
        with self.lock:
            return self.dice.random() * most

    def draw(self) -> bool:
        answer = self.served.draw(**SHORT)
        return answer.status_code == 429 or self.served_pixels(answer) == self.truth

    @staticmethod
    def served_pixels(answer: httpx.Response) -> bytes:
        from tests.serving import decoded

        return decoded(answer.json()["data"][0]["b64_json"]).tobytes()

    def bad(self) -> bool:
        body = BAD[int(self.chance(len(BAD)))]
        return self.served.draw(**body).status_code in (400, 429)

    def garbage(self) -> bool:
        with self.lock:
            data = self.dice.randbytes(200)
        answer = self.served.http.post(
            "/v1/images/generations", content=data, headers={"Content-Type": "application/json"}
        )
        return answer.status_code == 400

    def upload(self) -> bool:
        with self.lock:
            data = b"\x89PNG\r\n\x1a\n" + self.dice.randbytes(200)
        files = {"image": ("x.png", data, "image/png")}
        answer = self.served.http.post("/v1/images/edits", data={"prompt": "x"}, files=files)
        return answer.status_code == 400

    def leave(self) -> bool:
        patience = 0.02 + self.chance(0.15)
        with httpx.Client(base_url=self.served.url, timeout=patience) as client:
            try:
                answer = client.post("/v1/images/generations", json=LONG)
            except httpx.TimeoutException:
                return True
        return answer.status_code == 429

    def leave_stream(self) -> bool:
        body = {**LONG, "stream": True, "progress": True}
        with self.served.http.stream("POST", "/v1/images/generations", json=body) as answer:
            for number, _ in enumerate(answer.iter_lines()):
                if number > self.chance(12):
                    break
        return answer.status_code in (200, 429)

    def cancel(self) -> bool:
        name = f"job-{self.chance(1)}"
        done: list[int] = []

        def ask() -> None:
            answer = self.served.http.post(
                "/v1/images/generations", json=LONG, headers={"X-Request-Id": name}
            )
            done.append(answer.status_code)

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: bool(done) or self.served.http.get(f"/v1/jobs/{name}").status_code == 200)
        while not done and self.served.http.delete(f"/v1/jobs/{name}").status_code != 200:
            pass
        asking.join()
        return done[0] in (429, 499)

    def look(self) -> bool:
        return all(
            self.served.http.get(path).status_code == 200
            for path in ("/health", "/ready", "/metrics", "/server_info", "/v1/models")
        )

    def rage(self, count: int) -> list[str]:
        """So many requests, eight at a time; the names of those that ended otherwise than they may."""
        kinds: list[Callable[[], bool]] = [
            self.draw, self.draw, self.bad, self.garbage, self.upload, self.leave,
            self.leave_stream, self.cancel, self.look,
        ]  # fmt: skip
        with ThreadPoolExecutor(8) as pool:
            chosen = [self.dice.choice(kinds) for _ in range(count)]
            outcomes = [(kind.__name__, pool.submit(kind)) for kind in chosen]
        self.ended.update(name for name, _ in outcomes)
        return [name for name, outcome in outcomes if not outcome.result()]


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return loading.load(run=loading.RunFlags(device="cpu"))


@pytest.fixture(params=[1, 4], ids=["one by one", "in batches"])
def served(request: pytest.FixtureRequest, pipeline: Any) -> Iterator[Served]:
    with serving(lambda: pipeline, max_batch=request.param, queue_size=16) as running:
        yield running


def healthy(served: Served, truth: bytes, uploads: Path) -> bool:
    until(lambda: not served.service.line.live())
    assert served.http.get("/ready").json()["status"] == "ready"
    assert served.pixels(**SHORT) == truth
    return list(uploads.iterdir()) == []


class Alone(Storm):
    """Of a server that draws in batches, pictures may differ in their last bit."""

    def draw(self) -> bool:
        answer = self.served.draw(**SHORT)
        pixels = b"" if answer.status_code == 429 else self.served_pixels(answer)
        apart = sum(abs(a - b) for a, b in zip(pixels, self.truth, strict=False))
        return not pixels or apart < len(pixels)


def test_fifty_requests_each_way_end_healthy(served: Served, uploads: Path) -> None:
    truth = served.pixels(**SHORT)
    kind = Storm if served.service.line.batch == 1 else Alone
    storm = kind(served, 0, truth)
    assert storm.rage(50) == []
    assert len(storm.ended) >= 7
    assert healthy(served, truth, uploads)


@pytest.mark.long
def test_a_thousand_requests_end_healthy_and_leave_no_memory_behind(
    served: Served, uploads: Path
) -> None:
    truth = served.pixels(**SHORT)
    kind = Storm if served.service.line.batch == 1 else Alone
    storm = kind(served, 1, truth)
    process = psutil.Process()
    assert storm.rage(250) == []
    gc.collect()
    before = process.memory_info().rss
    assert storm.rage(750) == []
    gc.collect()
    assert process.memory_info().rss - before < 64e6
    assert healthy(served, truth, uploads)


@pytest.mark.long
def test_the_server_keeps_all_its_schema_promises(pipeline: Any) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    few = Limits(side=64, pixels=4096, steps=1, pictures=1, prompt=200)
    with serving(lambda: pipeline, limits=few) as small:
        schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
        for operation in schema.get_all_operations():
            cases = operation.ok().as_strategy()

            @given(case=cases)
            @settings(
                max_examples=40,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def ask(case: Any) -> None:
                answer = case.call(base_url=small.url)
                assert answer.status_code < 500 or answer.status_code in (501, 503), answer.text

            ask()
        assert small.http.get("/ready").status_code == 200
