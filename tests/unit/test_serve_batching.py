"""Requests drawn as one batch get the pictures they would get alone, and nobody pays for a neighbour."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffquant import loading, run
from diffquant.preset import for_model
from diffquant.run import Request
from diffquant.serve.jobs import Job
from tests.serving import Served, decoded, serving, until

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves

PROMPTS = ("red apple", "octopus", "rocket", "cat face")
STEPS = 4


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return loading.load(run=loading.RunFlags(device="cpu"))


@pytest.fixture(scope="module")
def served(pipeline: Any) -> Iterator[Served]:
    with serving(lambda: pipeline, max_batch=4) as running:
        yield running


def requests(pipeline: Any) -> list[Request]:
    preset = for_model("emoji_flux")
    assert preset is not None
    return [
        run.fill(
            Request(prompt=prompt, seed=index, num_inference_steps=STEPS), pipeline, preset.defaults
        )
        for index, prompt in enumerate(PROMPTS)
    ]


def apart(one: Image.Image, other: Image.Image) -> float:
    """Mean difference of pixels, 0 to 255."""
    first, second = (np.asarray(image, dtype=float) for image in (one, other))
    return float(np.abs(first - second).mean())


def test_a_batch_draws_what_each_request_draws_alone(pipeline: Any) -> None:
    asked = requests(pipeline)
    together = run.generate_together(pipeline, asked)
    alone = [run.generate(pipeline, request) for request in asked]
    for one, other in zip(together, alone, strict=True):
        assert apart(one.images[0], other.images[0]) < 0.5  # rounding of other matrix shapes
        assert one.request == other.request
    assert apart(together[0].images[0], alone[1].images[0]) > 10


def test_several_pictures_of_one_request_stay_together(pipeline: Any) -> None:
    asked = requests(pipeline)[:2]
    two = run.fill(
        Request(prompt="tree", seed=9, num_images_per_prompt=2, num_inference_steps=STEPS),
        pipeline,
        {"height": 64, "width": 64, "max_sequence_length": 16},
    )
    first, pair, last = run.generate_together(pipeline, [asked[0], two, asked[1]])
    assert [len(result.images) for result in (first, pair, last)] == [1, 2, 1]
    assert apart(pair.images[1], run.generate(pipeline, two).images[1]) < 0.5


class Counted:
    """How many jobs were drawn at once, told by the engine of a server."""

    def __init__(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.hold = threading.Event()
        engine = served.service.engine
        draw, together = engine.draw, engine.draw_together

        def one(job: Job) -> Any:
            self.sizes.append(1)
            assert self.hold.wait(20)
            return draw(job)

        def several(jobs: Sequence[Job], left: Any) -> Any:
            self.sizes.append(len(jobs))
            return together(jobs, left)

        monkeypatch.setattr(engine, "draw", one)
        monkeypatch.setattr(engine, "draw_together", several)


@pytest.fixture
def counted(served: Served, monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(served, monkeypatch)


def asked(served: Served, pool: ThreadPoolExecutor, count: int, **body: Any) -> list[Any]:
    """So many requests in the line, in order."""
    answers = []
    for index in range(count):
        before = served.service.line.waiting + (served.service.line.running is not None)
        words = {"prompt": PROMPTS[index % 4], "seed": index, "num_inference_steps": STEPS}
        answers.append(pool.submit(served.draw, **{**words, **body}))
        line = served.service.line
        until(lambda line=line, before=before: line.waiting + (line.running is not None) > before)
    return answers


def test_what_waits_is_drawn_together_and_right(
    served: Served, counted: Counted, pipeline: Any
) -> None:
    with ThreadPoolExecutor() as pool:
        answers = asked(served, pool, 4)
        counted.hold.set()
        bodies = [answer.result().json() for answer in answers]
    assert counted.sizes == [1, 3]
    for body, request in zip(bodies, requests(pipeline), strict=True):
        image = decoded(body["data"][0]["b64_json"])
        assert apart(image, run.generate(pipeline, request).images[0]) < 0.5
        assert body["seeds"] == list(request.seeds)


def test_other_steps_and_other_sizes_wait_their_turn(served: Served, counted: Counted) -> None:
    with ThreadPoolExecutor() as pool:
        first = asked(served, pool, 2)
        other = asked(served, pool, 1, num_inference_steps=2)
        last = asked(served, pool, 1)
        counted.hold.set()
        answers = [each.result() for each in (*first, *other, *last)]
    assert counted.sizes == [1, 2, 1]
    assert {answer.status_code for answer in answers} == {200}


def test_no_more_than_were_allowed(served: Served, counted: Counted) -> None:
    with ThreadPoolExecutor() as pool:
        answers = [*asked(served, pool, 1), *asked(served, pool, 3, n=2)]
        counted.hold.set()
        assert [len(answer.result().json()["data"]) for answer in answers] == [1, 2, 2, 2]
    assert counted.sizes == [1, 2, 1]


def test_who_leaves_a_batch_ends_at_its_next_step(served: Served, counted: Counted) -> None:
    with ThreadPoolExecutor() as pool:
        blocking = asked(served, pool, 1)
        stays, goes = asked(served, pool, 2, num_inference_steps=150)
        waiting = served.service.line.live()[-1]
        counted.hold.set()
        until(lambda: waiting.step > 2)
        served.http.delete(f"/v1/jobs/{waiting.id}")
        assert goes.result().status_code == 499
        assert waiting.step < 150
        assert blocking[0].result().status_code == stays.result().status_code == 200


def test_a_batch_that_fails_is_drawn_one_by_one(
    served: Served, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(jobs: Sequence[Job], left: Any) -> Any:
        counted.sizes.append(len(jobs))
        raise RuntimeError("out of luck")

    monkeypatch.setattr(served.service.engine, "draw_together", fails)
    with ThreadPoolExecutor() as pool:
        answers = asked(served, pool, 3)
        counted.hold.set()
        assert {answer.result().status_code for answer in answers} == {200}
    assert counted.sizes == [1, 2, 1, 1]
