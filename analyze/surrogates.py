"""How much of an MLP its quadratic form explains: a ladder of stand-ins, each with its R^2 on held-out tokens.

    affine        y ~ A x + b                        the baseline that every claim has to beat
    half          h_i ~ c z_i w_i, c = 1/2           the even part of a gated layer without biases; weights alone
    scaled        h_i ~ c z_i w_i                    one number fitted
    mean-gate     h_i ~ c_i z_i w_i                  c_i = E[h z w]/E[(z w)^2], the best constant gate of neuron i
    + affine      mean-gate + A x + b                what is left, affinely
    trained       mean-gate of the trained module's components
    module        the trained module itself

z = U x + alpha, w = V x + beta; R^2 = 1 - FVU. Everything is fitted on training rows, streamed in float64.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cache.weights import MLP, NATIVE_GATES
from train.metrics import Fvu

RIDGE = 1e-6  # times the mean input variance: only keeps directions that the data never visits from dividing by 0
MEANINGS = {
    "affine": "best affine map, fitted",
    "half": "even part of the activation, from the weights alone",
    "scaled": "bilinear map times one fitted number",
    "mean-gate": "one fitted constant gate per neuron",
    "mean-gate + affine": "the same plus an affine map of x",
    "trained": "constant gates on the trained module's components",
    "module": "the trained module as used",
}

Data = Callable[[], Iterable[tuple[Tensor, Tensor]]]  # each call starts a new pass over blocks (x, y), float64


@dataclass(frozen=True)
class Quadratic:
    """y = P (c * z * w) + b: an MLP whose gate is a constant c (m,), or one number."""

    mlp: MLP
    gate: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(self.gate * product(self.mlp, x), self.mlp.down, self.mlp.down_bias)


@dataclass(frozen=True)
class Affine:
    matrix: Tensor  # (d_out, d_in)
    offset: Tensor  # (d_out,)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix, self.offset)


@dataclass(frozen=True)
class Rung:
    name: str
    r2: float
    meaning: str


@dataclass(frozen=True)
class Energy:
    """Shares of E||S||^2, S the output without its constant bias: S = c B + O, even, odd and cross part."""

    even: float
    odd: float
    cross: float


@dataclass(frozen=True)
class Ladder:
    rungs: list[Rung]
    energy: Energy | None  # None for an ungated MLP
    scale: float | None  # the fitted number of `scaled`
    mean_gates: Tensor | None  # (m,)
    fitted_tokens: int
    held_out_tokens: int


def product(mlp: MLP, x: Tensor) -> Tensor:
    """z * w (tokens, m) of a gated MLP."""
    return F.linear(x, mlp.gate, mlp.gate_bias) * F.linear(x, mlp.up, mlp.up_bias)


def even_gate(mlp: MLP) -> float:
    """(g(z) + g(-z))/2 of the native gate g, the same for every z: 1/2, or 1 for a bilinear layer."""
    gate, one = NATIVE_GATES[mlp.activation], torch.ones((), dtype=torch.float64)
    return float(gate(one) + gate(-one)) / 2


class ConstantGates:
    """Streams c_i = E[h z w]/E[(z w)^2], where h is the hidden activation to be imitated."""

    def __init__(self) -> None:
        self.top = self.bottom = torch.zeros((), dtype=torch.float64)

    def update(self, hidden: Tensor, terms: Tensor) -> None:
        self.top = self.top + (hidden * terms).sum(0)
        self.bottom = self.bottom + terms.square().sum(0)

    def value(self) -> Tensor:
        return torch.where(self.bottom > 0, self.top / self.bottom, 0.0)


class AffineFit:
    """Streams the normal equations of y ~ A x + b."""

    def __init__(self) -> None:
        self.count, self.sums = 0, None

    def update(self, x: Tensor, y: Tensor) -> None:
        self.count += len(x)
        parts = [x.sum(0), y.sum(0), x.T @ x, x.T @ y]
        self.sums = parts if self.sums is None else [a + b for a, b in zip(self.sums, parts, strict=True)]

    def value(self) -> Affine:
        x, y, xx, xy = (part / self.count for part in self.sums)
        covariance = xx - torch.outer(x, x)
        covariance.diagonal().add_(RIDGE * covariance.diagonal().mean() + 1e-30)
        matrix = torch.linalg.solve(covariance, xy - torch.outer(x, y)).T  # (d_out, d_in)
        return Affine(matrix, y - matrix @ x)


def ladder(mlp: MLP, fit: Data, held_out: Data, *, module: nn.Module | None = None) -> Ladder:
    """Fit every stand-in of `mlp` on the pass `fit` and measure it on the pass `held_out`.

    The targets are the stored outputs, not the MLP recomputed. An ungated MLP has no quadratic rungs, and a module
    without gates none called `trained`.
    """
    mlp = mlp.map(lambda part: part.detach().double())
    stand_ins, fitted = _fit(mlp, fit, module)
    fvus = {name: Fvu() for name in stand_ins}
    tokens, energy = 0, torch.zeros(3, dtype=torch.float64)
    for x, y in held_out():
        tokens += len(x)
        for name, stand_in in stand_ins.items():
            output = stand_in(x)
            fvus[name].update(y, output)
            if name == "half":
                energy += energy_sums(y, output, mlp.down_bias)
    if tokens == 0:
        raise ValueError("no held-out token to measure on: the held-out part of the store has only left-out rows")
    rungs = [Rung(name, 1 - float(fvus[name].value()), MEANINGS[name]) for name in MEANINGS if name in fvus]
    if not mlp.gated:
        return Ladder(rungs, None, None, None, fitted, tokens)
    shares = Energy(*(energy / energy.sum()).tolist())
    gates = stand_ins["mean-gate"].gate
    return Ladder(rungs, shares, float(stand_ins["scaled"].gate), gates, fitted, tokens)


def energy_sums(y: Tensor, half: Tensor, bias: Tensor | None) -> Tensor:
    """||even||^2, ||odd||^2 and 2 even.odd summed over tokens (3,); together they are ||y - bias||^2."""
    even, odd = half if bias is None else half - bias, y - half
    return torch.stack([even.square().sum(), odd.square().sum(), 2 * (even * odd).sum()])


def _fit(mlp: MLP, fit: Data, module: nn.Module | None) -> tuple[dict[str, Callable[[Tensor], Tensor]], int]:
    """The fitted stand-ins by name, and the number of training tokens."""
    affine = AffineFit()
    scale, gates = ConstantGates(), ConstantGates()
    for x, y in fit():
        affine.update(x, y)
        if mlp.gated:
            terms = product(mlp, x)
            gates.update(mlp.hidden(x), terms)
            target = y if mlp.down_bias is None else y - mlp.down_bias
            scale.update(target.flatten(), (terms @ mlp.down.T).flatten())  # all outputs share one number
    if affine.count == 0:
        raise ValueError("no training token to fit on: the training part of the store has only left-out rows")
    stand_ins: dict[str, Callable[[Tensor], Tensor]] = {"affine": affine.value()}
    if mlp.gated:
        stand_ins["half"] = Quadratic(mlp, torch.tensor(even_gate(mlp), dtype=torch.float64))
        stand_ins["scaled"] = Quadratic(mlp, scale.value())
        stand_ins["mean-gate"] = Quadratic(mlp, gates.value())
        stand_ins["mean-gate + affine"] = _corrected(stand_ins["mean-gate"], fit)
    return stand_ins | _module_rungs(module, fit), affine.count


def _corrected(base: Callable[[Tensor], Tensor], fit: Data) -> Callable[[Tensor], Tensor]:
    """`base` plus the best affine map of what it leaves."""
    left = AffineFit()
    for x, y in fit():
        left.update(x, y - base(x))
    correction = left.value()
    return lambda x: base(x) + correction(x)


def _module_rungs(module: nn.Module | None, fit: Data) -> dict[str, Callable[[Tensor], Tensor]]:
    if module is None:
        return {}
    rungs: dict[str, Callable[[Tensor], Tensor]] = {"module": lambda x: module_output(module, x)[0]}
    copy = module.as_mlp().map(lambda part: part.detach().double())
    if copy.gated:
        gates = ConstantGates()
        for x, _ in fit():
            gates.update(module_output(module, x)[1], product(copy, x))
        rungs["trained"] = Quadratic(copy, gates.value())
    return rungs


@torch.no_grad()
def module_output(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The module's outputs (tokens, d_out) and code (tokens, C) in float64; it computes in its own precision.

    The code is hidden activations as used, 0 where a component is inactive.
    """
    output = module(x.to(next(module.parameters()).dtype))
    return output.reconstruction.double(), output.code.double()
