"""Matrices that a third-order tensor gives: one per output direction, one Gram matrix per mode.

Q_e = sum_i c_i (e.p_i) sym(u_i v_i^T)       e.B(x) = x^T Q_e x
G_out = P K P^T                              eigenvectors: HOSVD's output directions, eigenvalues: sigma^2
"""

from torch import Tensor

from train.tensor import CPTensor, blocks, inner, kernel


def interaction_matrix(tensor: CPTensor, direction: Tensor) -> Tensor:
    """Q (d, d) with direction . B(x) = x^T Q x. The one function that forms and symmetrises it."""
    coefficient = direction @ tensor.written  # (n,)
    product = tensor.gate.T @ (coefficient[:, None] * tensor.up)  # (d, d)
    return (product + product.T) / 2


def functional_inner(a: CPTensor, b: CPTensor) -> Tensor:
    """E <A(x), B(x)> over x ~ N(0, I): 2 <S, T> + s . t, where s and t are the traces over the input modes."""
    return 2 * inner(a, b) + trace_vector(a) @ trace_vector(b)


def functional_cosine(a: CPTensor, b: CPTensor) -> float:
    return float(functional_inner(a, b) / (functional_inner(a, a) * functional_inner(b, b)).sqrt())


def trace_vector(tensor: CPTensor) -> Tensor:
    """Trace of every output's interaction matrix (d_out,)."""
    return tensor.written @ (tensor.gate * tensor.up).sum(1)


def output_gram(tensor: CPTensor) -> Tensor:
    """G = P K P^T (d_out, d_out): G_ef = <Q_e, Q_f>, the Gram matrix of the d_out x d^2 unfolding."""
    gram = tensor.down.new_zeros(tensor.down.shape[0], tensor.down.shape[0])
    for rows in blocks(tensor.gate.shape[0], tensor.gate.shape[0]):
        gram += tensor.written[:, rows] @ (kernel(tensor, tensor, rows) @ tensor.written.T)
    return (gram + gram.T) / 2  # symmetric already, but for rounding


def input_gram(tensor: CPTensor) -> Tensor:
    """sum_o Q_o Q_o (d, d): the Gram matrix of either input unfolding (Tucker's input factor diagonalises it)."""
    gate, up, written = tensor.gate, tensor.up, tensor.written
    gram = gate.new_zeros(gate.shape[1], gate.shape[1])
    for rows in blocks(gate.shape[0], gate.shape[0]):
        outputs = written[:, rows].T @ written  # (rows, n)
        gram += gate[rows].T @ (outputs * (up[rows] @ up.T)) @ gate
        gram += up[rows].T @ (outputs * (gate[rows] @ gate.T)) @ up
        cross = gate[rows].T @ (outputs * (up[rows] @ gate.T)) @ up
        gram += cross + cross.T
    return gram / 4
