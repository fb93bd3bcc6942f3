"""Each layer quantized alone on the bundled model, and the presets that are chosen from that."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import diffquant
from diffquant import preset
from diffquant.cli import run
from diffquant.compare import budget as budgets
from diffquant.compare.alone import Exchange, Questions, Unit
from diffquant.compare.chart import SHOWN, WIDTH, Chart, Point, picture
from diffquant.converters.sensitivity import Sensitivity, Wish, sensitivity
from diffquant.errors import ConvertError, PresetError, UsageError
from diffquant.run import Request

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves

WISH = Wish(
    source="emoji_flux",
    encoding="nvfp4",
    prompts=("red apple",),
    steps=2,
    settings=Request(num_inference_steps=4),
    device="cpu",
)


# budgets


def unit(name: str, saved: int) -> Unit:
    return Unit(paths=(name,), kind="attention", wide_bytes=2 * saved, bytes=saved, sensitive=False)


class Additive:
    """A model whose layers' squared errors add up, without a model."""

    def __init__(self, errors: dict[Unit, float], always: Sequence[Unit] = ()) -> None:
        self.errors, self.always, self.looks = errors, tuple(always), 0
        ranked = sorted(errors, key=lambda each: -budgets.worth(errors[each], each))
        self.order = tuple(each for each in ranked if each not in self.always)
        self.wide_bytes = sum(each.wide_bytes for each in errors)

    def bytes(self, kept: Sequence[Unit]) -> int:
        return self.wide_bytes - sum(each.saved for each in self.errors if each not in kept)

    def error(self, kept: Sequence[Unit]) -> float:
        self.looks += 1
        return float(sum(e**2 for each, e in self.errors.items() if each not in kept) ** 0.5)

    def figures(self, kept: Sequence[Unit]) -> dict[str, float | None]:
        return {"psnr": -20 * torch.tensor(self.error(kept)).log10().item()}


TINY, WIDE, MILD = unit("tiny", 10), unit("wide", 1000), unit("mild", 100)
MODEL = {TINY: 0.3, WIDE: 0.3, MILD: 0.05}


def test_what_takes_away_most_error_for_a_byte_stays_first() -> None:
    assert Additive(MODEL).order == (TINY, WIDE, MILD)
    assert budgets.parsed("error=0.31").kept(Additive(MODEL)) == (TINY,)
    assert budgets.parsed("error=0.5").kept(Additive(MODEL)) == ()


def test_an_error_budget_keeps_the_fewest_that_meet_it() -> None:
    many = {unit(f"layer{i}", 100): 0.1 for i in range(64)}
    trial = Additive(many)
    kept = budgets.parsed("error=0.5").kept(trial)
    assert trial.error(kept) <= 0.5 < trial.error(kept[:-1])
    assert trial.looks < 12  # halving, not counting up


def test_a_size_budget_takes_what_fits_and_skips_what_does_not() -> None:
    trial = Additive(MODEL)
    assert trial.bytes(()) == 1110
    assert set(budgets.parsed("size=0.55").kept(trial)) == {TINY, MILD}
    assert set(budgets.parsed("size=0.00113MB").kept(trial)) == {TINY}
    with pytest.raises(ConvertError, match="0.5 MB cannot be met|0.001 MB cannot be met"):
        budgets.parsed("size=0.001MB").kept(trial)


def test_a_level_budget_asks_the_drawings() -> None:
    kept = budgets.parsed("level=smoke").kept(Additive({TINY: 0.3, MILD: 0.05}))
    assert kept == (TINY,)


def test_what_must_always_stay_does() -> None:
    assert budgets.parsed("error=0.5").kept(Additive(MODEL, always=[MILD])) == (MILD,)


def test_a_budget_nobody_can_meet_is_refused() -> None:
    with pytest.raises(ConvertError, match="not even one of the layers"):
        budgets.parsed("error=0.01").kept(Additive(MODEL))


@pytest.mark.parametrize(
    "text", ["0.05", "error", "error=x", "error=-1", "size=20", "size=big", "level=good", "psnr=30"]
)
def test_a_budget_that_says_nothing_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        budgets.parsed(text)
    assert refused.value.hint


# the bundled model


@pytest.fixture(scope="module")
def found() -> Sensitivity:
    return sensitivity(WISH, budgets.parsed("error=0.2"))


def test_every_linear_is_measured_and_siblings_together(found: Sensitivity) -> None:
    paths = [path for each, _ in found.alone for path in each.paths]
    assert len(paths) == len(set(paths)) == 34
    (qkv,) = [each for each, _ in found.alone if "transformer_blocks.0.attn.to_q" in each.paths]
    assert [path.rpartition(".")[2] for path in qkv.paths] == ["to_q", "to_k", "to_v"]
    errors = [error for _, error in found.alone]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 10 * errors[-1] > 0


def test_errors_of_layers_nearly_add_in_squares(found: Sensitivity) -> None:
    summed = sum(error**2 for _, error in found.alone) ** 0.5
    assert found.everything == pytest.approx(summed, rel=0.25)


def test_the_budget_is_met_by_measurement_and_not_beyond_need(found: Sensitivity) -> None:
    assert 0 < found.error <= 0.2 < found.everything
    assert 0 < len(found.kept) < len(found.alone)
    assert found.curve[0].error == found.everything
    assert found.curve[-1].error == 0
    assert found.curve[-1].bytes == found.wide_bytes


def test_the_preset_loads_and_makes_the_error_that_was_measured(
    found: Sensitivity, tmp_path: Path
) -> None:
    written = tmp_path / "measured.toml"
    written.write_text(found.preset(), "utf-8")
    (candidate,) = compared(written).candidates
    wide = {layer.path.partition(".")[2] for layer in candidate.layers if layer.encoding == "dense"}
    assert wide == {path for each in found.kept for path in each.paths}
    calls = [each.distance.relative_l2 for each in candidate.one_step]
    again = (sum(error**2 for error in (calls[1], calls[3])) / 2) ** 0.5
    assert again == pytest.approx(found.error, rel=1e-3)


def compared(written: Path) -> Any:
    return diffquant.compare(
        model_path="emoji_flux",
        prompts=WISH.prompts,
        quantization="nvfp4",
        quantization_preset=str(written),
        numerics="faithful",
        num_inference_steps=4,
        device="cpu",
    )


def test_the_preset_gives_every_layer_its_figure(found: Sensitivity) -> None:
    read = preset.parse("measured", found.preset())
    assert (read.family, read.algorithms, read.complete) == ("flux1", ("nvfp4",), True)
    assert len(read.keep) == sum(len(each.paths) for each in found.kept)
    worst, error = found.alone[0]
    assert read.keep[0].pattern == worst.paths[0]
    assert read.keep[0].reason == f"measured: relative L2 {error:.3g} when quantized alone"


def test_a_complete_preset_is_not_added_to_and_another_is(
    found: Sensitivity, tmp_path: Path
) -> None:
    counts = []
    for name, text in {"yes": "complete = true", "no": "complete = false"}.items():
        written = tmp_path / f"{name}.toml"
        written.write_text(f'family = "flux1"\n{text}\n[[keep]]\npatterns = ["x_embedder"]\n'
                           'reason = "measured"\nsource = "test"\n', "utf-8")  # fmt: skip
        asked: dict[str, Any] = {"quantization": "nvfp4", "quantization_preset": str(written)}
        layers = diffquant.plan("emoji_flux", **asked)["transformer"].layers
        counts.append(sum(layer.pieces[0].recode is not None for layer in layers))
    assert counts == [33, 22]


def test_sensitive_layers_stay_where_that_is_asked() -> None:
    wish = replace(WISH, keep_sensitive=True, steps=1, settings=Request(num_inference_steps=1))
    found = sensitivity(wish, budgets.parsed("size=0.6"))
    assert found.bytes <= 0.6 * found.wide_bytes
    assert {each for each, _ in found.alone if each.sensitive} <= set(found.kept)
    assert "complete" not in found.preset()


def test_nothing_of_an_exchange_stays() -> None:
    dense, twin = (torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(2))
    before = dense[0]
    exchange = Exchange.__new__(Exchange)
    exchange.module, exchange._quantized = dense, {"0": twin[0]}
    with pytest.raises(ZeroDivisionError), exchange.quantizing([unit("0", 1)]):
        assert dense[0] is twin[0]
        _ = 1 / 0
    assert dense[0] is before


def test_a_component_that_drawing_does_not_call_is_refused() -> None:
    pipeline = diffquant.load("emoji_flux", device="cpu")
    with pytest.raises(UsageError, match="drawing does not call 'vae'"):
        Questions.of(pipeline, "vae", [], 2, lambda done, of: None)


@pytest.mark.long
def test_what_misses_strict_keeps_it_with_the_preset_that_is_found(tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "prompts": WISH.prompts,
        "numerics": "faithful",
        "device": "cpu",
        "level": "strict",
    }
    bare = diffquant.compare("emoji_flux", quantization="mxfp4", quantize_all=True, **asked)
    assert not bare.ok
    found = sensitivity(
        replace(WISH, encoding="mxfp4", settings=Request()), budgets.parsed("level=strict")
    )
    assert found.levels == ("smoke", "strict")
    assert found.bytes < 0.9 * found.wide_bytes
    written = tmp_path / "strict.toml"
    written.write_text(found.preset(), "utf-8")
    flags: dict[str, Any] = {"quantization": "mxfp4", "quantization_preset": str(written)}
    assert diffquant.compare("emoji_flux", **flags, **asked).ok


# the command


def test_the_command_writes_a_preset_a_plot_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "convert sensitivity emoji_flux --encoding fp8 --budget size=0.7 --prompt key --seed 1"
    quick = "--steps-per-prompt 1 --num-inference-steps 2 --report all.json --device cpu"
    assert run([*words.split(), *quick.split()]) == 0
    told = capsys.readouterr().out
    assert "of 34 layers stay bfloat16, the others are fp8" in told
    assert "--quantization fp8 --quantization-preset flux1-fp8-measured.toml" in told
    assert preset.find("flux1-fp8-measured.toml").keep
    figures = json.loads(Path("all.json").read_text("utf-8"))
    assert figures["bytes"] <= 0.7 * figures["dense_bytes"]
    assert len(figures["layers"]) == 34
    assert Image.open("flux1-fp8-measured.png").width == SHOWN * WIDTH
    assert Path("flux1-fp8-measured.png").stat().st_size < 150_000


def test_files_that_are_there_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "mine.toml"
    taken.write_text("mine", "utf-8")
    words = ["convert", "sensitivity", "emoji_flux", "--encoding", "fp8", "--budget", "error=0.1"]
    assert run([*words, "--output", str(taken)]) == 1
    assert "exists" in capsys.readouterr().err
    assert taken.read_text("utf-8") == "mine"


def test_a_preset_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PresetError, match="no file"):
        asked: dict[str, Any] = {
            "quantization": "fp8",
            "quantization_preset": str(tmp_path / "no.toml"),
        }
        diffquant.plan("emoji_flux", **asked)


# the plot


def test_a_plot_shows_its_points_in_the_colours_of_their_kinds() -> None:
    points = tuple(Point(x=float(i), y=0.1 * i, kind="ab"[i % 2]) for i in range(1, 5))
    shown = picture(Chart(title="t", x="MB", y="error", points=points)).convert("RGB")
    colours = {colour for _, colour in shown.getcolors(1 << 20) or ()}
    blue, orange = (37, 99, 201), (217, 119, 6)
    assert any(near(blue, each) for each in colours)
    assert any(near(orange, each) for each in colours)
    alone = picture(Chart(title="t", x="MB", y="error", points=points[:1])).convert("RGB")
    assert not any(near(orange, each) for each in {c for _, c in alone.getcolors(1 << 20) or ()})


def near(one: tuple[int, ...], other: Any) -> bool:
    return bool(max(abs(a - b) for a, b in zip(one, other, strict=True)) < 16)
