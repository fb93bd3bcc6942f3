"""`import diffquant` as people use it."""

import subprocess
import sys
from pathlib import Path

import pytest

import diffquant
from diffquant.errors import SourceError, UsageError

FP8 = Path(__file__).resolve().parents[1] / "data" / "modelopt" / "flux" / "fp8"


def told_by(program: str) -> str:
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_importing_it_imports_no_torch() -> None:
    heavy = "{'torch', 'numpy', 'diffusers', 'transformers', 'huggingface_hub'}"
    assert told_by(f"import sys, diffquant; print(sorted(set(sys.modules) & {heavy}))") == "[]"


def test_everything_it_announces_is_there() -> None:
    for name in diffquant.__all__:
        assert getattr(diffquant, name) is not None
    assert diffquant.__version__.count(".") == 2


@pytest.mark.parametrize("name", ["load", "plan"])
def test_functions_stay_functions_after_their_modules_were_imported(name: str) -> None:
    import diffquant.headers
    import diffquant.loading
    import diffquant.plan

    for _ in range(2):
        with pytest.raises(SourceError):
            getattr(diffquant, name)("/nothing/is/here")
    assert callable(diffquant.plan)
    assert not callable(sys.modules["diffquant.plan"])


def test_a_plan_can_be_had_twice() -> None:
    first, second = (diffquant.plan(device="cpu")["transformer"] for _ in range(2))
    assert first.digest == second.digest
    assert first.format == "modelopt"


@pytest.mark.parametrize(
    ("flag", "nearest"), [("transformer_pth", "transformer_path"), ("numeric", "numerics")]
)
@pytest.mark.parametrize("call", [diffquant.load, diffquant.plan, diffquant.load_component])
def test_an_unknown_flag_is_refused_with_the_nearest(call: object, flag: str, nearest: str) -> None:
    assert callable(call)
    with pytest.raises(UsageError, match=f"unknown flag '{flag}'") as raised:
        call(**{flag: "x"})
    assert raised.value.hint == f"did you mean '{nearest}'?"


def test_a_flag_nothing_resembles_points_to_the_help() -> None:
    with pytest.raises(UsageError) as raised:
        diffquant.load(qqqq=1)
    assert raised.value.hint == "see help(diffquant.load)"


def test_inspecting_answers_from_headers() -> None:
    found = diffquant.inspect(str(FP8))
    assert found.ok
    assert (found.plan.format, found.plan.family) == ("modelopt", "flux1")


def test_a_foreign_pipeline_has_no_report() -> None:
    class Pipeline:
        """Not one of ours."""

    with pytest.raises(UsageError, match="was not loaded by diffquant"):
        diffquant.report(Pipeline())


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("numerics", "faithfull"),
        ("dtype", "bf17"),
        ("nvfp4_nibbles", "hgih"),
        ("scale_layout", "tile"),
        ("quantization_precision", "fp5"),
    ],
)
def test_a_value_nobody_knows_is_refused_and_never_ignored(flag: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"unknown {flag} '{value}'"):
        diffquant.plan("emoji_flux", **{flag: value})
