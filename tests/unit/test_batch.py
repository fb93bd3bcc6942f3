"""A file of requests: what is drawn stays, what is bad is named, and the rest is drawn."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffquant import batch, cli
from diffquant.errors import UsageError
from diffquant.run import Request, read_metadata

STEPS = ("--num-inference-steps", "1")
TYPED = Request(seed=5)
REPORT = {"components": {"transformer": {"digest": "abc"}}, "dtype": "bfloat16"}


def lines(tmp_path: Path, *said: Any, name: str = "prompts.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in said), "utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], file: Path, folder: Path, *words: str) -> Any:
    code = cli.run(
        ["generate", "--json", "--input-file", str(file), "--output-path", str(folder), *words]
    )
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_good_line_is_drawn_and_every_bad_one_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = lines(
        tmp_path,
        {"prompt": "red apple", "num_images_per_prompt": 2},
        "",
        "no json",
        {"prompt": "cat", "sed": 4},
        {"prompt": "cat", "image": "nowhere.png"},
        {"prompt": "cat", "seed": 7, "width": 35},
    )
    code, told = run(capsys, file, tmp_path / "out", *STEPS)
    assert code == 1
    assert [outcome["line"] for outcome in told] == [1, 3, 4, 5, 6]
    assert [outcome["state"] for outcome in told] == [
        "drawn",
        "failed",
        "failed",
        "failed",
        "drawn",
    ]
    assert [len(outcome["paths"]) for outcome in told] == [2, 0, 0, 0, 1]
    assert "seed" in told[2]["error"]
    assert told[4]["note"].startswith("35x") and "note" not in told[0]
    assert read_metadata(Path(told[4]["paths"][0]))["request"]["seed"] == 7


def test_a_second_run_draws_only_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = lines(tmp_path, "red apple", "cat", name="prompts.txt"), tmp_path / "out"
    code, first = run(capsys, file, folder, *STEPS)
    before = Path(first[0]["paths"][0]).read_bytes()
    Path(first[1]["paths"][0]).write_bytes(b"")  # what a kill leaves of a reserved name
    again, second = run(capsys, file, folder, *STEPS)
    assert (code, again) == (0, 0)
    assert [outcome["state"] for outcome in second] == ["kept", "drawn"]
    assert [outcome["paths"] for outcome in second] == [outcome["paths"] for outcome in first]
    assert Path(first[0]["paths"][0]).read_bytes() == before


def test_a_name_tells_apart_all_that_decides_a_picture() -> None:
    request = Request(prompt="a fox", seed=5)
    names = {
        batch.name_of(request, REPORT),
        batch.name_of(replace(request, num_inference_steps=2), REPORT),
        batch.name_of(request, {**REPORT, "numerics": "faithful"}),
        batch.name_of(request, {"components": {"transformer": {"digest": "abd"}}}),
    }
    assert len(names) == 4
    assert all(name.startswith("a-fox-5-") for name in names)
    assert batch.name_of(request, REPORT) == batch.name_of(request, dict(REPORT))


def test_typed_fields_hold_where_a_line_is_silent(tmp_path: Path) -> None:
    file = lines(tmp_path, {"prompt": "a"}, {"prompt": "b", "seed": 9, "image": "x.png"})
    first, second = batch.read(file, TYPED)
    assert (first.request.seed, second.request.seed) == (5, 9)
    assert second.request.image == ("x.png",)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('["a"]', "list"),
        ("{}", "no prompt"),
        ('{"prompt": 3}', "str was needed"),
        ('{"prompt": "a", "seed": "7"}', "int was needed"),
        ('{"prompt": "a", "seed": true}', "int was needed"),
    ],
)
def test_a_line_that_is_no_request_says_why(tmp_path: Path, line: str, fault: str) -> None:
    (only,) = batch.read(lines(tmp_path, line), TYPED)
    assert only.fault is not None and fault in only.fault


def test_whole_numbers_will_do_for_scales(tmp_path: Path) -> None:
    (only,) = batch.read(lines(tmp_path, {"prompt": "a", "guidance_scale": 3}), TYPED)
    assert only.fault is None and only.request.guidance_scale == 3


@pytest.mark.parametrize("content", ["", "\n\n", None])
def test_a_file_without_a_line_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match="--input-file"):
        batch.read(path, TYPED)


@pytest.mark.parametrize("surplus", ["--prompt", "--output-file-name"])
def test_what_each_line_says_is_not_said_for_all(
    tmp_path: Path, surplus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = lines(tmp_path, {"prompt": "a"})
    assert cli.run(["generate", "--input-file", str(file), surplus, "x"]) == 2
    assert f"leave {surplus} out" in capsys.readouterr().err
