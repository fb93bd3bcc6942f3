"""Figures of decoded weights, outliers among them, and what they look like."""

import json
from collections.abc import Mapping
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffquant import headers, planner, sources
from diffquant.cli import run
from diffquant.errors import PlanError
from diffquant.fidelity import LayerFidelity, compare_plans, layer_fidelity
from diffquant.plan import Plan

DATA = Path(__file__).resolve().parents[1] / "data" / "modelopt"
FLUX, WAN = DATA / "flux", DATA / "wan"
Q, K = (f"transformer_blocks.0.attn.to_{letter}" for letter in "qk")


def planned(folder: Path) -> Plan:
    checkpoint = sources.checkpoint(str(folder))
    header = headers.read(checkpoint.files)
    return planner.plan(checkpoint, header, config=checkpoint.config)


def edited(folder: Path, changed: Mapping[str, Tensor | None]) -> Path:
    """The FP8 export of FLUX with some tensors replaced, or left out."""
    folder.mkdir()
    name = "diffusion_pytorch_model.safetensors"
    merged = {**load_file(FLUX / "fp8" / name), **changed}
    save_file({key: tensor for key, tensor in merged.items() if tensor is not None}, folder / name)
    (folder / "config.json").write_text((FLUX / "fp8" / "config.json").read_text())
    return folder


def worst(folder: Path, base: Path = FLUX / "bf16") -> LayerFidelity:
    return compare_plans(planned(folder), planned(base))[0]


# one weight --------------------------------------------------------------------------------------


def test_figures_of_a_known_error() -> None:
    reference = torch.tensor([[3.0, 4.0]])
    found = layer_fidelity(reference, reference + torch.tensor([[0.05, 0.0]]))
    assert found.relative_error == pytest.approx(0.01)
    assert found.sqnr_db == pytest.approx(40.0)
    assert found.max_error == pytest.approx(0.05)


def test_equal_weights_lose_nothing_and_broken_ones_everything() -> None:
    weight = torch.ones(2, 2)
    assert layer_fidelity(weight, weight).sqnr_db == inf
    assert layer_fidelity(weight, weight * torch.nan).relative_error == inf
    assert layer_fidelity(torch.zeros(2, 2), weight).sqnr_db == -inf


def test_weights_of_two_models_are_refused() -> None:
    with pytest.raises(PlanError, match=r"\[2, 3\] is held against one of \[2, 2\]"):
        layer_fidelity(torch.ones(2, 2), torch.ones(2, 3))


# plans -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [FLUX, WAN])
def test_a_true_export_has_no_outliers(family: Path) -> None:
    layers = compare_plans(planned(family / "fp8"), planned(family / "bf16"))
    narrow = [layer for layer in layers if layer.encoding == "fp8"]
    assert not any(layer.is_outlier() or layer.suspicion for layer in layers)
    assert all(layer.fidelity and 0.02 < layer.fidelity.relative_error < 0.0265 for layer in narrow)
    assert [layer.factor for layer in layers] == sorted(
        (layer.factor for layer in layers), reverse=True
    )


def test_layers_are_counted_while_they_are_compared() -> None:
    told: list[tuple[int, int]] = []
    plan = planned(WAN / "fp8")
    compare_plans(plan, planned(WAN / "bf16"), lambda done, total: told.append((done, total)))
    assert told == [(done, len(plan.layers)) for done in range(1, len(plan.layers) + 1)]


def test_a_scale_that_is_off_is_an_outlier_against_layers_of_its_encoding(tmp_path: Path) -> None:
    scale = load_file(FLUX / "fp8" / "diffusion_pytorch_model.safetensors")[f"{Q}.weight_scale"]
    found = worst(edited(tmp_path / "off", {f"{Q}.weight_scale": scale * 1.3}))
    assert (found.path, found.is_outlier(), found.is_outlier(20)) == (Q, True, False)
    assert found.factor == pytest.approx(0.3 / 0.0257, rel=0.05)
    assert found.suspicion and "rows are scaled" in found.suspicion


def test_exchanged_layers_are_named(tmp_path: Path) -> None:
    stored = load_file(FLUX / "fp8" / "diffusion_pytorch_model.safetensors")
    pairs = ((Q, K), (K, Q))
    changed = {
        f"{to}.{leaf}": stored[f"{of}.{leaf}"]
        for to, of in pairs
        for leaf in ("weight", "weight_scale")
    }
    layers = compare_plans(planned(edited(tmp_path / "swap", changed)), planned(FLUX / "bf16"))
    said = {layer.path: layer.suspicion for layer in layers if layer.suspicion}
    assert said.keys() == {Q, K}
    assert said[Q] == f"q and k exchanged? it matches {K!r} of the base"


def third(plan: Plan) -> Plan:
    """The plan with a third block's layer, stored where the second one's is."""
    path = "single_transformer_blocks.{}.attn.to_q"
    return replace(
        plan, layers=(*plan.layers, replace(plan.layer(path.format(1)), path=path.format(2)))
    )


def test_a_layer_left_plain_where_most_are_quantized_is_named_but_no_outlier(
    tmp_path: Path,
) -> None:
    path = "single_transformer_blocks.0.attn.to_q"
    plain = load_file(FLUX / "bf16" / "diffusion_pytorch_model.safetensors")[f"{path}.weight"]
    gone = dict.fromkeys((f"{path}.weight_scale", f"{path}.input_scale"))
    plan = planned(edited(tmp_path / "left", {f"{path}.weight": plain, **gone}))
    base = planned(FLUX / "bf16")
    (found,) = (layer for layer in compare_plans(third(plan), third(base)) if layer.suspicion)
    assert (found.path, found.suspicion) == (path, "left unquantized")
    assert not found.is_outlier()
    assert not any(layer.suspicion for layer in compare_plans(plan, base)), "one of two"


def test_a_layer_one_side_lacks_leads_the_list() -> None:
    plan, base = planned(FLUX / "fp8"), planned(FLUX / "bf16")
    fewer = replace(plan, layers=plan.layers[1:])
    first, *rest = compare_plans(fewer, base)
    assert (first.path, first.suspicion) == (plan.layers[0].path, "missing")
    assert first.is_outlier(inf) and not any(layer.is_outlier() for layer in rest)
    (stranger, *_) = compare_plans(plan, replace(base, layers=base.layers[1:]))
    assert stranger.suspicion == "not in the base"


# the command -------------------------------------------------------------------------------------


def test_inspect_tells_figures_and_succeeds_for_a_true_export(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["inspect", str(WAN / "fp8"), "--base", str(WAN / "bf16")]) == 0
    told = capsys.readouterr().out
    assert "base  0 outliers of 26 layers" in told
    assert "SQNR" in told and " dB" in told


def test_inspect_fails_beyond_the_stated_factor_and_says_why_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = load_file(FLUX / "fp8" / "diffusion_pytorch_model.safetensors")[f"{Q}.weight_scale"]
    folder = edited(tmp_path / "off", {f"{Q}.weight_scale": scale * 1.3})
    words = ["inspect", str(folder), "--base", str(FLUX / "bf16"), "--json"]
    assert run(words) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["audit"]["ok"]
    assert told["fidelity"][0]["path"] == Q
    assert "rows are scaled" in told["fidelity"][0]["suspicion"]
    assert run([*words, "--outlier-factor", "20"]) == 0


def test_without_a_base_nothing_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(FLUX / "fp8"), "--json"]) == 0
    assert "fidelity" not in json.loads(capsys.readouterr().out)
