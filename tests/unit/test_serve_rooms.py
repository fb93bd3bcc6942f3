"""The rooms of `serve` one by one, without a server."""

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from PIL import Image
from pydantic import ValidationError

from diffquant.errors import UsageError
from diffquant.run import Request, Result
from diffquant.serve import admission
from diffquant.serve.bodies import FIELDS, Delivery, ImageBody
from diffquant.serve.engine import Facts
from diffquant.serve.images import spread
from diffquant.serve.jobs import Job, State, Stopped
from diffquant.serve.line import Line
from diffquant.serve.pictures import Picture, Shelf, encode
from diffquant.serve.refusals import Refused, of_failure, of_validation
from diffquant.serve.settings import Settings, is_loopback

PNG = Delivery(
    format="png", quality=90, as_url=False, stream=False, partial_images=0, progress=False
)


def job(steps: int = 3, seconds: float = 30.0, name: str | None = None) -> Job:
    request = Request(prompt="x", num_inference_steps=steps)
    return Job(request=request, deadline=time.monotonic() + seconds, name=name)


class Slow:
    """An engine whose steps wait until they are let through."""

    def __init__(self, draw: Callable[[Job], None] | None = None) -> None:
        self.gate = threading.Semaphore(0)
        self.happened: list[str] = []
        self._draw = draw

    def open(self) -> None:
        self.happened.append("open")

    def draw(self, job: Job) -> Result:
        for step in range(job.steps):
            assert self.gate.acquire(timeout=10)
            job.require_going()
            job.step = step + 1
        if self._draw is not None:
            self._draw(job)
        self.happened.append("drawn")
        return Result(request=job.request, images=(), seconds=0.3, step_seconds=())

    def recover(self) -> None:
        self.happened.append("recover")

    def close(self) -> None:
        self.happened.append("close")


@pytest.fixture
def slow() -> Any:
    engine = Slow()
    line = Line(engine, size=2)
    line.start()
    assert line.opened.wait(10)
    yield engine, line
    engine.gate.release(1000)
    line.close(patience=5)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


# line


def test_jobs_run_in_the_order_they_came_and_tell_their_position(slow: tuple[Slow, Line]) -> None:
    engine, line = slow
    jobs = [job(), job()]
    for each in jobs:
        line.join(each)
    until(lambda: line.running is jobs[0])
    assert [line.position(each) for each in jobs] == [0, 1]
    engine.gate.release(3)
    until(lambda: jobs[0].state is State.COMPLETED)
    assert jobs[1].state is not State.COMPLETED
    engine.gate.release(3)
    jobs[1].outcome.result(timeout=10)


def test_one_job_too_many_is_told_when_to_come_back(slow: tuple[Slow, Line]) -> None:
    _, line = slow
    line.join(job())
    until(lambda: line.running is not None)
    line.join(job())
    line.join(job())
    with pytest.raises(Refused) as caught:
        line.join(job())
    assert caught.value.status == 429
    assert int(caught.value.headers["Retry-After"]) >= 1


def test_a_job_stopped_while_it_waits_ends_at_once(slow: tuple[Slow, Line]) -> None:
    engine, line = slow
    first, second = job(), job()
    line.join(first)
    until(lambda: line.running is first)
    line.join(second)
    line.stop(second, "cancelled")
    assert isinstance(second.outcome.exception(timeout=1), Stopped)
    assert line.past(second.id) == {**second.to_json(), "state": "cancelled"}
    engine.gate.release(3)
    first.outcome.result(timeout=10)
    assert engine.happened.count("drawn") == 1


def test_a_running_job_stops_at_its_next_step(slow: tuple[Slow, Line]) -> None:
    engine, line = slow
    running = job(steps=100)
    line.join(running)
    engine.gate.release(5)
    until(lambda: running.step == 5)
    line.stop(running, "cancelled")
    engine.gate.release(1)
    assert str(running.outcome.exception(timeout=10)) == "cancelled"
    assert (running.step, running.state) == (5, State.CANCELLED)
    assert engine.happened[-1] == "recover"


def test_two_live_jobs_of_one_name_are_refused(slow: tuple[Slow, Line]) -> None:
    _, line = slow
    line.join(job(name="mine"))
    with pytest.raises(Refused, match="on its way"):
        line.join(job(name="mine"))


def test_a_failing_job_leaves_the_thread_alive() -> None:
    def broken(each: Job) -> None:
        if each.name == "bad":
            raise RuntimeError("a defect")

    engine = Slow(broken)
    engine.gate.release(1000)
    line = Line(engine, size=4)
    line.start()
    assert line.opened.wait(10)
    bad, good = job(name="bad"), job(name="good")
    line.join(bad)
    line.join(good)
    assert str(bad.outcome.exception(timeout=10)) == "a defect"
    assert good.outcome.result(timeout=10).seconds == 0.3
    line.close(patience=5)
    assert engine.happened == ["open", "recover", "drawn", "close"]


def test_a_closing_line_takes_nothing_new_and_finishes_what_it_has() -> None:
    engine = Slow()
    line = Line(engine, size=4)
    line.start()
    assert line.opened.wait(10)
    held = [job(), job()]
    for each in held:
        line.join(each)
    closing = threading.Thread(target=line.close, args=(10.0,))
    closing.start()
    until(lambda: line._closing)
    with pytest.raises(Refused, match="shuts down"):
        line.join(job())
    engine.gate.release(6)
    closing.join(10)
    assert [each.state for each in held] == [State.COMPLETED] * 2


def test_a_closing_line_stops_what_takes_too_long() -> None:
    engine = Slow()
    line = Line(engine, size=4)
    line.start()
    assert line.opened.wait(10)
    stuck, waiting = job(steps=100), job()
    line.join(stuck)
    until(lambda: line.running is stuck)
    line.join(waiting)
    threading.Timer(0.5, engine.gate.release, args=(100,)).start()
    line.close(patience=0.2)
    assert {stuck.state, waiting.state} == {State.CANCELLED}


def test_a_job_past_its_deadline_says_so() -> None:
    late = job(seconds=-1.0)
    with pytest.raises(Stopped, match="timed out"):
        late.require_going()
    job().require_going()


def test_time_left_follows_the_pace_of_the_running_job(slow: tuple[Slow, Line]) -> None:
    engine, line = slow
    running = job(steps=10)
    line.join(running)
    until(lambda: running.began is not None)
    assert line.seconds_left(running) == pytest.approx(10.0)
    engine.gate.release(5)
    until(lambda: running.step == 5)
    assert line.seconds_left(running) < 9.0


# bodies


def test_fields_become_a_request_and_absent_ones_stay_open() -> None:
    body = ImageBody(prompt="a", size="64x32", n=2, seed=3, true_cfg_scale=4)
    request = body.request()
    assert (request.width, request.height, request.seeds) == (64, 32, (3, 4))
    assert request.true_cfg_scale == 4.0
    assert request.num_inference_steps is None
    assert ImageBody(prompt="a", size="auto", width=8).request().width == 8


@pytest.mark.parametrize("size", ["0x8", "8", "8x8x8", "-8x8", "8 x 8", "٨x٨", "1e3x8", ""])
def test_a_size_is_two_numbers(size: str) -> None:
    with pytest.raises(Refused) as caught:
        ImageBody(prompt="a", size=size).request()
    assert caught.value.param == "size"


def test_every_field_of_a_body_is_used_somewhere() -> None:
    """A field nobody reads would be ignored, whatever it says."""
    import inspect

    from diffquant.serve import bodies, images

    source = inspect.getsource(bodies) + inspect.getsource(images)
    tables = set(bodies.NEUTRAL) | set(bodies._SAME_NAME)
    unread = [
        name
        for name in {*bodies.FIELDS, *bodies.VIDEO_FIELDS}
        if name not in tables
        and f"self.{name}" not in source
        and f"body.{name}" not in source
        and f'"{name}"' not in source
    ]
    assert unread == []
    assert set(bodies._SAME_NAME) <= {name for name in Request.__dataclass_fields__}


def test_previews_are_spread_over_the_steps_before_the_last() -> None:
    assert spread(3, 12) == {3, 6, 9}
    assert spread(50, 4) == {1, 2, 3}
    assert spread(0, 12) == frozenset()
    assert spread(2, 1) == frozenset()


# pictures


def test_the_shelf_lets_the_oldest_go() -> None:
    shelf = Shelf(most=10)
    for name in ("a", "b", "c"):
        shelf.put(name, [Picture(b"12345", "png")])
    assert shelf.find("a", 0) is None
    assert shelf.find("c", 0) == Picture(b"12345", "png")
    assert shelf.find("c", 1) is None
    assert shelf.find("c", -1) is None


def test_only_a_png_holds_the_record() -> None:
    image = Image.new("RGB", (8, 8), "red")
    png = encode(image, PNG, {"seed": 7})
    assert b'{"seed": 7}' in png.data
    jpeg = encode(image, Delivery(**{**_fields(PNG), "format": "jpeg"}), {"seed": 7})
    assert (jpeg.data[:3], jpeg.media_type) == (b"\xff\xd8\xff", "image/jpeg")
    assert b"seed" not in jpeg.data


def _fields(delivery: Delivery) -> dict[str, Any]:
    return {name: getattr(delivery, name) for name in Delivery.__slots__}


# refusals and settings


@pytest.mark.parametrize(
    ("typed", "meant"), [("steps", "num_inference_steps"), ("cfg_scale", "true_cfg_scale")]
)
def test_a_field_of_other_servers_is_told_ours(typed: str, meant: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ImageBody.model_validate({"prompt": "a", typed: 3})
    assert meant in of_validation(caught.value.errors(), FIELDS).message


def test_what_the_decoder_alone_would_need_must_be_free() -> None:
    facts = cast(Facts, SimpleNamespace(decoded_bytes=256, report=SimpleNamespace(device="cpu")))
    large, small = Request(width=2048, height=2048), Request(width=64, height=64)
    with pytest.raises(Refused, match="takes at least 3.2 GB, 1.0 GB are free"):
        admission._require_memory(large, facts, lambda _: 10**9)
    admission._require_memory(large, facts, lambda _: 10**10)
    admission._require_memory(small, facts, lambda _: 0)


def test_a_defect_of_ours_tells_its_kind_and_not_its_text() -> None:
    refused = of_failure(FileNotFoundError("/home/somebody/secret"))
    assert refused.status == 500
    assert "secret" not in refused.message


def test_flags_in_a_refusal_become_fields() -> None:
    refused = of_failure(UsageError("--negative-prompt has no effect", hint="--true-cfg-scale 4"))
    assert refused.message == "negative_prompt has no effect (hint: true_cfg_scale 4)"
    assert (refused.status, refused.param) == (400, "negative_prompt")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_key(host: str) -> None:
    Settings(host=host).require_safe()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", ""])
def test_a_public_host_needs_a_key_or_a_word(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(UsageError, match="without a key"):
        Settings(host=host).require_safe()
    Settings(host=host, api_key="long enough").require_safe()
    Settings(host=host, insecure=True).require_safe()


def test_a_key_that_can_be_guessed_is_refused() -> None:
    with pytest.raises(UsageError, match="too short"):
        Settings(api_key="1234").require_safe()
