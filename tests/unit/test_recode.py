"""Encoding while loading: shared scales, low-rank branches, and what is not to be changed by it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffquant.encodings import ENCODINGS
from diffquant.formats._svdquant_units import AWQ_RECODE
from diffquant.plan import (
    DENSE,
    Encoding,
    LayerPlan,
    Part,
    Piece,
    Plan,
    PlanFile,
    Recode,
    Role,
    Span,
    TensorRef,
)
from diffquant.recode import Encoder, encoded, lowrank
from diffquant.recode._codes import codes
from diffquant.recode._lowrank import ROUNDS
from diffquant.schemes import SCHEMES
from diffquant.tensors import Weights
from diffquant.writing import Declared, write_file

N, K = 64, 256


def weight(seed: int = 0, scale: float = 0.02) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * scale


def value(parts: dict[Role, Tensor], recode: Recode) -> Tensor:
    """What the parts multiply with, branch included."""
    decoded = ENCODINGS.load(recode.encoding.name).decode(parts, recode.encoding, (N, K))
    if Role.LOWRANK_UP in parts:
        decoded += parts[Role.LOWRANK_UP].float() @ parts[Role.LOWRANK_DOWN].float()
    return decoded


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("name", SCHEMES.names())
def test_it_makes_the_parts_its_plan_promises(name: str) -> None:
    recode = SCHEMES.load(name).recode()
    truth = weight()
    parts = encoded(truth, recode)
    assert frozenset(parts) == recode.roles
    assert all(parts[role].data_ptr() != truth.data_ptr() for role in parts)
    assert torch.equal(truth, weight())
    bits = ENCODINGS.load(recode.encoding.name).bits
    assert error(value(parts, recode), weight()) < (0.04 if bits == 8 else 0.16)


def test_a_shared_scale_is_the_one_the_codec_takes_from_the_largest_sibling() -> None:
    small, large = weight(), weight(1, scale=0.5)
    for name in ("fp8_tensor", "nvfp4"):
        recode = SCHEMES.load(name).recode("q")
        alone, shared = encoded(small, recode), encoded(small, recode, amax=large.abs().max())
        truth = encoded(large, recode)[Role.TENSOR_SCALE]
        assert torch.equal(shared[Role.TENSOR_SCALE], truth)
        assert not torch.equal(alone[Role.TENSOR_SCALE], truth)


def test_siblings_are_measured_in_their_files_and_biases_pass_through(tmp_path: Path) -> None:
    stored = {"q.weight": weight(), "k.weight": weight(1, scale=0.5), "q.bias": torch.ones(N)}
    plan = planned(tmp_path, stored, SCHEMES.load("fp8_tensor").recode("q"))
    weights = Weights([Path(file.path) for file in plan.files])
    encoder, piece = Encoder(plan, weights), plan.layers[0].pieces[0]
    parts = encoder.parts(piece, {Role.CODES: stored["q.weight"], Role.BIAS: stored["q.bias"]})
    assert float(parts[Role.TENSOR_SCALE]) == pytest.approx(
        float(stored["k.weight"].abs().max()) / 448
    )
    assert torch.equal(parts[Role.BIAS], stored["q.bias"])


def planned(folder: Path, stored: dict[str, Tensor], recode: Recode) -> Plan:
    """Two linears q and k that share an amax."""
    declared = [
        Declared(name, "F32", tuple(tensor.shape), lambda tensor=tensor: tensor)
        for name, tensor in stored.items()
    ]
    path = write_file(folder / "weights.safetensors", declared)
    layers = tuple(
        LayerPlan(
            path=name,
            shape_NK=(N, K),
            pieces=(
                Piece(
                    encoding=DENSE,
                    stored_NK=(N, K),
                    parts=(Part(Role.CODES, TensorRef(0, f"{name}.weight")),),
                    out=Span(0, N),
                    cols=Span(0, K),
                    recode=recode,
                ),
            ),
            dtype="float32",
            why="",
        )
        for name in ("q", "k")
    )
    return Plan(
        files=(PlanFile(str(path), path.stat().st_size),),
        format="diffusers",
        family="generic",
        config={},
        layers=layers,
        plain=(),
    )


def test_a_weight_that_is_quantized_already_is_decoded_first() -> None:
    fp8 = ENCODINGS.load("fp8")
    first = encoded(weight(), SCHEMES.load("fp8").recode())
    piece = Piece(
        encoding=Encoding("fp8"),
        stored_NK=(N, K),
        parts=(),
        out=Span(0, N),
        cols=Span(0, K),
        recode=SCHEMES.load("int8").recode(),
    )
    plan = Plan(files=(), format="", family="", config={}, layers=(), plain=())
    second = Encoder(plan, Weights([])).parts(piece, first)
    decoded = fp8.decode(first, Encoding("fp8"), (N, K))
    assert second[Role.CODES].dtype == torch.int8
    assert error(value(second, SCHEMES.load("int8").recode()), decoded) < 0.01


def test_the_random_sketch_finds_the_best_branch_and_leaves_random_numbers_alone() -> None:
    truth = weight() + weight(2)[:, :1] @ weight(3)[:1] * 40
    torch.manual_seed(5)
    before = torch.get_rng_state()
    up, down = lowrank(truth, 16)
    assert torch.equal(before, torch.get_rng_state())
    best = truncated(truth, 16)
    found = error(up.float() @ down.float(), truth)
    assert error(best, truth) <= found * 1.001
    assert found < 1.02 * error(best, truth) < error(truncated(truth, 8), truth)
    again = lowrank(truth, 16)
    assert torch.equal(again[0], up)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@pytest.mark.parametrize("name", ["svdq_int4", "svdq_nvfp4"])
def test_a_branch_carries_what_quantizing_loses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = SCHEMES.load(name)
    truth = weight() + weight(2)[:, :4] @ weight(3)[:4] * 40
    parts = encoded(truth, scheme.recode())
    with_branch = error(value(parts, scheme.recode()), truth)
    without = {role: part for role, part in parts.items() if role not in (Role.LOWRANK_UP,)}
    plain = encoded(truth, SCHEMES.load("int4_64" if "int4" in name else "nvfp4").recode())
    assert with_branch < 0.8 * error(value(plain, scheme.recode()), truth)
    assert error(value(without, scheme.recode()), truth) > 3 * with_branch
    monkeypatch.setattr("diffquant.recode._lowrank.ROUNDS", 1)
    assert with_branch <= error(value(encoded(truth, scheme.recode()), scheme.recode()), truth)
    assert ROUNDS > 1


@pytest.mark.parametrize("name", ["linear_int4_plain", "linear_int4_gelu_shifted_unsigned"])
def test_codes_and_scales_are_those_nunchakus_own_quantizer_took(name: str, data: Path) -> None:
    truth = load_file(data / "nunchaku" / f"{name}.safetensors")
    recode = replace(SCHEMES.load("svdq_int4").recode(), rank=None)
    scale = truth["logical.scale"].float().repeat_interleave(64, 1)
    made = codes(truth["logical.code"].float() * scale, recode)
    nibbles = made[Role.CODES]
    found = torch.stack((nibbles & 15, nibbles >> 4), dim=2).flatten(1)
    assert torch.equal(found, truth["logical.code"].view(torch.uint8) & 15)
    assert torch.equal(made[Role.BLOCK_SCALE], truth["logical.scale"])


def test_a_scaled_zero_fits_a_range_that_is_not_around_zero() -> None:
    """Modulation weights: 4 bits over the range there is, not over the largest magnitude."""
    recode = AWQ_RECODE
    truth = weight() + 0.05
    parts = encoded(truth, recode)
    assert parts[Role.BLOCK_SCALE].dtype == parts[Role.ZERO_POINT].dtype == torch.bfloat16
    plain = encoded(truth, SCHEMES.load("int4_64").recode())
    symmetric = error(value(plain, SCHEMES.load("int4_64").recode()), truth)
    assert error(value(parts, recode), truth) < 0.6 * symmetric
