"""A bilinear layer is a third-order tensor that comes already decomposed into rank-one terms.

    T = sum_i c_i p_i (x) sym(u_i v_i^T)        B(x)_o = x^T T_o x = sum_i c_i p_io (u_i.x)(v_i.x)

U is `gate`, V is `up`, P is `down`, c is `weight`. T itself has d_out d^2 entries and is never formed: every inner
product goes through Gram matrices of its factors, in float64 and in blocks of rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cache.weights import MLP

BLOCK_ENTRIES = 2**23  # 64 MiB of float64 per Gram block


@dataclass(frozen=True)
class CPTensor:
    """Weighted rank-one terms, float64."""

    down: Tensor  # (d_out, n)
    gate: Tensor  # (n, d)
    up: Tensor  # (n, d)
    weight: Tensor  # (n,)

    @classmethod
    def of_mlp(cls, mlp: MLP, *, density: Tensor | None = None) -> "CPTensor":
        """The tensor B of a gated MLP (weight 1, biases left out; see `augmented` for them).

        An ungated ReLU MLP has one only with respect to a law of its pre-activations: give `density` (m,), each
        pre-activation's probability density at 0, and `up` serves twice with weight density/2.
        """
        parts = [part.detach().double() for part in (mlp.down, mlp.gate if mlp.gated else mlp.up, mlp.up)]
        if mlp.gated:
            return cls(*parts, torch.ones(mlp.width, dtype=torch.float64, device=mlp.up.device))
        if density is None or mlp.activation != "relu":
            raise ValueError(
                f"an ungated MLP with activation {mlp.activation} has no quadratic form: give a gated MLP, "
                "or for relu the density of its pre-activations at 0"
            )
        return cls(*parts, density.double() / 2)

    @property
    def written(self) -> Tensor:
        """Output vectors with their weights: c_i p_i as columns (d_out, n)."""
        return self.down * self.weight

    def apply(self, x: Tensor) -> Tensor:
        """Outputs B(x) (tokens, d_out) of inputs x (tokens, d)."""
        return ((x @ self.gate.T) * (x @ self.up.T)) @ self.written.T

    def fold(self, gain: Tensor) -> "CPTensor":
        """The same function of x / gain: the diagonal `gain` (d,) moves into gate and up."""
        return replace(self, gate=self.gate * gain, up=self.up * gain)


def factors(mlp: MLP) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of gate and up over [1; x] (n, 1 + d), so that biases are weights like any other, and of down (n, d_out).

    In the MLP's own dtype and with its gradients.
    """

    def extend(rows: Tensor, bias: Tensor | None) -> Tensor:
        first = rows.new_zeros(len(rows)) if bias is None else bias
        return torch.cat([first[:, None], rows], dim=1)

    return extend(mlp.gate, mlp.gate_bias), extend(mlp.up, mlp.up_bias), mlp.down.T


def augmented(mlp: MLP) -> CPTensor:
    """The tensor of a gated MLP over [1; x], its gate and up biases included."""
    gate, up, down = (part.detach().double() for part in factors(mlp))
    return CPTensor(down.T, gate, up, gate.new_ones(len(gate)))


def inner(a: CPTensor, b: CPTensor) -> Tensor:
    """<S, T> of two tensors of equal shape, whatever their numbers of terms."""
    total = a.down.new_zeros(())
    for rows in blocks(a.gate.shape[0], b.gate.shape[0]):
        total += ((a.written[:, rows].T @ b.written) * kernel(a, b, rows)).sum()
    return total


def squared_norm(tensor: CPTensor) -> Tensor:
    return inner(tensor, tensor)


def cosine(a: CPTensor, b: CPTensor) -> float:
    return float(inner(a, b) / (squared_norm(a) * squared_norm(b)).sqrt())


def relative_distance(a: CPTensor, b: CPTensor) -> float:
    """||S - T|| / ||T||. Float64 leaves a floor near 1e-8, since the three inner products cancel."""
    reference = squared_norm(b)
    return float(((squared_norm(a) + reference - 2 * inner(a, b)).clamp(min=0) / reference).sqrt())


def kernel(a: CPTensor, b: CPTensor, rows: slice) -> Tensor:
    """K_ij = <sym(u_i v_i^T), sym(u'_j v'_j^T)> for a block of a's rows (rows, n_b)."""
    gate, up = a.gate[rows], a.up[rows]
    return ((gate @ b.gate.T) * (up @ b.up.T) + (gate @ b.up.T) * (up @ b.gate.T)) / 2


def blocks(n_rows: int, n_columns: int) -> Iterator[slice]:
    step = max(1, BLOCK_ENTRIES // max(1, n_columns))
    return (slice(start, start + step) for start in range(0, n_rows, step))
