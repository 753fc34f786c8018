"""The R^2 ladder on MLPs whose answer is known."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import nn

from analyze.surrogates import AffineFit, ConstantGates, even_gate, ladder, product
from cache.weights import MLP

F64 = torch.float64


def random_mlp(activation: str = "silu", *, m: int = 48, bias: bool = False, seed: int = 0) -> MLP:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64) / shape[-1] ** 0.5  # noqa: E731
    down_bias = draw(10) if bias else None
    return MLP(activation=activation, gate=draw(m, 12), up=draw(m, 12), down=draw(10, m), down_bias=down_bias)


def data(function, *, seed: int = 0, blocks: int = 4, shift: float = 0.0):
    """A pass over `blocks` blocks of 500 Gaussian tokens, the same at every call."""

    def start():
        generator = torch.Generator().manual_seed(seed)
        for _ in range(blocks):
            x = torch.randn(500, 12, generator=generator, dtype=F64) + shift
            yield x, function(x)

    return start


def rungs(mlp: MLP, function=None, **more) -> dict[str, float]:
    function = function or mlp
    result = ladder(mlp, data(function), data(function, seed=1), **more)
    return {rung.name: rung.r2 for rung in result.rungs}


class Output(NamedTuple):
    reconstruction: torch.Tensor
    code: torch.Tensor


class Planted(nn.Module):
    """A module that is an MLP with the components after `keep` switched off."""

    def __init__(self, mlp: MLP, keep: int) -> None:
        super().__init__()
        self.mlp, self.keep = mlp, keep
        self.unused = nn.Parameter(torch.zeros(1, dtype=F64))

    def as_mlp(self) -> MLP:
        return self.mlp

    def forward(self, x):
        code = self.mlp.hidden(x) * (torch.arange(self.mlp.width) < self.keep)
        return Output(code @ self.mlp.down.T, code)


def test_planted_bilinear_mlp_is_fully_explained_by_one_number():
    mlp = random_mlp("silu")
    planted = lambda x: 0.3 * product(mlp, x) @ mlp.down.T  # noqa: E731
    result = ladder(mlp, data(planted), data(planted, seed=1))
    r2 = {rung.name: rung.r2 for rung in result.rungs}
    assert abs(r2["scaled"] - 1) < 1e-10 and abs(result.scale - 0.3) < 1e-10
    assert r2["half"] < 0.9 and r2["affine"] < 0.2


def test_bilinear_layer_has_even_gate_one_and_nothing_odd():
    mlp = random_mlp("identity", bias=True)
    result = ladder(mlp, data(mlp), data(mlp, seed=1))
    assert all(abs(rung.r2 - 1) < 1e-9 for rung in result.rungs if rung.name != "affine")
    assert result.energy.even == pytest.approx(1) and result.energy.odd < 1e-20
    assert [even_gate(random_mlp(name)) for name in ("silu", "gelu", "relu")] == pytest.approx([0.5] * 3)


def test_energy_adds_up_and_its_cross_term_vanishes_for_symmetric_inputs():
    mlp = random_mlp(bias=True)

    def mirrored():
        for x, _ in data(mlp)():
            both = torch.cat([x, -x])
            yield both, mlp(both)

    energy = ladder(mlp, mirrored, mirrored).energy
    assert energy.even + energy.odd + energy.cross == pytest.approx(1)
    assert abs(energy.cross) < 1e-12
    assert energy.even > 0.5


def test_affine_rung_is_least_squares():
    mlp = random_mlp()
    r2 = rungs(mlp)["affine"]
    x, y = (torch.cat(parts) for parts in zip(*data(mlp)(), strict=True))
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1), y).solution
    x, y = (torch.cat(parts) for parts in zip(*data(mlp, seed=1)(), strict=True))
    left = y - torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1) @ solution
    assert r2 == pytest.approx(1 - float(left.square().sum() / (y - y.mean(0)).square().sum()), abs=1e-5)


def test_affine_map_and_more_are_recovered():
    mlp = random_mlp()
    plane = torch.randn(10, 12, generator=torch.Generator().manual_seed(3), dtype=F64)
    r2 = rungs(mlp, lambda x: x @ plane.T + 2)
    assert r2["affine"] == pytest.approx(1, abs=1e-8)
    r2 = rungs(mlp)
    assert r2["mean-gate + affine"] > max(r2["mean-gate"], r2["affine"])


def test_half_fails_where_gates_are_shifted_and_mean_gate_does_not():
    mlp = dataclasses.replace(random_mlp(), gate_bias=torch.full((48,), -3.0, dtype=F64))
    r2 = rungs(mlp)
    assert r2["half"] < -1 < 0 < r2["mean-gate"]


def test_constant_gate_is_the_best_one():
    mlp = random_mlp()
    x, _ = next(iter(data(mlp)()))
    gates = ConstantGates()
    gates.update(mlp.hidden(x), product(mlp, x))
    error = lambda c: (mlp.hidden(x) - c * product(mlp, x)).square().sum(0)  # noqa: E731
    best = gates.value()
    assert (error(best) <= error(best + 1e-3)).all() and (error(best) <= error(best - 1e-3)).all()


def test_dead_component_gets_gate_zero():
    gates = ConstantGates()
    gates.update(torch.zeros(5, 2, dtype=F64), torch.tensor([[0.0, 1.0]], dtype=F64).expand(5, 2))
    assert gates.value().tolist() == [0, 0]


def test_module_rungs_measure_the_module():
    mlp = random_mlp()
    r2 = rungs(mlp, module=Planted(mlp, 48))
    assert r2["module"] == pytest.approx(1) and r2["trained"] == pytest.approx(r2["mean-gate"])
    fewer = rungs(mlp, module=Planted(mlp, 24))
    assert fewer["module"] < 0.8 and fewer["trained"] < r2["trained"]


def test_ungated_mlp_has_only_the_affine_rung():
    mlp = dataclasses.replace(random_mlp("relu"), gate=None)
    result = ladder(mlp, data(mlp), data(mlp, seed=1), module=Planted(mlp, 48))
    assert [rung.name for rung in result.rungs] == ["affine", "module"]
    assert result.energy is None and result.scale is None


def test_tokens_are_counted_and_none_is_an_error():
    mlp = random_mlp()
    result = ladder(mlp, data(mlp, blocks=3), data(mlp, blocks=2))
    assert (result.fitted_tokens, result.held_out_tokens) == (1500, 1000)
    with pytest.raises(ValueError, match="no held-out token to measure on"):
        ladder(mlp, data(mlp), data(mlp, blocks=0))
    with pytest.raises(ValueError, match="no training token to fit on"):
        ladder(mlp, data(mlp, blocks=0), data(mlp))


def test_blocks_do_not_change_the_fit():
    x, y = next(iter(data(random_mlp())()))
    whole, parts = AffineFit(), AffineFit()
    whole.update(x, y)
    parts.update(x[:100], y[:100])
    parts.update(x[100:], y[100:])
    torch.testing.assert_close(whole.value().matrix, parts.value().matrix, rtol=1e-9, atol=1e-11)
