"""Eigenpairs of an interaction matrix: the input directions that one output direction reads, squared.

    Q = sum_k lambda_k q_k q_k^T        direction . B(x) = sum_k lambda_k (q_k . x)^2

The sign of q_k means nothing; the sign of lambda_k says whether pair k pushes the output up or down. Where x has
constant norm, Q + aI acts like Q up to a constant, so the trace is reported apart from the traceless part.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from train.tensor import CPTensor, squared_norm

from .tensor import interaction_matrix, output_gram


@dataclass(frozen=True)
class Spectrum:
    """Eigenpairs of one symmetric matrix, largest eigenvalue first."""

    values: Tensor  # (r,)
    vectors: Tensor  # (d, r)

    @property
    def trace(self) -> float:
        return float(self.values.sum())

    @property
    def norm(self) -> float:
        """Frobenius norm of the matrix."""
        return float(self.values.norm())

    @property
    def traceless(self) -> Tensor:
        """Eigenvalues of Q - (tr Q / d) I, in the same order."""
        return self.values - self.values.mean()

    def ends(self, top: int) -> tuple[list[int], list[int]]:
        """Indices of the `top` largest positive and `top` most negative eigenvalues, strongest first."""
        positive = [i for i in range(min(top, len(self.values))) if self.values[i] > 0]
        last = len(self.values) - 1
        negative = [last - i for i in range(min(top, len(self.values))) if self.values[last - i] < 0]
        return positive, negative

    def by_size(self) -> "Spectrum":
        """The same pairs, largest |eigenvalue| first: the order of truncation. Signs are kept."""
        order = self.values.abs().argsort(descending=True)
        return Spectrum(self.values[order], self.vectors[:, order])


def spectrum(matrix: Tensor) -> Spectrum:
    """Spectrum of a symmetric matrix (d, d); `interaction_matrix` is what makes one."""
    values, vectors = torch.linalg.eigh(matrix)
    return Spectrum(values.flip(0), vectors.flip(1))


def direction_spectrum(tensor: CPTensor, direction: Tensor) -> Spectrum:
    return spectrum(interaction_matrix(tensor, direction))


def local_spectrum(tensor: CPTensor, direction: Tensor, active: Tensor) -> Spectrum:
    """Exact nonzero spectrum of the k `active` terms alone, from a 2k x 2k problem: what one token's code reads."""
    gate, up = tensor.gate[active], tensor.up[active]  # (k, d)
    half = torch.diag(direction @ tensor.written[:, active]) / 2  # (k, k)
    basis, factor = torch.linalg.qr(torch.cat([gate, up]).T)  # (d, r), (r, 2k)
    zero = torch.zeros_like(half)
    core = torch.cat([torch.cat([zero, half], 1), torch.cat([half, zero], 1)])  # (2k, 2k)
    small = spectrum(factor @ core @ factor.T)
    return Spectrum(small.values, basis @ small.vectors)


def effective_ranks(values: Tensor) -> dict[str, float]:
    """Three effective ranks, which differ by factors: never compare one with another."""
    square = values.square().sum()
    if square == 0:
        return {"absolute": 0.0, "participation": 0.0, "stable": 0.0}
    return {
        "absolute": float(values.abs().sum().square() / square),  # (sum |l|)^2 / sum l^2
        "participation": float(square.square() / values.pow(4).sum()),  # (sum l^2)^2 / sum l^4
        "stable": float(square / values.abs().max().square()),  # sum l^2 / max l^2
    }


def pairs_for_share(values: Tensor, share: float = 0.9) -> int:
    """How many eigenpairs, largest |eigenvalue| first, hold `share` of sum l^2."""
    cumulative = values.square().sort(descending=True).values.cumsum(0)
    return int((cumulative < share * cumulative[-1] * (1 - 1e-12)).sum()) + 1


def hosvd(tensor: CPTensor) -> tuple[Tensor, Tensor]:
    """Singular values (r,) and left vectors (d_out, r) of the d_out x d^2 unfolding, largest first."""
    squares, vectors = torch.linalg.eigh(output_gram(tensor))
    return squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)


def null_tensor(tensor: CPTensor, seed: int, terms: int | None = None) -> CPTensor:
    """Gaussian factors of the same widths, scaled to the same tensor norm: what no structure looks like.

    `terms` is their number, by default the tensor's own. Copies of one neuron are one term: more random terms would
    make a flatter null than any expanded MLP can reach.
    """
    generator, terms = torch.Generator().manual_seed(seed), terms or len(tensor.weight)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(tensor.down.device)

    (d_out, _), (_, d) = tensor.down.shape, tensor.gate.shape
    null = CPTensor(draw(d_out, terms), draw(terms, d), draw(terms, d), tensor.weight.new_ones(terms))
    return replace(null, weight=null.weight * (squared_norm(tensor) / squared_norm(null)).sqrt())


def null_summary(tensor: CPTensor, seed: int, terms: int | None = None, draws: int = 3) -> dict[str, float]:
    """Mean effective ranks, and pairs for 90 %, of random directions of random weights (see `null_tensor`)."""
    totals: dict[str, float] = {}
    for draw in range(draws):
        null = null_tensor(tensor, seed + draw, terms)
        direction = null.down.new_zeros(null.down.shape[0])
        direction[draw % len(direction)] = 1  # the law of a Gaussian tensor is the same for every direction
        values = torch.linalg.eigvalsh(interaction_matrix(null, direction))
        for name, value in {**effective_ranks(values), "pairs90": pairs_for_share(values)}.items():
            totals[name] = totals.get(name, 0.0) + value / draws
    return totals


class Truncation:
    """Correlation of sum_{j<=k} lambda_j (q_j.x)^2 with a true activation, for every k in one pass over the data."""

    def __init__(self, pairs: Spectrum) -> None:
        self.pairs = pairs.by_size()
        self.count, self.shift, self.sums = 0, None, None

    def cumulative(self, x: Tensor) -> Tensor:
        """sum_{j<=k} lambda_j (q_j.x)^2 of inputs x (n, d) for k = 1 .. r, as (n, r)."""
        return ((x @ self.pairs.vectors).square() * self.pairs.values).cumsum(1)

    def update(self, cumulative: Tensor, truth: Tensor) -> None:
        """Add what `cumulative` gave for some inputs, and their true activations (n,)."""
        if len(truth) == 0:
            return
        both = torch.cat([cumulative, truth[:, None]], dim=1)  # (n, r + 1)
        if self.shift is None:  # the first block's mean: raw second moments would cancel
            self.shift, self.sums = both.mean(0), both.new_zeros(3, both.shape[1])
        both = both - self.shift
        self.count += len(truth)
        self.sums += torch.stack([both.sum(0), both.square().sum(0), both[:, -1] @ both])

    def curve(self) -> Tensor:
        """Correlations (r,) at k = 1 .. r; NaN where either side is constant."""
        if self.count < 2:
            return torch.full_like(self.pairs.values, torch.nan)
        mean, square, cross = self.sums / self.count
        variance = (square - mean.square()).clamp(min=0)
        return ((cross - mean * mean[-1]) / (variance * variance[-1]).sqrt())[:-1]


def truncation_curve(pairs: Spectrum, data: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """`Truncation` over blocks (x, truth)."""
    curve = Truncation(pairs)
    for x, truth in data:
        curve.update(curve.cumulative(x), truth)
    return curve.curve()
