"""What is said about other tools comes from the table alone, and the table says where it was seen."""

import pytest

from diffquant import readers
from diffquant.encodings import ENCODINGS
from diffquant.formats import FORMATS


@pytest.mark.parametrize("row", readers.rows(), ids=lambda row: f"{row.tool} {row.format}")
def test_a_row_speaks_of_things_that_exist_and_names_its_source(row: readers.Row) -> None:
    assert row.format in FORMATS.names()
    assert set(row.encodings) <= set(ENCODINGS.names())
    assert row.answer in ("yes", "partly", "no")
    assert row.source
    assert row.why or row.answer == "yes"


def test_no_tool_is_asked_twice_about_one_thing() -> None:
    asked = [(row.tool, row.format, each) for row in readers.rows() for each in row.encodings]
    assert len(asked) == len(set(asked))


def test_what_nobody_looked_up_is_not_known() -> None:
    answers = {reader.answer for reader in readers.readers("no format", {"fp8"})}
    assert answers == {readers.NOT_KNOWN}


def test_of_a_mixed_file_the_more_careful_answer_counts() -> None:
    def diffusers(*encodings: str) -> str:
        found = readers.readers("modelopt", encodings)
        return next(reader.answer for reader in found if reader.tool == "diffusers")

    assert diffusers("fp8") == "partly"
    assert diffusers("fp8", "nvfp4") == "no"
