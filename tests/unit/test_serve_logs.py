"""A line per event, for people and for those who collect."""

import json
import logging
from collections.abc import Iterator

import pytest

from diffquant.serve import logs


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    kept, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = kept, level


def test_an_event_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    logs.start("json")
    logs.event("job ended", job="a1", waited=0.25, user='o"brien')
    told = json.loads(capsys.readouterr().err)
    assert (told["event"], told["level"], told["job"], told["waited"]) == (
        "job ended",
        "info",
        "a1",
        0.25,
    )
    assert told["user"] == 'o"brien'


def test_a_failure_brings_its_traceback_on_the_same_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.start("json")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logs.LOG.exception("job a1 failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: two" in json.loads(line)["traceback"]


def test_people_read_names_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    logs.start("text")
    logs.event("job ended", job="a1", waited=0.25)
    assert capsys.readouterr().err.endswith("INFO job ended job=a1 waited=0.25\n")
