"""`python -m benchmarks.methods`: what it measures, how it tells, and that every method draws."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from diffquant.compare.chart import picture
from diffquant.schemes import SCHEMES

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("fp8", "int4", "ModelOpt NVFP4", "compressed-tensors INT8")

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves


@pytest.fixture(scope="module")
def bench() -> Any:
    """The program, which is no part of the wheel."""
    sys.path.append(str(ROOT))
    try:
        from benchmarks import methods
    finally:
        sys.path.remove(str(ROOT))
    return methods


@pytest.fixture(scope="module")
def rows(bench: ModuleType) -> dict[str, Any]:
    chosen = [method for method in bench.methods() if method.name in QUICK]
    found = bench.rows(chosen, bench.captions(2), lambda text: None)
    return {row.method.name: row for row in found}


def test_every_scheme_and_every_kind_of_file_has_a_row(bench: ModuleType) -> None:
    names = [method.name for method in bench.methods()]
    assert names[: len(SCHEMES.names())] == list(SCHEMES.names())
    assert len(names) == len(set(names))
    assert {method.kind for method in bench.methods()} == {
        bench.WHILE_LOADING, bench.FILE, bench.MEASURED,
    }  # fmt: skip


def test_methods_draw_what_they_are_asked_for(rows: dict[str, Any]) -> None:
    assert set(rows) == set(QUICK)
    for row in rows.values():
        assert not row.reason
        for figures in row.figures.values():
            assert figures.psnr > 25
            assert figures.recognised in (2, None)
            assert "smoke" in figures.levels


def test_faithful_numerics_cost_more_than_weights_alone(rows: dict[str, Any]) -> None:
    both = rows["ModelOpt NVFP4"].figures
    assert both["faithful"].one_step > 1.1 * both["auto"].one_step
    assert both["faithful"].bytes == both["auto"].bytes
    weight_only = rows["int4"].figures
    assert weight_only["faithful"].one_step == pytest.approx(weight_only["auto"].one_step, rel=0.1)


def test_the_table_has_a_row_for_each_and_says_what_is_missing(
    bench: ModuleType, rows: dict[str, Any], tmp_path: Path
) -> None:
    gone = replace(bench.methods()[0], name="gone", converter="build_nothing --output-dir {out}")
    (missing,) = bench.rows([gone], ["key"], lambda text: None)
    assert missing.reason == "not built: there is no diffquant.converters.build_nothing"
    text = bench.markdown([*rows.values(), missing], 2)
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert "| gone | not built" in text


def test_the_table_takes_its_place_in_a_file_and_no_other(
    bench: ModuleType, tmp_path: Path
) -> None:
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- methods -->\nold\n<!-- /methods -->\nafter\n", "utf-8")
    bench._store(page, "new\n")
    told = page.read_text("utf-8")
    assert told == "before\n<!-- methods -->\nnew\n<!-- /methods -->\nafter\n"
    page.write_text("mine", "utf-8")
    with pytest.raises(SystemExit, match="has no place for the table"):
        bench._store(page, "new\n")
    assert page.read_text("utf-8") == "mine"


def test_the_plot_names_every_method_it_has_room_for(
    bench: ModuleType, rows: dict[str, Any]
) -> None:
    chart = bench.chart(list(rows.values()))
    assert [point.name for point in chart.points] == list(rows)
    assert picture(chart).width > 0


@pytest.mark.long
def test_every_method_draws(bench: ModuleType, tmp_path: Path) -> None:
    assert bench.main(["--prompts", "2", "--json", str(tmp_path / "all.json")]) == 0
    for row in json.loads((tmp_path / "all.json").read_text("utf-8")):
        assert not row["reason"], row["method"]["name"]
        assert row["figures"]["auto"]["psnr"] > 20
        assert row["figures"]["faithful"]["psnr"] > 20
