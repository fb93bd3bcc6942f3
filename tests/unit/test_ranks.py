"""Processes that draw together know how many they are, and are told when they are too few."""

from typing import Any

import pytest

from diffquant import device
from diffquant.cli import _talk, run
from diffquant.device import Device
from diffquant.errors import UsageError
from diffquant.loading import ModelFlags, RunFlags, dry_run
from diffquant.ranks import ALONE, Rank, here, own_device, require, require_heads

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_torchrun_tells_a_process_who_it_is() -> None:
    assert here(TORCHRUN) == Rank(number=5, local=1, count=8)
    assert not here(TORCHRUN).is_first


@pytest.mark.parametrize("missing", TORCHRUN)
def test_a_process_without_the_means_to_meet_others_is_alone(missing: str) -> None:
    assert here({name: value for name, value in TORCHRUN.items() if name != missing}) == ALONE


@pytest.mark.parametrize(
    ("degree", "count", "what", "hint"),
    [
        (2, 1, "needs 2 processes, this is one", "torchrun --nproc-per-node 2 -m it 'a fox'"),
        (4, 2, "needs 4 processes, torchrun started 2", "torchrun --nproc-per-node 4 -m it"),
        (1, 2, "each would draw the same picture", "--ulysses-degree 2 lets them"),
    ],
)
def test_another_number_of_processes_is_answered_with_what_to_type(
    degree: int, count: int, what: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=what) as refused:
        require(degree, Rank(count=count), ["-m", "it", "a fox"])
    assert str(refused.value.hint).startswith(hint)
    require(count, Rank(count=count), [])


def test_heads_that_cannot_be_dealt_out_evenly_are_refused() -> None:
    require_heads("transformer", 24, 8)
    require_heads("transformer", None, 5)
    with pytest.raises(UsageError, match="transformer has 24 attention heads") as refused:
        require_heads("transformer", 24, 5)
    assert refused.value.hint == "--ulysses-degree takes one of: 1, 2, 3, 4, 6, 8, 12, 24"


def test_headers_alone_tell_that_the_bundled_model_has_two_heads() -> None:
    dry = dry_run(ModelFlags(), RunFlags(ulysses_degree=2, device="cpu"))
    assert dry.truth_lines[-1] == "ulysses 2: 2 processes draw one picture"
    with pytest.raises(UsageError, match="transformer has 2 attention heads"):
        dry_run(ModelFlags(), RunFlags(ulysses_degree=3, device="cpu"))


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ({"offload": "disk"}, "--offload moves weights at each process's own pace"),
        ({"compile": True}, "--compile was not tried"),
        ({"save_quantized": "folder"}, "--save-quantized would be written by every process"),
    ],
)
def test_what_one_process_cannot_do_for_all_is_refused(flags: dict[str, Any], what: str) -> None:
    RunFlags(ulysses_degree=1, **flags)
    with pytest.raises(UsageError, match=f"{what}.*does not go with --ulysses-degree 2"):
        RunFlags(ulysses_degree=2, **flags)


def test_a_degree_of_none_is_too_small() -> None:
    with pytest.raises(UsageError, match="--ulysses-degree 0 is too small"):
        RunFlags(ulysses_degree=0)


def test_every_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [Device(kind="cuda", arch="sm90", name="H100", sm=90, index=at) for at in (0, 1)]
    monkeypatch.setattr(device, "probe_all", lambda: tuple(cards))
    second = Rank(number=5, local=1, count=8)
    assert own_device(None, second).index == own_device("cuda", second).index == 1
    with pytest.raises(UsageError, match="--device names one device"):
        own_device("cuda:1", second)
    with pytest.raises(UsageError, match="there is no device 'cuda:2' here"):
        own_device(None, Rank(number=2, local=2, count=4))


PROMPT = ["--prompt", "red apple"]


@pytest.mark.parametrize("flag", ["--ulysses-degree", "--sp-degree", "--num-gpus"])
def test_a_pasted_word_for_several_devices_is_answered_with_the_command_to_type(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", *PROMPT, flag, "2"]) == 2
    assert "-m diffquant generate" in (err := capsys.readouterr().err)
    assert "hint: torchrun --nproc-per-node 2" in err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["serve", "--ulysses-degree", "2"], "serve draws every picture in one process"),
        (["compare", *PROMPT, "--ulysses-degree", "2"], "compare draws every picture in one"),
        (
            ["generate", "--input-file", "x", "--ulysses-degree", "2"],
            "--input-file is drawn faster",
        ),
        (["generate", *PROMPT, "--ring-degree", "2"], "ring attention is not offered"),
        (["generate", *PROMPT, "--tp-size", "2"], "every process holds all weights"),
    ],
)
def test_what_is_not_offered_on_several_devices_is_refused_by_name(
    words: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 2
    assert what in capsys.readouterr().err


def test_plan_says_how_many_draw_and_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--ulysses-degree", "2", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "processes  ulysses 2: 2 processes draw one picture" in out
    assert "torchrun --nproc-per-node 2 -m diffquant generate" in out


def test_a_process_that_is_not_the_first_says_nothing_until_it_has_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(_talk.time, "sleep", waited.append)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with _talk.only(here().is_first):
        _talk.say("drawn")
    assert _talk.refuse(UsageError("there is no GPU here")) == 2
    assert capsys.readouterr().err == "error: process 5: there is no GPU here\n"
    assert waited == [_talk.MOMENT]
