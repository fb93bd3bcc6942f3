"""More machines than one, without Ray: who draws what when painters come, fail and are lost."""

import importlib.util
import json
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffquant import batch, cli, loading
from diffquant.batch import Line, Outcome
from diffquant.errors import DiffquantError, RunError, SourceError, UsageError
from diffquant.on_ray import batch as on_ray
from diffquant.on_ray.cluster import Cluster, Replicas, _Ours, needs
from diffquant.on_ray.crew import Heard
from diffquant.on_ray.painter import Commission, Drawing, Opened, Painter, Task, packed
from diffquant.resolve import ModelFlags
from diffquant.run import Request

REPORT = {"components": {"transformer": {"digest": "abc"}}, "dtype": "bfloat16"}
DIGESTS = {"transformer": "abc"}
STEPS = Request(num_inference_steps=1)


def opened(digest: str = "abc", **versions: str) -> Opened:
    report = {**REPORT, "components": {"transformer": {"digest": digest}}}
    return Opened(host="elsewhere", truth=("all fp8",), report=report, versions=versions)


def said(task: Task) -> Drawing:
    """A picture of nothing but its name."""
    count = task.request.num_images_per_prompt or 1
    return Drawing(files={f"{task.name}-{index}.png": b"whole" for index in range(count)})


class Hands:
    """A crew in this process: what each member does next is what the test says, else what it should."""

    def __init__(self, *does: Callable[[int, Task | None], Heard | None]) -> None:
        self.does = deque(does)
        self.hired: list[int] = []
        self.dismissed: list[int] = []
        self.drew: list[str] = []
        self._asked: deque[tuple[int, Task | None]] = deque()

    def hire(self) -> int:
        self.hired.append(len(self.hired) + 1)
        self._asked.append((self.hired[-1], None))
        return self.hired[-1]

    def ask(self, member: int, task: Task) -> None:
        assert member not in self.dismissed and member not in [busy for busy, _ in self._asked]
        self._asked.append((member, task))

    def hear(self, patience: float) -> Heard | None:
        member, task = self._asked.popleft()
        told = self.does.popleft()(member, task) if self.does else None
        if told is not None:
            return told
        if task is None:
            return Heard(member=member, answer=opened())
        self.drew.append(task.name)
        return Heard(member=member, answer=said(task))

    def dismiss(self, member: int) -> None:
        assert member not in self.dismissed
        self.dismissed.append(member)


def well(member: int, task: Task | None) -> None: ...


def lost(member: int, task: Task | None) -> Heard:
    return Heard(member=member, lost="its node has died")


def lines(*prompts: str) -> list[Line]:
    return [
        Line(number=number, request=Request(prompt=prompt, seed=1))
        for number, prompt in enumerate(prompts, start=1)
    ]


def drawn(
    crew: Hands, wanted: list[Line], folder: Path, replicas: int = 2
) -> tuple[list[Outcome], list[str]]:
    told: list[str] = []
    outcomes = list(
        on_ray.draw(wanted, crew, folder, replicas=replicas, digests=DIGESTS, tell=told.append)
    )
    return outcomes, told


def states(outcomes: list[Outcome]) -> dict[int, str]:
    assert len({outcome.number for outcome in outcomes}) == len(outcomes), "a line ended twice"
    return {outcome.number: outcome.state for outcome in outcomes}


# who draws what


def test_every_line_is_drawn_once_under_the_name_that_one_machine_gives_it(tmp_path: Path) -> None:
    crew, wanted = Hands(), lines("a", "b", "c", "d", "e")
    outcomes, told = drawn(crew, wanted, tmp_path)
    assert states(outcomes) == dict.fromkeys(range(1, 6), "drawn")
    names = [batch.name_of(line.request, REPORT) for line in wanted]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{n}-0.png" for n in names)
    assert (sorted(crew.drew), crew.hired) == (sorted(names), [1, 2])
    assert told == ["all fp8"]
    assert sorted(crew.dismissed) == [1, 2]


def test_a_lost_line_is_drawn_by_another_and_nothing_twice(tmp_path: Path) -> None:
    crew = Hands(well, well, lost)
    outcomes, told = drawn(crew, lines("a", "b", "c", "d"), tmp_path)
    assert states(outcomes) == dict.fromkeys(range(1, 5), "drawn")
    assert len(crew.drew) == len(set(crew.drew)) == len(list(tmp_path.iterdir())) == 4
    assert crew.hired == [1, 2, 3]
    assert "a pipeline was lost over line 1, which is drawn again: its node has died" in told


def test_losing_all_of_them_at_once_loses_no_line(tmp_path: Path) -> None:
    crew = Hands(well, well, lost, lost)
    outcomes, _ = drawn(crew, lines("a", "b", "c"), tmp_path)
    assert states(outcomes) == dict.fromkeys(range(1, 4), "drawn")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_line_over_which_they_are_always_lost_is_blamed_and_the_rest_drawn(
    tmp_path: Path,
) -> None:
    def deadly(member: int, task: Task | None) -> Heard | None:
        return lost(member, task) if task and task.request.prompt == "b" else None

    crew = Hands(*[deadly] * 20)
    outcomes, _ = drawn(crew, lines("a", "b", "c"), tmp_path)
    assert states(outcomes) == {1: "drawn", 2: "failed", 3: "drawn"}
    (blamed,) = [outcome.error for outcome in outcomes if outcome.number == 2]
    assert blamed == "3 pipelines were lost over it, the last: its node has died"


def test_a_crew_that_forgets_what_was_lost_is_seen_by_these_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: without the line put back the run would wait for an answer nobody owes."""
    monkeypatch.setattr(on_ray._Run, "_lost", lambda run, member, why: iter(()))
    with pytest.raises(IndexError):
        drawn(Hands(well, lost), lines("a", "b"), tmp_path, replicas=1)


def test_pipelines_lost_before_one_was_ready_end_the_run(tmp_path: Path) -> None:
    crew = Hands(lost, lost, lost)
    with pytest.raises(RunError, match="3 pipelines were lost before one was ready"):
        drawn(crew, lines("a"), tmp_path)
    assert sorted(crew.dismissed) == crew.hired


def test_a_machine_that_cannot_load_is_left_out(tmp_path: Path) -> None:
    def unable(member: int, task: Task | None) -> Heard:
        return Heard(member=member, error=SourceError("there is no '/weights'"))

    crew = Hands(unable)
    outcomes, told = drawn(crew, lines("a", "b", "c"), tmp_path)
    assert states(outcomes) == dict.fromkeys(range(1, 4), "drawn")
    assert crew.hired == [1, 2]
    assert "a machine cannot load the pipeline and is left out: there is no '/weights'" in told
    with pytest.raises(SourceError):
        drawn(Hands(unable, unable), lines("d", "e"), tmp_path)


def test_a_defect_while_drawing_is_told_and_not_drawn_again(tmp_path: Path) -> None:
    def broken(member: int, task: Task | None) -> Heard:
        return Heard(member=member, error=AssertionError("a defect"))

    crew = Hands(well, broken)
    with pytest.raises(AssertionError, match="a defect"):
        drawn(crew, lines("a"), tmp_path)
    assert crew.dismissed == [1]


def test_other_weights_elsewhere_are_refused(tmp_path: Path) -> None:
    def other(member: int, task: Task | None) -> Heard:
        return Heard(member=member, answer=opened(digest="abd"))

    with pytest.raises(RunError, match="the transformer that elsewhere reads is not the one"):
        drawn(Hands(other), lines("a"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_versions_elsewhere_are_told(tmp_path: Path) -> None:
    def older(member: int, task: Task | None) -> Heard:
        return Heard(member=member, answer=opened(torch="1.0", threads="99"))

    _, told = drawn(Hands(older), lines("a"), tmp_path)
    assert any("elsewhere has torch 1.0" in line and "threads" not in line for line in told)


# lines


def test_a_bad_line_is_named_and_a_repeated_one_drawn_once(tmp_path: Path) -> None:
    wanted = [*lines("a", "b", "a"), Line(number=4, fault="no JSON")]
    crew = Hands()
    outcomes, _ = drawn(crew, wanted, tmp_path)
    assert states(outcomes) == {1: "drawn", 2: "drawn", 3: "kept", 4: "failed"}
    assert len(crew.drew) == len(list(tmp_path.iterdir())) == 2


def test_only_bad_lines_hire_nobody(tmp_path: Path) -> None:
    crew = Hands()
    outcomes, _ = drawn(crew, [Line(number=1, fault="no JSON")], tmp_path)
    assert (states(outcomes), crew.hired) == ({1: "failed"}, [])


def test_a_line_whose_picture_is_not_there_fails_alone(tmp_path: Path) -> None:
    nowhere = Line(number=1, request=Request(prompt="a", image=("nowhere.png",)))
    outcomes, _ = drawn(Hands(), [nowhere, *lines("a", "b")[1:]], tmp_path)
    assert states(outcomes) == {1: "failed", 2: "drawn"}
    assert outcomes[0].error == "'nowhere.png' cannot be read: No such file or directory"


def test_a_file_that_cannot_be_written_leaves_nothing_half(tmp_path: Path) -> None:
    (tmp_path / "b.png").mkdir()
    with pytest.raises(OSError, match="b.png"):
        on_ray.write(tmp_path, {"a.png": b"whole", "b.png": b"whole"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


# a real pipeline, in this process


@pytest.fixture(scope="module")
def painter() -> Painter:
    commission = Commission(
        model=ModelFlags(),
        run=loading.RunFlags(device="cpu"),
        folder="/nowhere/at/all",
        threads=1,
        defaults={"num_inference_steps": 1, "max_sequence_length": 16, "height": 64, "width": 64},
        flags={},
    )
    made = Painter(commission)
    made.open()
    return made


class Here(Hands):
    """Members that share a real pipeline."""

    def __init__(self, painter: Painter, *does: Any) -> None:
        super().__init__(*does)
        self.painter = painter

    def hear(self, patience: float) -> Heard | None:
        member, task = self._asked.popleft()
        told = self.does.popleft()(member, task) if self.does else None
        if told is not None:
            return told
        answer = self.painter.open() if task is None else self.painter.draw(task)
        return Heard(member=member, answer=answer)


def test_a_run_over_a_crew_goes_on_where_one_machine_was_cut_off(
    painter: Painter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [
        Line(number=number, request=Request(prompt="red apple", seed=number, num_inference_steps=1))
        for number in (1, 2, 3)
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "red apple", "seed": 2}), "utf-8")
    out = tmp_path / "out"
    words = ["--device", "cpu", "--num-inference-steps", "1", "--output-path", str(out)]
    assert cli.run(["generate", "--input-file", str(file), *words]) == 0
    kept = Path(capsys.readouterr().out.strip())
    digests = {name: part["digest"] for name, part in painter.open().report["components"].items()}
    outcomes = list(
        on_ray.draw(wanted, Here(painter, well, lost), out, replicas=1, digests=digests, tell=print)
    )
    assert states(outcomes) == {1: "drawn", 2: "kept", 3: "drawn"}
    assert outcomes[0].paths == (kept,)
    assert len(list(out.iterdir())) == 3


def test_a_painter_tells_the_misfortune_of_one_request(painter: Painter) -> None:
    drawing = painter.draw(Task(name="x", request=Request(prompt="a", num_frames=3)))
    assert drawing.files == {}
    assert drawing.error is not None and "--num-frames means nothing" in drawing.error


def test_a_record_names_pictures_as_they_were_typed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"one")
    request = Request(prompt="a", image=(str(tmp_path / "a.png"),))
    task = packed("x", request)
    assert task.pictures == {str(tmp_path / "a.png"): b"one"}
    from diffquant.on_ray.painter import _unpacked

    there = _unpacked(task, str(tmp_path))
    assert there.image == (str(tmp_path / "0.png"),)
    assert Path(there.image[0]).read_bytes() == b"one"


# the cluster


@pytest.mark.parametrize(("text", "span"), [("2", (2, 2)), ("1:4", (1, 4))])
def test_replicas_are_a_number_or_two(text: str, span: tuple[int, int]) -> None:
    replicas = Replicas.parsed(text)
    assert (replicas.least, replicas.most) == span


@pytest.mark.parametrize("text", ["0", "-1", "4:1", "a", "1:", ":2", "", "1:2:3", "9999"])
def test_anything_else_is_no_number_of_replicas(text: str) -> None:
    with pytest.raises(UsageError, match="--replicas"):
        Replicas.parsed(text)


def test_each_gets_a_gpu_where_there_are_some() -> None:
    with_gpus, without = Cluster(nodes=2, cpus=8, gpus=2), Cluster(nodes=2, cpus=8, gpus=0)
    assert needs(with_gpus, None)["num_gpus"] == needs(with_gpus, "cuda")["num_gpus"] == 1
    assert needs(with_gpus, "cpu")["num_gpus"] == needs(without, None)["num_gpus"] == 0
    with pytest.raises(UsageError, match="has no GPU"):
        needs(without, "cuda")
    with pytest.raises(UsageError, match="a GPU of its own"):
        needs(with_gpus, "cuda:1")


def test_only_our_own_thread_speaks_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    ours = _Ours(sys.stdout, None)
    theirs = threading.Thread(target=ours.write, args=("raylet is terminated",))
    theirs.start()
    theirs.join()
    ours.write("a.png")
    assert capsys.readouterr().out == "a.png"


# what is typed


@pytest.fixture
def prompts(tmp_path: Path) -> Iterator[list[str]]:
    file = tmp_path / "prompts.txt"
    file.write_text("red apple", "utf-8")
    yield ["generate", "--input-file", str(file), "--output-path", str(tmp_path / "out")]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["serve", "--replicas", "2"], "--replicas speaks of a Ray cluster"),
        (["serve", "--ray-address", "auto"], "--engine ray --ray-address"),
        (["serve", "--engine", "ray", "--replicas", "0"], "--replicas '0' is neither"),
        (["serve", "--engine", "ray", "--workers", "2"], "leave --workers out"),
        (["serve", "--engine", "ray", "--port", "0"], "--port 30000"),
        (["serve", "--engine", "ray", "--target-ongoing-requests", "3"], "--replicas 1:4"),
        (["serve", "--engine", "ray", "--host", "0.0.0.0"], "lets others in without a key"),
        (["generate", "--engine", "ray", "--prompt", "a"], "--input-file prompts.jsonl"),
    ],
)
def test_what_would_be_ignored_is_refused_before_ray_starts(
    words: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(monkeypatch, True)
    assert cli.run(words) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--profile", "trace"], "leave --profile out"),
        (["--save-quantized", "saved"], "leave --save-quantized out"),
        (["--replicas", "1:2"], "--replicas 2"),
    ],
)
def test_what_a_file_of_lines_cannot_have_is_refused(
    words: list[str],
    told: str,
    prompts: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(monkeypatch, True)
    assert cli.run([*prompts, "--engine", "ray", *words]) == 2
    assert told in capsys.readouterr().err


def test_an_address_where_nobody_listens_is_told_at_once(
    prompts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    assert cli.run([*prompts, "--engine", "ray", "--ray-address", address]) == 1
    assert f"no Ray cluster answers at '{address}'" in capsys.readouterr().err


def test_without_ray_the_hint_installs_it(
    prompts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, False)
    assert cli.run([*prompts, "--engine", "ray"]) == 2
    assert "pip install 'diffquant[ray]'" in capsys.readouterr().err


def installed(monkeypatch: pytest.MonkeyPatch, is_there: bool) -> None:
    """Have Ray there, or not, whatever this machine has."""
    real = importlib.util.find_spec

    def find(name: str, *rest: Any) -> Any:
        return is_there or None if name == "ray" else real(name, *rest)

    monkeypatch.setattr("diffquant.on_ray.cluster.find_spec", find)


def test_errors_travel_whole() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(SourceError("what", hint="do")))
    assert isinstance(error, DiffquantError) and (error.what, error.hint) == ("what", "do")
